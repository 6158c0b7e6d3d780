"""How alike two representations of the same items are (CKA, arXiv:1905.00414; matching of unpaired
ones, arXiv:2401.05224).

Letters: N items, D and E widths.
"""

import torch
from scipy.optimize import quadratic_assignment
from torch import Tensor


def cka(first: Tensor, second: Tensor) -> float:
    """Linear CKA in [0, 1]: 1 for equal up to rotation, reflection, scale and shift.

    first: (N, D), second: (N, E). Time N D E. Biased upwards where N is not much above D and E.
    """
    x, y = (part.double() - part.double().mean(0) for part in (first, second))
    cross = (x.T @ y).square().sum()
    own = (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross / own) if own else 0.0


def unbiased_hsic(first: Tensor, second: Tensor) -> float:
    """HSIC of linear kernels without the bias of small N (Song et al., 2012, eq. 5); the mean over
    minibatches estimates that of all. N >= 4.
    """
    count = len(first)
    if count < 4:
        raise ValueError(f"{count} items: the unbiased HSIC needs 4")
    k, m = (part.double() @ part.double().T for part in (first, second))
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    ones = torch.ones(count, dtype=torch.float64)
    found = (k * m).sum() + (ones @ k @ ones) * (ones @ m @ ones) / ((count - 1) * (count - 2))
    found -= 2 / (count - 2) * (ones @ k @ m @ ones)
    return float(found / (count * (count - 3)))


def matched(first: Tensor, second: Tensor, known: Tensor) -> Tensor:
    """(N,) int64: for each item of `first` the item of `second` that keeps the inner products
    alike: max_P tr(K P L P^T), by the FAQ method from some known pairs.

    known: (S, 2) int64, a row of `first` and its row of `second`; without some the search ends in a
    poor local optimum. Time N^3.
    """
    k, m = (part.double() - part.double().mean(0) for part in (first, second))
    found = quadratic_assignment(
        (k @ k.T).numpy(),
        (m @ m.T).numpy(),
        method="faq",
        options={"maximize": True, "partial_match": known.numpy()},
    )
    return torch.from_numpy(found.col_ind).long()
