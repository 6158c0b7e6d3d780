"""One tile of logits in plain torch: any device, any floating type.

Letters: R x C the tile, D embedding width. rows: (R, D), already times the scale.  columns: (C, D).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def log_sum_exps(
    rows: Tensor, columns: Tensor, *, own: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log sum exp of the logits over columns, (R,), and over rows, (C,); and the diagonal, (R,).

    own: row i and column i are a pair; otherwise there is no diagonal. It comes from the same
    product as the sums, so that what the product rounds cancels between them.
    """
    logits = rows @ columns.T
    diagonal = logits.diagonal().clone() if own else None
    # exp(100) overflows float32, so each line is shifted by its own maximum.
    highest = logits.amax(1)
    over_columns = (logits - highest[:, None]).exp_().sum(1).log_().add_(highest)
    highest = logits.amax(0)
    over_rows = logits.sub_(highest).exp_().sum(0).log_().add_(highest)
    return over_columns, over_rows, diagonal


def softmax_weights(
    rows: Tensor,
    columns: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
) -> Tensor:
    """(R, C): row_weight times the softmax along rows plus column_weight times that along columns.

    row_lse, row_weight: (R,).  column_lse, column_weight: (C,).
    """
    logits = rows @ columns.T
    weights = (logits - row_lse[:, None]).exp_().mul_(row_weight[:, None])
    return weights.addcmul_(logits.sub_(column_lse).exp_(), column_weight)


def sigmoid_losses(rows: Tensor, columns: Tensor, bias: Tensor, *, own: bool) -> Tensor:
    """(R,): -log sigmoid(y (logit + bias)) summed over columns.

    bias: scalar.  own: row i and column i are a pair (y = 1); otherwise no two are (y = -1).
    """
    signed = torch.addmm(bias, rows, columns.T).neg_()
    if own:
        signed.diagonal().neg_()
    return F.logsigmoid(signed).sum(1).neg_()


def sigmoid_weights(rows: Tensor, columns: Tensor, bias: Tensor, *, own: bool) -> Tensor:
    """(R, C): the derivative of `sigmoid_losses` by each logit."""
    signed = torch.addmm(bias, rows, columns.T)
    if own:
        signed.diagonal().neg_()
    weights = signed.sigmoid_()
    if own:
        weights.diagonal().neg_()
    return weights
