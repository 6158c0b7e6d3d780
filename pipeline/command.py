"""What every command does before its work: answers --help, composes, names a mistake in its words.

Hydra ends a command with code 1 for a word that it cannot compose, as for a crash, and a queue
starts a job that crashed again. Here it is 2, the code of a user's mistake.
"""

import difflib
import functools
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from pipeline.config import CONF, user_errors
from pipeline.targets import foreign_targets

FULL_ERROR = "HYDRA_FULL_ERROR"  # 1: Hydra raises what it would print before it exits with 1
Job = Callable[[DictConfig], Any]


def entry(name: str, *, config: str, choices: str | None = None) -> Callable[[Job], Callable]:
    """Make a console command of a function of the composed config.

    name: what a user types.  config: conf/<config>.yaml.  choices: the group that --help lists.
    A ValueError of the function, or a config that does not compose, is one message and exit
    code 2; HYDRA_FULL_ERROR=1 or PAIRWRIGHT_TRACEBACK=1 shows where it was raised instead.
    """

    def decorate(job: Job) -> Callable:
        composing = False

        @functools.wraps(job)
        def run(cfg: DictConfig) -> Any:
            nonlocal composing
            if composing:
                composing = False
                # A crash of the job is Hydra's to print. Another machine may not have it at all.
                os.environ.pop(FULL_ERROR, None)
            with user_errors(name):
                return job(cfg)

        compose = hydra.main(version_base="1.3", config_path=CONF, config_name=config)(run)

        @functools.wraps(job)
        def command(cfg: DictConfig | None = None) -> Any:
            nonlocal composing
            if cfg is None and {"--help", "-h"} & set(sys.argv[1:]):
                print(help_text(name, job.__globals__["__doc__"], choices))
                return None
            if FULL_ERROR in os.environ or os.environ.get("PAIRWRIGHT_TRACEBACK"):
                return compose(cfg)
            os.environ[FULL_ERROR], composing = "1", cfg is None
            try:
                return compose(cfg)
            except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
                if not composing:
                    raise
                print(f"{name}: {explained(error)}", file=sys.stderr)
                sys.exit(2)
            finally:
                composing = False
                os.environ.pop(FULL_ERROR, None)

        return command

    return decorate


def explained(error: Exception) -> str:
    """An error of composition as one line: the word, the nearest known one, all known ones."""
    text, cause = str(error), error.__cause__ or error.__context__
    if isinstance(error, MissingConfigException) and "/" in str(error.missing_cfg_file):
        group, _, given = error.missing_cfg_file.rpartition("/")
        return f"{group}={given}: no such {group}; {known(given, error.options or names(group))}"
    if missing := re.match(r"You must specify '([^']+)'", text):
        group = missing[1]
        return f"{group}: say which, {group}=NAME; known: {', '.join(names(group))}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, OverrideParseException):
        why = [line for line in lines if not line.startswith(("See ", "Error parsing"))]
        how = """a word is KEY=VALUE, or 'KEY="VALUE"' where it has any of = , : ( ) [ ] { }"""
        return f"{error.override}: {' '.join(why)}; {how}"
    where = re.match(r"In '([^']+)'", text)
    prefix = f"conf/{where[1]}.yaml: " if where else ""
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return prefix + unknown_key(cause)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{prefix}{cause.full_key}: {str(cause).splitlines()[0]}"
    if type(error) is ValueError:  # of a value that is no file's name; Hydra does not say whose
        given = [word.partition("=") for word in sys.argv[1:]]
        groups = [word for word in given if Path(CONF, word[0]).is_dir()]
        empty = [group for group, _, value in groups if value in ("", "null")]
        if empty:
            off = ["none" if Path(CONF, group, "none.yaml").exists() else "NAME" for group in empty]
            words = [f"{group}={word}" for group, word in zip(empty, off, strict=True)]
            return f"{empty[0]}: a group takes the name of a file: {', '.join(words)}"
        lines = [f"{', '.join(map(''.join, groups))}:", *lines, "(~GROUP leaves a group out)"]
    return " ".join(lines)


def unknown_key(error: OmegaConfBaseException) -> str:
    """What stands where a key was looked for: of a component, what its constructor takes."""
    node, key = error.parent_node, str(error.key)
    there = [str(k) for k in node if not str(k).startswith("_") and k != "hydra"]
    takes: list[str] = []
    if "_target_" in node and not foreign_targets(node):
        takes = list(inspect.signature(pkgutil.resolve_name(node["_target_"])).parameters)
    if key in takes:
        return f"{error.full_key}: not in the YAML of {node['_target_']}: write +{error.full_key}="
    return f"{error.full_key}: unknown; {known(key, takes or there)}"


def known(given: str, words: Iterable[str]) -> str:
    """The nearest of some words, and all of them."""
    words = list(words)
    near = difflib.get_close_matches(given, words, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(words) or 'none'}"


def names(group: str) -> list[str]:
    """The YAML files of a group."""
    return sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))


def first_sentence(path: Path) -> str:
    """Of the comment that a YAML file begins with."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    count = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    text = " ".join(line.removeprefix("#").strip() for line in lines[:count])
    return re.split(r"(?<=[.?]) (?=[A-Z])", text, maxsplit=1)[0]


def help_text(name: str, doc: str, choices: str | None) -> str:
    """What a command does, the choices of its main group, and where all its words are."""
    parts = [f"{name}: {doc.removeprefix('COMMAND: ').strip()}", ""]
    example = name
    if choices:
        of = names(choices)
        width = max(map(len, of))
        parts += [f"{choices}=NAME, one of:"]
        parts += [f"  {n:{width}}  {first_sentence(Path(CONF, choices, n + '.yaml'))}" for n in of]
        parts += [""]
        example += f" {choices}={of[0]}"
    parts += [
        "Every key of the config is a word: KEY=VALUE, GROUP.KEY=VALUE; GROUP=NAME takes a file of",
        f"{CONF}/GROUP, whose comments say what it is. All keys with their values:",
        f"  {example} --cfg job",
    ]
    return "\n".join(parts)
