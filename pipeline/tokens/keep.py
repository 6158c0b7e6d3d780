"""How many tokens a fraction keeps: one rule for every image policy, so that they cost the same."""

import math


def checked_keep(keep: float) -> float:
    """keep itself. Raises ValueError outside (0, 1]."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep {keep} is outside (0, 1]: it is the fraction of tokens kept")
    return keep


def count_kept(keep: float, num_tokens: int) -> int:
    """max(1, int(N * keep)): FLIP's and open_clip's rule, the product of floats cut, not rounded.

    Written as keep = 1 - prob it is theirs to the last bit: of 10 patches, prob 0.9 keeps
    int(0.9999...) = 0, so one.
    """
    return max(1, int(num_tokens * keep))


def grid_side(num_tokens: int) -> int:
    """Rows (= columns) of a square grid of patches. Raises ValueError if there is no such grid."""
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(
            f"{num_tokens} patches are no square grid, which image_tokens=grid, block and "
            "attentive need: image_tokens=random takes any number"
        )
    return side
