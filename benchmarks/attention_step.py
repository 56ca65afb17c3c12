"""One layer's attention at one decode step: on the dense cache, on the packed one, and decompressed."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx import PackedTensor, PackPolicy, cache_bytes, pack
from attnpack_fx.step_cost import attention_arguments
from benchmarks import measure

#: Tokens appended since the cache was packed; they are dense.
APPENDED = 16
#: How long one sample lasts at least: short, so that many fall between disturbances.
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Case:
    """One attention shape. rank: of keys and values; the contents have half of it, so nothing is lost."""

    batch: int
    tokens: int
    dtype: torch.dtype = torch.float32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    rank: tuple[int, int] = (64, 64)


def default_cases() -> list[Case]:
    """Multi-head shapes of LLaVA-1.5-7B, and grouped-query shapes."""
    shapes = [(1, 512), (1, 1024), (1, 4096), (1, 8192), (8, 512), (8, 1024), (8, 4096)]
    dtypes = (torch.float32, torch.bfloat16)
    many = [Case(batch, tokens, dtype) for dtype in dtypes for batch, tokens in shapes]
    grouped = [Case(batch, tokens, dtype, kv_heads=8) for dtype in dtypes for batch, tokens in [(1, 4096), (8, 1024)]]
    return many + grouped


@torch.no_grad()
def run(case: Case, rounds: int) -> dict[str, Any]:
    """Time the contenders on one case; seconds per call, cache bytes, and the ratio of dense to packed.

    Appending the new token is not included. Raises RuntimeError when the contenders' results differ.
    """
    generator = torch.Generator().manual_seed(0)
    key, value = (_cache(case, rank, generator) for rank in case.rank)
    key, value = _packed(key, value, case, generator)
    dense_key, dense_value = key.dense(), value.dense()
    query = torch.randn(case.batch, case.heads, 1, case.head_dim, generator=generator).to(case.dtype)
    grouped = case.heads != case.kv_heads
    arguments = attention_arguments(query, key.parts, value.parts)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, dense_key, dense_value, enable_gqa=grouped)

    def packed() -> Tensor:
        return torch.ops.attnpack.attention(*arguments)

    def decompressed() -> Tensor:
        return F.scaled_dot_product_attention(query, key.dense(), value.dense(), enable_gqa=grouped)

    contenders = {"dense": dense, "packed": packed, "decompressed": decompressed}
    errors = {name: measure.difference(function(), dense()) for name, function in contenders.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= measure.TOLERANCE[case.dtype]:
        raise RuntimeError(f"{case}: {worst} differs from dense attention by {errors[worst]:.1e} of its scale")
    repeats = {name: measure.repeats_for(function, _SAMPLE_SECONDS) for name, function in contenders.items()}
    timed = measure.in_turn(contenders, rounds, repeats)
    seconds = {name: measure.summary(samples) for name, samples in timed.items()}
    return {
        **asdict(case),
        "dtype": str(case.dtype).removeprefix("torch."),
        "seconds": seconds,
        "error": errors,
        "bytes": {"dense": cache_bytes((dense_key, dense_value)), "packed": cache_bytes((key, value))},
        "speedup": seconds["dense"]["median"] / seconds["packed"]["median"],
        "speedup_over_decompressed": seconds["decompressed"]["median"] / seconds["packed"]["median"],
    }


def _cache(case: Case, rank: int, generator: torch.Generator) -> Tensor:
    tokens = case.tokens - APPENDED
    return measure.low_rank(case.batch, case.kv_heads, tokens, case.head_dim, rank // 2, case.dtype, generator)


def _packed(key: Tensor, value: Tensor, case: Case, generator: torch.Generator) -> tuple[PackedTensor, PackedTensor]:
    """The cache as prefill leaves it, and tokens appended to it."""
    packed = pack(key, value, PackPolicy(text_rank=case.rank))
    if any(tensor.ranks != {"text": rank} for tensor, rank in zip(packed, case.rank, strict=True)):
        raise RuntimeError(f"{case}: packing at these ranks saves nothing, or there are too few tokens for them")
    shape = (case.batch, case.kv_heads, APPENDED, case.head_dim)
    new_key, new_value = (torch.randn(shape, generator=generator).to(case.dtype) for _ in packed)
    return packed[0].append(new_key), packed[1].append(new_value)
