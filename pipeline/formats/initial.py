"""First weights from checkpoints: a whole model, or each tower from its own (EVA-CLIP,
arXiv:2303.15389, sec. 2).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.formats.checkpoint_file import load_weights
from pipeline.formats.declared import differences, pixel_statistics
from pipeline.formats.names import LAYOUTS, Layout
from pipeline.models.clip import CLIP
from pipeline.models.resize import resize_positions


@dataclass
class Report:
    """taken: our names filled; new: our names left at their first values; resized: tables, rows
    before and after; unused: their names that nothing was made of; differs: a line for each option
    of ours that is another one than the checkpoint's.
    """

    taken: set[str] = field(default_factory=set)
    new: list[str] = field(default_factory=list)
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} weights from checkpoints, {len(self.new)} stay new"]
        lines += [f"  new: {name}" for name in self.new]
        lines += [f"  resized: {name}, {a} -> {b} rows" for name, (a, b) in self.resized.items()]
        lines += [f"  unused: {name}" for name in self.unused]
        lines += [f"  differs: {line}" for line in self.differs]
        return "\n".join(lines)


class InitialWeights:
    """Fills a freshly built model before training.

    model: a checkpoint for everything (see checkpoint_file.load_weights for what it may be; whose
    it is, is seen from its names). image, text: a checkpoint for that tower alone, after `model`;
    of it only the tower is read: a projection belongs to the space it was trained into.
    may_stay_new: regular expressions of our weights that checkpoints need not hold; may_be_unused:
    of weights in them that are not wanted. Anything else left over is an error, as is another
    shape. So is a tower that differs from what the config beside the weights says of heads,
    activation, eps, pooling or causality, a TorchScript archive being OpenAI's: QuickGELU;
    may_differ: of such options (`text.activation`, `transform.mean`) that may.
    mean, std: of the run's transform, which are compared with those of an image tower's weights.
    Position tables of another size are resized; lengthen: see models.resize.resize_rows.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        image: str | None = None,
        text: str | None = None,
        may_stay_new: Sequence[str] = (),
        may_be_unused: Sequence[str] = (),
        may_differ: Sequence[str] = (),
        lengthen: str = "repeat",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if model is None and image is None and text is None:
            raise ValueError("initial weights come from somewhere: give model, image or text")
        self.parts = {"": model, "image.": image, "text.": text}
        self.may_stay_new, self.may_be_unused = may_stay_new, may_be_unused
        self.may_differ, self.lengthen = may_differ, lengthen
        self.pixels = {name: own for name, own in (("mean", mean), ("std", std)) if own is not None}

    def apply(self, model: CLIP) -> Report:
        """Copy the weights into `model`. Raises ValueError for whatever does not fit, all of it at
        once, and then leaves the model as it was.
        """
        report, found = Report(), {}
        problems: list[str] = []
        for part, path in self.parts.items():
            if path is not None:
                found |= self._part(model, part, path, report, problems)
        wanted = [
            name
            for name in model.state_dict()
            if any(path is not None and name.startswith(part) for part, path in self.parts.items())
        ]
        report.taken = set(found)
        report.new = [name for name in model.state_dict() if name not in found]
        missing = [name for name in wanted if name not in found]
        problems += [f"{name}: in no checkpoint" for name in _unlisted(missing, self.may_stay_new)]
        if problems:
            raise ValueError(
                f"{len(problems)} things do not fit (may_stay_new and may_be_unused take regular "
                "expressions of weights that need not, may_differ of options):\n"
                + "\n".join(f"  {line}" for line in problems)
            )
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name in found:
                    tensor.copy_(found[name])
        return report

    def _part(
        self, model: CLIP, part: str, path: str, report: Report, problems: list[str]
    ) -> dict[str, Tensor]:
        theirs = load_weights(path)
        layout = layout_of(theirs, path)
        differs = differences(model, path, part)
        differs |= self._other_pixels(path) if part != "text." else {}
        report.differs += differs.values()
        problems += [differs[option] for option in _unlisted(differs, self.may_differ)]
        ours, used = {}, set()
        for name in (name for name in model.state_dict() if name.startswith(part)):
            tensor, names = layout.read(theirs, name)
            if tensor is not None:
                ours[name], used = tensor, used | names
        own = model.state_dict()
        ours = {name: _as_ours(tensor, own[name], name) for name, tensor in ours.items()}
        try:
            ours, resized = resize_positions(ours, model, lengthen=self.lengthen)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            return ours
        report.resized |= resized
        problems += [
            f"{path}: {name} is {tuple(tensor.shape)}, here {tuple(own[name].shape)}"
            for name, tensor in ours.items()
            if tensor.shape != own[name].shape
        ]
        begins = {"": "", "image.": layout.image_part, "text.": layout.text_part}[part]
        left = [
            name
            for name in theirs
            if name not in used and re.match(begins, name) and not re.search(layout.others, name)
        ]
        report.unused += left
        problems += [f"{path}: {name} unused" for name in _unlisted(left, self.may_be_unused)]
        return ours

    def _other_pixels(self, path: str) -> dict[str, str]:
        """`transform.mean` and `transform.std` where they are not the checkpoint's -> a line."""
        theirs = pixel_statistics(path)
        return {
            f"transform.{name}": f"{path}: transform.{name} was {theirs[name]}, here {list(own)}"
            for name, own in self.pixels.items()
            if name in theirs
            and any(abs(a - b) > 1e-3 for a, b in zip(theirs[name], own, strict=True))
        }


def layout_of(theirs: Mapping[str, Tensor], path: str) -> Layout:
    """Whose names these are. Raises ValueError for nobody's we know."""
    for layout in LAYOUTS:
        if layout.mark in theirs:
            return layout
    raise ValueError(
        f"{path} holds no CLIP in the layout of ours, open_clip (also OpenAI's; timm's and EVA's "
        f"towers) or transformers; its names begin with {sorted(theirs)[:3]}"
    )


def _as_ours(tensor: Tensor, own: Tensor, name: str) -> Tensor:
    """Without dimensions of size 1 that the other side has or lacks."""
    if name.endswith(".position"):
        return tensor.flatten(0, -2)  # the number of rows may differ
    return tensor.reshape(own.shape) if tensor.squeeze().shape == own.squeeze().shape else tensor


def _unlisted(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if not any(re.search(p, name) for p in patterns)]
