"""What a run is watched by: sections of panels, for the local page and for W&B alike."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

X_AXIS = "samples_seen"

TERMS = ("softmax", "sigmoid", "simclr", "byol")  # names of conf/loss end in these


@dataclass(frozen=True)
class Panel:
    """One plot. keys: patterns of metrics, `*` for any; all that match share the plot."""

    title: str
    keys: tuple[str, ...]
    unit: str = ""
    logarithmic: bool = False

    def matches(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in self.keys)


@dataclass(frozen=True)
class Section:
    """Plots that belong together."""

    title: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        "Training",
        (
            Panel("loss", ("train/loss",)),
            Panel(
                "loss, term by term",
                ("train/*softmax", "train/*sigmoid", "train/*simclr", "train/*byol"),
            ),
            Panel("logit scale", ("train/logit_scale",)),
            Panel("gradient norm", ("train/grad_norm",), logarithmic=True),
            Panel("learning rate", ("train/lr",)),
            Panel("steps skipped, pairs not read", ("train/skipped_steps", "data/bad_records")),
        ),
    ),
    Section(
        "Performance",
        (
            Panel("pairs per second", ("perf/pairs_per_second",)),
            Panel("share of time spent waiting for data", ("perf/data_wait_fraction",)),
            Panel("share of the device's peak", ("perf/mfu",)),
            Panel("peak memory", ("perf/peak_memory_gib",), "GiB"),
            Panel("patches of an image that are seen", ("perf/tokens_per_image",)),
        ),
    ),
    Section(
        "Evaluation",
        (
            Panel("zero-shot accuracy", ("eval/*/top1", "eval/*/top5")),
            Panel("recall at 1", ("eval/*_r_at_1",)),
            Panel("recall at 5", ("eval/*_r_at_5",)),
        ),
    ),
    Section(
        "Geometry",
        (
            Panel("modality gap", ("eval/geometry/gap*",)),
            Panel("alignment, uniformity", ("eval/geometry/align*", "eval/geometry/uniform*")),
            Panel("effective rank", ("eval/geometry/*effective_rank*",)),
            Panel("similarity to the evaluation before", ("eval/geometry/*cka*",)),
        ),
    ),
)
