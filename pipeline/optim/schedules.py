"""Learning-rate factors by pairs seen, so that a schedule survives a change of batch size.

A factor multiplies each parameter group's own `base_lr`: towers and layers with other rates warm
up and decay in the same proportion, and a fraction below is a fraction of each group's own rate.

factor(samples_done, samples_total, batch) of every schedule: samples_done, samples_total are pairs
over all ranks, before this step and in the whole run; batch is the global batch of this step. The
warm-up counts the batch as seen, so that the first step is not wasted on a rate of 0.
"""

import math


def _at_least_zero(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name} {value} is negative")


def _in_unit_interval(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} is outside [0, 1]")


def _check_length(warmup_samples: int, cooldown: float, samples_total: int) -> None:
    """Raise ValueError if warm-up and cool-down leave nothing of the run."""
    if warmup_samples >= samples_total:
        raise ValueError(
            f"warmup_samples {warmup_samples} is not below the run's "
            f"{samples_total} samples: shorten the warm-up or lengthen the run"
        )
    if warmup_samples + cooldown > samples_total:
        raise ValueError(
            f"warmup_samples {warmup_samples} and a cool-down of {cooldown:g} samples are more "
            f"than the run's {samples_total}: lower warmup_samples or cooldown_fraction"
        )


def _warm_up(samples_done: int, batch: int, warmup_samples: int) -> float:
    """Linear from batch / warmup_samples to 1."""
    if samples_done >= warmup_samples:
        return 1.0
    return min(1.0, (samples_done + batch) / warmup_samples)


def _cool_down(samples_done: int, samples_total: int, samples: float) -> float:
    """1 until the last `samples` pairs, then linear to 0 at samples_total."""
    left = max(0, samples_total - samples_done)
    return 1.0 if left >= samples else left / samples


class WarmupCosine:
    """Linear warm-up, then a half cosine down to final_fraction (open_clip's `cosine`).

    With per-tower rates in the optimizer it is EVA-CLIP's `warmup_cosine_lr`.
    warmup_samples: pairs of the warm-up.  initial_fraction: where the warm-up starts, in [0, 1].
    final_fraction: the factor at the end, in [0, 1].
    """

    def __init__(
        self, *, warmup_samples: int, initial_fraction: float = 0.0, final_fraction: float = 0.0
    ) -> None:
        _at_least_zero(warmup_samples=warmup_samples)
        _in_unit_interval(initial_fraction=initial_fraction, final_fraction=final_fraction)
        self.warmup_samples = warmup_samples
        self.initial_fraction, self.final_fraction = initial_fraction, final_fraction

    def factor(self, samples_done: int, samples_total: int, batch: int) -> float:
        """Factor of the base rate for the step that follows samples_done pairs.

        Raises ValueError if the warm-up is not shorter than the run.
        """
        _check_length(self.warmup_samples, 0, samples_total)
        if samples_done < self.warmup_samples:
            warm = _warm_up(samples_done, batch, self.warmup_samples)
            return self.initial_fraction + (1 - self.initial_fraction) * warm
        progress = (samples_done - self.warmup_samples) / (samples_total - self.warmup_samples)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_fraction + (1 - self.final_fraction) * cosine


class Constant:
    """Linear warm-up, then the base rate to the end (open_clip's `const`).

    For phases that end in a schedule of their own, and for fine-tuning at a small rate.
    """

    def __init__(self, *, warmup_samples: int) -> None:
        _at_least_zero(warmup_samples=warmup_samples)
        self.warmup_samples = warmup_samples

    def factor(self, samples_done: int, samples_total: int, batch: int) -> float:
        """Raises ValueError if the warm-up is not shorter than the run."""
        _check_length(self.warmup_samples, 0, samples_total)
        return _warm_up(samples_done, batch, self.warmup_samples)


class ConstantCooldown:
    """Warm-up, the base rate, then a fall to final_fraction (open_clip's `const-cooldown`).

    cooldown_fraction: the share of the run that cools down, in [0, 1]; a share, because a run that
    is made longer keeps its form.  power: 1 falls linearly, more falls early.
    The constant part does not depend on the run's length: a checkpoint of it can be cooled down
    at any time by continuing it under a new name.
    """

    def __init__(
        self,
        *,
        warmup_samples: int,
        cooldown_fraction: float,
        power: float = 1.0,
        final_fraction: float = 0.0,
    ) -> None:
        _at_least_zero(warmup_samples=warmup_samples)
        _in_unit_interval(cooldown_fraction=cooldown_fraction, final_fraction=final_fraction)
        if power <= 0:
            raise ValueError(f"power {power} must be positive: 1 cools down linearly")
        self.warmup_samples, self.cooldown_fraction = warmup_samples, cooldown_fraction
        self.power, self.final_fraction = power, final_fraction

    def factor(self, samples_done: int, samples_total: int, batch: int) -> float:
        """Raises ValueError if warm-up and cool-down are longer than the run."""
        cooldown = self.cooldown_fraction * samples_total
        _check_length(self.warmup_samples, cooldown, samples_total)
        cold = _cool_down(samples_done, samples_total, cooldown) ** self.power
        fall = self.final_fraction + (1 - self.final_fraction) * cold
        return _warm_up(samples_done, batch, self.warmup_samples) * fall


class ReciprocalSqrt:
    """Warm-up, then 1 / sqrt(1 + samples after it / timescale) and a linear cool-down to 0.

    big_vision's `rsqrt` (arXiv:2106.04560, sec. 3.5): without its cool-down a run has no planned
    end and can go on as long as it improves.
    timescale_samples: pairs after the warm-up at which the rate has fallen to 1 / sqrt(2).
    cooldown_fraction: the share of the run in which the rate also falls linearly to 0.
    """

    def __init__(
        self, *, warmup_samples: int, timescale_samples: int, cooldown_fraction: float
    ) -> None:
        _at_least_zero(warmup_samples=warmup_samples)
        _in_unit_interval(cooldown_fraction=cooldown_fraction)
        if timescale_samples < 1:
            raise ValueError(f"timescale_samples {timescale_samples} must be at least 1")
        self.warmup_samples, self.timescale_samples = warmup_samples, timescale_samples
        self.cooldown_fraction = cooldown_fraction

    def factor(self, samples_done: int, samples_total: int, batch: int) -> float:
        """Raises ValueError if warm-up and cool-down are longer than the run."""
        cooldown = self.cooldown_fraction * samples_total
        _check_length(self.warmup_samples, cooldown, samples_total)
        after = max(0, samples_done - self.warmup_samples)
        fall = 1 / math.sqrt(1 + after / self.timescale_samples)
        cold = _cool_down(samples_done, samples_total, cooldown)
        return _warm_up(samples_done, batch, self.warmup_samples) * fall * cold
