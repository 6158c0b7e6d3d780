"""Which tars `data.shards` names: `DIR/{00000..01242}.tar`, `a.tar::b.tar`, `DIR/*.tar`, with any
protocol of fsspec.
"""

import re
from pathlib import Path

import fsspec

from pipeline.data.cache import retried

TAR = re.compile(r"^pipe:|\.(tar|tar\.gz|tgz)(\?.*)?$")


def is_pattern(shards: str) -> bool:
    """Whether `shards` names tars rather than a directory of ours."""
    return any(TAR.search(part) for part in shards.split("::"))


def expand(pattern: str) -> list[str]:
    """`a{00..11}b` and `{x,y}` written out, from left to right, as webdataset does."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, within, after = pattern[: found.start()], found[1], pattern[found.end() :]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", within)
    if numbers:
        first, last = numbers[1], numbers[2]
        if int(last) < int(first):
            raise ValueError(f"data.shards={pattern}: {{{within}}} counts down")
        padded = any(number.startswith("0") and number != "0" for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        words = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    elif re.fullmatch(r"[^,/]*\.\.[^,/]*", within) or "{" in before:
        raise ValueError(
            f"data.shards={pattern}: {{{within}}} is not written out; braces hold two numbers, "
            "{00..11}, or words, {x,y}, and no other braces"
        )
    else:
        words = within.split(",")
    return [before + word + rest for word in words for rest in expand(after)]


def refuse_unreadable(shards: str) -> None:
    """Raise ValueError for a part of a pattern that cannot be read at any place."""
    for part in shards.split("::"):
        if part.startswith("pipe:"):
            raise ValueError(f"data.shards={part}: commands are not run; give a URL of fsspec")
        if re.search(r"\.tar\?", part):
            raise ValueError(
                f"data.shards={part}: a signed URL ends before a run does; give the store's own "
                "(s3://...), whose keys are fsspec's to configure"
            )
        if not part.endswith(".tar"):
            raise ValueError(f"data.shards={part}: unpack it to .tar, which can be read anywhere")


def locations(shards: str) -> list[str]:
    """The tars that `shards` names, in order; files by their absolute paths. Raises ValueError for
    a part that names none.
    """
    refuse_unreadable(shards)
    return [
        url
        for part in shards.split("::")
        for name in expand(part.removeprefix("file://"))
        for url in _matching(name)
    ]


def _matching(name: str) -> list[str]:
    if "://" not in name:
        name = str(Path(name).absolute())  # the index is found again by it, from any folder
    if "*" not in name and "?" not in name:
        return [name]

    def listed(fs: fsspec.AbstractFileSystem, remote: str) -> list[str]:
        found = sorted(fs.glob(remote))
        return [fs.unstrip_protocol(n) for n in found] if "://" in name else found

    found = retried(name, listed)
    if not found:
        raise ValueError(f"data.shards={name}: no tar has such a name")
    return found
