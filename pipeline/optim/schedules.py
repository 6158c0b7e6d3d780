"""Learning-rate factors by pairs seen, so that a schedule survives a change of batch size."""

import math


class WarmupCosine:
    """Linear warm-up, then a half cosine down to final_fraction (open_clip's `cosine`).

    warmup_samples: pairs of the warm-up.  final_fraction: the factor at the end, in [0, 1].
    """

    def __init__(self, *, warmup_samples: int, final_fraction: float = 0.0) -> None:
        if warmup_samples < 0:
            raise ValueError(f"warmup_samples {warmup_samples} is negative")
        if not 0 <= final_fraction <= 1:
            raise ValueError(f"final_fraction {final_fraction} is outside [0, 1]")
        self.warmup_samples = warmup_samples
        self.final_fraction = final_fraction

    def factor(self, samples_done: int, samples_total: int, batch: int) -> float:
        """Factor of the base rate for the step that follows samples_done pairs.

        samples_done, samples_total: pairs over all ranks, before this step and in the whole run.
        batch: the global batch of this step; the warm-up counts it as seen, so that the first step
        is not wasted on a rate of 0.
        Raises ValueError if the warm-up is not shorter than the run.
        """
        if self.warmup_samples >= samples_total:
            raise ValueError(
                f"warmup_samples {self.warmup_samples} is not below the run's "
                f"{samples_total} samples: shorten the warm-up or lengthen the run"
            )
        if samples_done < self.warmup_samples:
            return min(1.0, (samples_done + batch) / self.warmup_samples)
        progress = (samples_done - self.warmup_samples) / (samples_total - self.warmup_samples)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1 - self.final_fraction) * cosine
