"""What launchers decide: block sizes, and how work is split over a GPU's multiprocessors.

Ranks, head dims and head counts become block sizes, so a graph is compiled for each; numbers of tokens and of samples
stay run-time arguments, also where they are symbolic: they are compared by `sym_min` and `sym_max`, never by `if`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

#: Fewest rows or columns of a tile that tensor cores multiply.
LEAST = 16
#: Ranks or basis rows that one step takes.
BASIS_ROWS = 64
#: Programs per multiprocessor that keep its memory pipeline full.
PROGRAMS_PER_PROCESSOR = 4
#: Least bytes of coefficients that a program reads for each byte of a partial result it writes.
READ_PER_PARTIAL = 8
#: Arguments of kernels that vary with the number of tokens or of samples. Triton would compile a kernel of its own for
#: such numbers that are 1 or multiples of 16. Where Inductor launches kernels, sizes are symbols, and it does not.
VARYING = (
    *("all_rows", "all_slots", "angle_sample", "axes_sample", "coded_per_split", "coded_slot", "coded_splits", "count"),
    *("dense_splits", "first_slot0", "first_slot1", "key_count", "key_count0", "key_count1", "key_count2"),
    *("key_count3", "key_groups", "length", "mask_head", "mask_query", "mask_sample", "mask_tokens"),
    *("mixed_per_split", "mixed_splits", "packed", "position0", "position1", "positions", "rows", "rows_per_split"),
    *("samples", "shared", "slots", "splits", "splits0", "splits1", "tail_splits", "tokens0", "tokens1"),
    *("tokens_per_split", "value_count", "value_count0", "value_count1", "value_count2", "value_count3"),
    *("value_groups",),
)


def block(size: int) -> int:
    """The power of two that a dimension of a tile is padded to. Fixes symbolic sizes: a block size is compiled in."""
    return max(LEAST, 1 << (int(size) - 1).bit_length())


def cdiv(a: Any, b: Any) -> Any:
    """`ceil(a / b)` of ints or symbolic ints."""
    return (a + b - 1) // b


def per_program(total: Any, others: Any, tile: int, device: torch.device, least: int = 0) -> Any:
    """How many of `total` tokens one program takes, a multiple of `tile`, when `others` programs share each token.

    As many programs as the device runs at once, but none without a full tile; nor with fewer than `least` tokens, where
    that leaves a program for every multiprocessor.
    """
    work, count = total * others, processors(device)
    share = cdiv(work, PROGRAMS_PER_PROCESSOR * count)
    if least:
        share = torch.sym_max(share, torch.sym_min(least, cdiv(work, count)))
    return torch.sym_max(cdiv(share, tile) * tile, tile)


def least_tokens(read: int, partial: int) -> int:
    """Tokens, of `read` bytes each, that are worth a partial result of as many bytes."""
    return READ_PER_PARTIAL * cdiv(partial, read)


def combine_tile(query: Tensor, members: Any, rank: int, dim: int) -> tuple[int, int]:
    """Query rows and dims of a program of `combine`: `members` rows of a KV head, values of `rank`; blocks of both."""
    if members == 1:
        return 1, min(dim, 64 if rank <= 128 else 32)  # one row wants no tensor core
    # fp32 has none: each thread would hold all ranks of its dims.
    return LEAST, min(dim, LEAST if query.dtype == torch.float32 else 64 if rank <= 128 else 32)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; of a device that is none (Triton's interpreter): few, so that tests split."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 108 if device.type == "cuda" else 2


def strides(mask: Tensor) -> tuple[int, int, int, int]:
    """Strides of a mask `[B, Hq, Tq, T]`, zero where it is broadcast."""
    sizes, steps = mask.shape, mask.stride()
    return tuple(0 if size == 1 else step for size, step in zip(sizes, steps, strict=True))  # type: ignore[return-value]
