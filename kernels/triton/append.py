"""New keys and values written into their tails' spare rows, in one launch.

tail[position + j, b, h] = new[b, h, j]
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from attnpack_fx.kernels.triton.launch import VARYING, block, cdiv

#: Token rows that one program copies.
ROWS = 8


def append_(tails: Sequence[Tensor], new: Sequence[Tensor], positions: Sequence[int]) -> None:
    """See `ops.append_`. Two at a time, if their sizes agree but for the head dim, as those of keys and values do."""
    rest = []
    for tail, tokens, position in zip(tails, new, positions, strict=True):
        _check_rows(tail, tokens.shape[2], position)
        if tail.is_contiguous():
            rest.append((tail, tokens, position))
        else:  # written where it lies, so it cannot be made contiguous first
            tail.narrow(0, position, tokens.shape[2]).copy_(tokens.permute(2, 0, 1, 3))
    while rest:
        first, *rest = rest
        pair = bool(rest) and rest[0][1].shape[:3] == first[1].shape[:3]
        # Where there is no second, its arguments are not read. Not the first tail: a kernel's mutated arguments must
        # not be aliases.
        second = rest.pop(0) if pair else (first[1], first[1], 0)
        _append_pair(first, second, pair)


def _check_rows(tail: Tensor, count: int, position: int) -> None:
    """A kernel would write beyond the end. Symbolic sizes are the runtime's, which makes room before each step."""
    known = all(isinstance(size, int) for size in (tail.shape[0], count, position))
    if known and not 0 <= position <= tail.shape[0] - count:
        raise IndexError(
            f"attnpack::append_: got {count} tokens for rows {position} to {position + count - 1} of a tail with "
            f"{tail.shape[0]} rows, expected rows that exist; make room first"
        )


def _append_pair(first: tuple[Tensor, Tensor, int], second: tuple[Tensor, Tensor, int], pair: bool) -> None:
    samples, heads, count, dim = first[1].shape
    dims = dim, second[1].shape[3]
    news = [new if new.stride(3) == 1 else new.contiguous() for new in (first[1], second[1])]
    rows = samples * heads * count
    wrap_triton(append_kernel)[(cdiv(rows, ROWS),)](
        tail0=first[0],
        tail1=second[0],
        new0=news[0],
        new1=news[1],
        position0=first[2],
        position1=second[2],
        samples=samples,
        heads=heads,
        dim0=dims[0],
        dim1=dims[1],
        sample0=news[0].stride(0),
        head0=news[0].stride(1),
        token0=news[0].stride(2),
        sample1=news[1].stride(0),
        head1=news[1].stride(1),
        token1=news[1].stride(2),
        rows=rows,
        PAIR=pair,
        BLOCK_ROWS=ROWS,
        BLOCK_D=max(map(block, dims)),
        num_warps=4,
    )


@triton.jit(do_not_specialize=VARYING)
def append_kernel(
    tail0,  # [rows, B, H, D]
    tail1,
    new0,  # [B, H, k, D]
    new1,
    position0,
    position1,
    samples,
    heads,
    dim0,
    dim1,
    sample0,  # strides of new0
    head0,
    token0,
    sample1,
    head1,
    token1,
    rows,  # k * B * H
    PAIR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    number = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    token, sample, head = number // (samples * heads), number // heads % samples, number % heads
    columns = tl.arange(0, BLOCK_D)
    there = (number < rows)[:, None]
    cells = there & (columns < dim0)[None, :]
    source = sample * sample0 + head * head0 + token * token0
    row = tl.load(new0 + source[:, None] + columns[None, :], mask=cells)
    target = ((token + position0) * samples + sample) * heads + head
    tl.store(tail0 + target[:, None] * dim0 + columns[None, :], row, mask=cells)
    if PAIR:
        cells = there & (columns < dim1)[None, :]
        source = sample * sample1 + head * head1 + token * token1
        row = tl.load(new1 + source[:, None] + columns[None, :], mask=cells)
        target = ((token + position1) * samples + sample) * heads + head
        tl.store(tail1 + target[:, None] * dim1 + columns[None, :], row, mask=cells)
