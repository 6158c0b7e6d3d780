"""One tile of logits on a GPU, fused: a logit lives in registers until it is a sum or a weight.

The functions of `torch_tiles`, for float32. Each program computes BLOCK_ROWS x BLOCK_COLUMNS logits
(any D) and finishes them there: sums leave as one partial result a program and are joined after,
without atomics, so that equal inputs give equal bits. The products with the weights are cuBLAS's.
TensorFloat-32 is used exactly where torch's own float32 products use it.
Letters: R x C the tile, D embedding width. rows: (R, D), already times the scale.  columns: (C, D).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _place(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """This program's place in the grid, its row indices and its column indices."""
    # Eight blocks of rows share each block of columns while that is in the cache.
    GROUP: tl.constexpr = 8
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    column_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    first = program // (GROUP * column_blocks) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    row_block = first + within % height
    column_block = within // height
    r = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return row_block, column_block, r, c


@triton.jit
def _logits(
    rows,
    columns,
    r,
    c,
    num_rows,
    num_columns,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        d = start + tl.arange(0, BLOCK_WIDTH)
        row_part = tl.load(
            rows + r[:, None] * width + d[None, :],
            mask=(r[:, None] < num_rows) & (d[None, :] < width),
            other=0.0,
        )
        column_part = tl.load(
            columns + c[None, :] * width + d[:, None],
            mask=(c[None, :] < num_columns) & (d[:, None] < width),
            other=0.0,
        )
        logits = tl.dot(row_part, column_part, logits, input_precision=PRECISION)
    return logits


@triton.jit
def _signed(logits, bias, r, c, OWN: tl.constexpr):
    """y (logit + bias) and y."""
    shifted = logits + tl.load(bias)
    sign = tl.full(shifted.shape, -1.0, tl.float32)
    if OWN:
        sign = tl.where(r[:, None] == c[None, :], 1.0, sign)
    return shifted * sign, sign


@triton.jit
def _within(matrix, r, c, num_columns):
    # A tile of 46,341 rows has places that int32 does not hold.
    return matrix + r[:, None].to(tl.int64) * num_columns + c[None, :]


@triton.jit
def _log_sum_exps(
    rows,
    columns,
    over_columns,
    over_rows,
    diagonal,
    num_rows,
    num_columns,
    width,
    OWN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, column_block, r, c = _place(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    logits = _logits(
        rows, columns, r, c, num_rows, num_columns, width,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, PRECISION,
    )  # fmt: skip
    along = tl.where(c[None, :] < num_columns, logits, float("-inf"))
    highest = tl.max(along, 1)
    lse = highest + tl.log(tl.sum(tl.exp(along - highest[:, None]), 1))
    tl.store(over_columns + column_block * num_rows + r, lse, mask=r < num_rows)
    along = tl.where(r[:, None] < num_rows, logits, float("-inf"))
    highest = tl.max(along, 0)
    lse = highest + tl.log(tl.sum(tl.exp(along - highest[None, :]), 0))
    tl.store(over_rows + row_block * num_columns + c, lse, mask=c < num_columns)
    if OWN and row_block == column_block:
        logit = tl.sum(tl.where(r[:, None] == c[None, :], logits, 0.0), 1)
        tl.store(diagonal + r, logit, mask=r < num_rows)


@triton.jit
def _softmax_weights(
    rows,
    columns,
    row_lse,
    column_lse,
    row_weight,
    column_weight,
    weights,
    num_rows,
    num_columns,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, _, r, c = _place(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    logits = _logits(
        rows, columns, r, c, num_rows, num_columns, width,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, PRECISION,
    )  # fmt: skip
    row_inside, column_inside = r < num_rows, c < num_columns
    shift = tl.load(row_lse + r, mask=row_inside, other=0.0)[:, None]
    factor = tl.load(row_weight + r, mask=row_inside, other=0.0)[:, None]
    result = factor * tl.exp(logits - shift)
    shift = tl.load(column_lse + c, mask=column_inside, other=0.0)[None, :]
    factor = tl.load(column_weight + c, mask=column_inside, other=0.0)[None, :]
    result += factor * tl.exp(logits - shift)
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(_within(weights, r, c, num_columns), result, mask=inside)


@triton.jit
def _sigmoid_losses(
    rows,
    columns,
    bias,
    over_columns,
    num_rows,
    num_columns,
    width,
    OWN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, column_block, r, c = _place(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    logits = _logits(
        rows, columns, r, c, num_rows, num_columns, width,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, PRECISION,
    )  # fmt: skip
    signed, _ = _signed(logits, bias, r, c, OWN)
    small = tl.exp(-tl.abs(signed))
    # log(1 + small) as log1p computes it: most logits are below -10, where 1 + small is nearly 1.
    one_more = 1.0 + small
    rounded_away = one_more == 1.0
    excess = tl.where(rounded_away, 1.0, one_more - 1.0)
    log1p = tl.where(rounded_away, small, tl.log(one_more) * (small / excess))
    losses = tl.where(c[None, :] < num_columns, log1p - tl.minimum(signed, 0.0), 0.0)
    tl.store(over_columns + column_block * num_rows + r, tl.sum(losses, 1), mask=r < num_rows)


@triton.jit
def _sigmoid_weights(
    rows,
    columns,
    bias,
    weights,
    num_rows,
    num_columns,
    width,
    OWN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    _, _, r, c = _place(num_rows, num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    logits = _logits(
        rows, columns, r, c, num_rows, num_columns, width,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_WIDTH, PRECISION,
    )  # fmt: skip
    signed, sign = _signed(logits, bias, r, c, OWN)
    inside = (r[:, None] < num_rows) & (c[None, :] < num_columns)
    tl.store(_within(weights, r, c, num_columns), -sign * tl.sigmoid(-signed), mask=inside)


def runs_on(device: torch.device) -> bool:
    """Compiled kernels run on CUDA, interpreted ones anywhere."""
    return device.type == "cuda" or not isinstance(_log_sum_exps, triton.JITFunction)


def _torch_uses_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # Before torch 2.9 there was only the flag, and after it reading the flag may raise.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


class _Grid:
    """How a tile is cut into programs."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        tf32 = rows.is_cuda and _torch_uses_tf32()
        # Without tensor cores a larger block spills its registers.
        block = 128 if tf32 else 64
        self.size = (len(rows), len(columns), rows.shape[1])
        self.row_blocks = triton.cdiv(len(rows), block)
        self.column_blocks = triton.cdiv(len(columns), block)
        self.programs = (self.row_blocks * self.column_blocks,)
        self.options = {
            "BLOCK_ROWS": block,
            "BLOCK_COLUMNS": block,
            "BLOCK_WIDTH": 32,
            "PRECISION": "tf32" if tf32 else "ieee",
            "num_warps": 8 if tf32 else 4,
        }


def log_sum_exps(
    rows: Tensor, columns: Tensor, *, own: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `torch_tiles.log_sum_exps`."""
    grid = _Grid(rows, columns)
    over_columns = rows.new_empty(grid.column_blocks, len(rows))
    over_rows = rows.new_empty(grid.row_blocks, len(columns))
    diagonal = rows.new_empty(len(rows) if own else 0)
    _log_sum_exps[grid.programs](
        rows, columns, over_columns, over_rows, diagonal, *grid.size, OWN=own, **grid.options
    )
    return over_columns.logsumexp(0), over_rows.logsumexp(0), diagonal if own else None


def softmax_weights(
    rows: Tensor,
    columns: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
) -> Tensor:
    """As `torch_tiles.softmax_weights`."""
    grid = _Grid(rows, columns)
    weights = rows.new_empty(len(rows), len(columns))
    statistics = (row_lse, column_lse, row_weight, column_weight)
    _softmax_weights[grid.programs](rows, columns, *statistics, weights, *grid.size, **grid.options)
    return weights


def sigmoid_losses(rows: Tensor, columns: Tensor, bias: Tensor, *, own: bool) -> Tensor:
    """As `torch_tiles.sigmoid_losses`."""
    grid = _Grid(rows, columns)
    over_columns = rows.new_empty(grid.column_blocks, len(rows))
    _sigmoid_losses[grid.programs](
        rows, columns, bias, over_columns, *grid.size, OWN=own, **grid.options
    )
    return over_columns.sum(0)


def sigmoid_weights(rows: Tensor, columns: Tensor, bias: Tensor, *, own: bool) -> Tensor:
    """As `torch_tiles.sigmoid_weights`."""
    grid = _Grid(rows, columns)
    weights = rows.new_empty(len(rows), len(columns))
    _sigmoid_weights[grid.programs](
        rows, columns, bias, weights, *grid.size, OWN=own, **grid.options
    )
    return weights
