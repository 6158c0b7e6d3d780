"""Imports go down the floors of docs/architecture.md only, and heavy libraries stay on their
floor.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room -> floor; the longest matching prefix counts
FLOORS = {
    "pipeline.command": 0,
    "pipeline.config": 0,
    "pipeline.distributed": 0,
    "pipeline.metric": 0,
    "pipeline.phases": 0,
    "pipeline.targets": 0,
    "pipeline.shards": 0,
    "pipeline.models": 1,
    "pipeline.tokens": 1,
    "pipeline.losses": 1,
    "pipeline.optim": 1,
    "pipeline.data": 2,
    "pipeline.evals": 2,
    "curation.step": 2,
    "curation.engine": 2,
    "curation.engines": 2,
    "curation.ingest": 2,
    "curation.loose": 2,
    "curation.pool": 2,
    "pipeline.trainer": 3,
    "pipeline.tracking": 3,
    "pipeline.cost": 3,
    "pipeline.formats": 3,
    "curation.annotate": 3,
    "curation.select": 3,
    "curation.metadata": 3,
    "curation.selection": 3,
    "curation.pack": 3,
    "curation.report": 3,
    "curation.card": 3,
    "curation.explain": 3,
    "curation.plan": 3,
    "curation.track": 3,
    "pipeline.train": 4,
    "pipeline.train_captioner": 4,
    "pipeline.evaluate": 4,
    "pipeline.export": 4,
    "pipeline.check": 4,
    "pipeline.report": 4,
    "pipeline.dashboard": 4,
    "curation.run": 4,
}
# library -> the lowest floor that may import it
LIBRARIES = {
    "lightning": 3,
    "deepspeed": 3,
    "wandb": 3,
    "transformers": 3,
    "onnxruntime": 3,
    "rapidocr_onnxruntime": 3,
    "ahocorasick_rs": 3,
    "rapidfuzz": 3,
    "py3langid": 3,
    "matplotlib": 3,
    "datatrove": 2,
    "PIL": 2,
    "simplejpeg": 2,
    "fsspec": 2,
    "upath": 2,
    "tokenizers": 2,
}
# the one module that may import a library of a higher floor: it is a tower made of that library
ALLOWED = {("pipeline.models.hf_text", "transformers")}
# floor 1 is torch alone; floor 0 may know configs and Arrow, the format of the shards' index
ONLY = {1: {"torch", "numpy"}}
# Within a floor, rooms do not know each other, but for these pairs (importer, imported).
NEIGHBOURS = {
    ("pipeline.evals", "pipeline.data"),  # an evaluation embeds what the data room decodes
    ("curation.pool", "curation.ingest"),
    ("curation.ingest", "curation.loose"),
    ("curation.pool", "curation.engine"),
    ("curation.engine", "curation.engines"),
    ("curation.engines", "curation.engine"),
    ("curation.pool", "curation.step"),
    ("curation.selection", "curation.pack"),
    ("curation.pack", "curation.selection"),  # pack and report show what selection decided
    ("curation.report", "curation.selection"),
    ("curation.report", "curation.card"),
    ("curation.card", "curation.selection"),
    ("curation.card", "curation.select"),  # the card counts with the parrot filter's measure
    ("curation.explain", "curation.selection"),
    ("curation.annotate", "curation.metadata"),  # matching knows how an entry list is spelled
    ("pipeline.trainer", "pipeline.tracking"),
    ("pipeline.trainer", "pipeline.cost"),
    ("pipeline.train", "pipeline.check"),  # the command counts its processes as the check does
    ("pipeline.train_captioner", "pipeline.check"),
    # curation meets pipeline's edges below it: pictures are decoded the same way everywhere
    ("curation.ingest", "pipeline.data"),
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("pipeline", "curation"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def room(module: str) -> str | None:
    names = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return max(names, key=len, default=None)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(module: str, path: Path) -> list[str]:
    here = room(module)
    if here is None:
        return [f"{module}: in no room; give it a floor in FLOORS"]
    found, floor = [], FLOORS[here]
    for name in sorted(imports(path)):
        top = name.partition(".")[0]
        if top in ("pipeline", "curation"):
            there = room(name)
            if there is None or there == here:
                continue
            if top == "curation" and module.startswith("pipeline"):
                found.append(f"{module} imports {name}: pipeline never knows curation")
            elif FLOORS[there] > floor:
                found.append(f"{module} (floor {floor}) imports {name} (floor {FLOORS[there]})")
            elif FLOORS[there] == floor and floor > 0 and (here, there) not in NEIGHBOURS:
                found.append(f"{module} imports its neighbour {name}")
            elif top == "pipeline" and module.startswith("curation") and FLOORS[there] > 2:
                found.append(f"{module} imports {name}: curation uses pipeline's floors 0-2")
        elif (module, top) in ALLOWED:
            continue
        elif LIBRARIES.get(top, 0) > floor:
            found.append(f"{module} (floor {floor}) imports {top} (floor {LIBRARIES[top]} and up)")
        elif floor in ONLY and top in THIRD_PARTY and top not in ONLY[floor]:
            found.append(f"{module} (floor {floor}) imports {top}")
    return found


THIRD_PARTY = {*LIBRARIES, "torch", "numpy", "pyarrow", "omegaconf", "hydra", "rich", "tqdm"}
MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert violations(module, MODULES[module]) == [] or module in ("pipeline", "curation")


def test_the_law_can_be_broken(tmp_path):
    upward = tmp_path / "bad.py"
    upward.write_text(
        "import lightning\nfrom pipeline.trainer import module\nimport curation.step\n"
    )
    found = violations("pipeline.models.bad", upward)
    assert len(found) == 4, found


def test_init_files_are_empty():
    full = [
        name for name, path in MODULES.items() if path.name == "__init__.py" and path.stat().st_size
    ]
    assert full == []
