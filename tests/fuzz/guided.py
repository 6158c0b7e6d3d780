"""Coverage-guided fuzzing of our own parsers by atheris, beside hypothesis' edits of valid files.

    python -m tests.fuzz.guided --runs 100000            every target, each in a process of its own
    python -m tests.fuzz.guided members --runs 100000    one; a crash leaves crash-* and fails

libFuzzer sees which lines of `pipeline` and `curation` an input reaches, so it finds its way past a
magic number or a checksum that random edits do not. An input may take one second and a gibibyte
beside the 400 MB of a process that has imported torch. Without atheris (no wheel for this machine)
nothing runs, and that is said.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None


def targets(place: Path) -> Mapping[str, tuple[Callable[[bytes], None], list[bytes]]]:
    """name -> (what is done with an input, valid files to begin with)."""
    with atheris.instrument_imports(include=["pipeline", "curation"]):
        from curation.annotate.entries import EntryMatcher
        from curation.loose import rows_of
        from pipeline.data.foreign import members
        from pipeline.data.tokenizer import BpeTokenizer, clean_caption
        from pipeline.evals.labelled_images import LabelledImages
        from pipeline.shards import read_manifest
        from pipeline.tracking.page import read_rows
    from tests.fuzz.test_fuzz import ENTRIES, LABELLED, MANIFEST, PAIRS, TABLES

    tokenizer = BpeTokenizer(path="clip", context_length=16)
    matcher = EntryMatcher(entries=ENTRIES, rule="metaclip")
    (place / "set" / "test").mkdir(parents=True)
    (place / "set" / "classnames.txt").write_text("cat\ndog\n")
    (place / "set" / "test" / "nshards.txt").write_text("1")

    def tars(data: bytes) -> None:
        for name, offset, size in members(data, "x.tar"):
            assert isinstance(name, str) and 0 <= offset <= offset + size <= len(data)

    def manifests(data: bytes) -> None:
        (place / "manifest.json").write_bytes(data)
        for shard in read_manifest(place)["shards"]:
            assert (place / f"{shard['name']}.tar").resolve().parent == place.resolve()

    def tables(data: bytes) -> None:
        for name in TABLES:
            (place / name).write_bytes(data)
            with suppress(ValueError):
                for _, image, _, problem in rows_of(place / name, "caption"):
                    assert problem or image.resolve().is_relative_to(place.resolve())

    def rows(data: bytes) -> None:
        (place / "metrics.jsonl").write_bytes(data)
        assert all(isinstance(row, dict) for row in read_rows(place / "metrics.jsonl"))

    def captions(data: bytes) -> None:
        text = data.decode(errors="surrogatepass")
        assert tokenizer([text]).shape == (1, 16)
        clean_caption(text)
        (found,) = matcher.match([text])
        assert found == sorted(set(found))

    def labelled(data: bytes) -> None:
        (place / "set" / "test" / "0.tar").write_bytes(data)
        for image, label in LabelledImages(place / "set").samples():
            assert isinstance(image, bytes) and label in (0, 1)

    words = ["a photo of a red panda", "猫 &amp; 😀"]
    return {
        "members": (tars, [PAIRS]),
        "manifest": (manifests, [MANIFEST]),
        "table": (tables, list(TABLES.values())),
        "metrics": (rows, [b'{"step": 1, "train/loss": 3.5}\n' * 3]),
        "captions": (captions, [word.encode() for word in words]),
        "labelled": (labelled, [LABELLED]),
    }


NAMES = ("members", "manifest", "table", "metrics", "captions", "labelled")


def fuzz(name: str, runs: int) -> None:
    """One target in this process, which libFuzzer ends."""
    place = Path(tempfile.mkdtemp())
    for folder in ("files", "corpus"):
        (place / folder).mkdir()
    target, seeds = targets(place / "files")[name]
    for number, seed in enumerate(seeds):
        (place / "corpus" / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        with suppress(ValueError):  # a refusal
            target(data)

    limits = ["-timeout=1", "-rss_limit_mb=1400", "-max_len=20000", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(place / "corpus"), f"-runs={runs}", *limits], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", choices=NAMES)
    parser.add_argument("--runs", type=int, default=100_000)
    given = parser.parse_args()
    if atheris is None:
        print("guided fuzzing: atheris is not installed here (pip install atheris), nothing runs")
        return 0
    if given.target is not None:
        fuzz(given.target, given.runs)
        return 0
    failed = []
    for name in NAMES:
        command = [sys.executable, "-m", "tests.fuzz.guided", name, "--runs", str(given.runs)]
        with tempfile.TemporaryDirectory() as place:  # libFuzzer ends a process without tidying up
            done = subprocess.run(
                command,
                env={**os.environ, "TMPDIR": place},
                capture_output=True,
                text=True,
                check=False,
            )
        last = [line for line in done.stderr.splitlines() if " cov: " in line or "DONE" in line]
        print(
            f"{name:10} {'FAILED' if done.returncode else 'ok'}  {''.join(last[-1:])}", flush=True
        )
        if done.returncode:
            failed.append(name)
            print(done.stderr[-4000:])
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
