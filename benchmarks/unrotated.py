"""One layer's attention at one decode step over keys kept before rotary embedding, beside the ways they compete with.

    python -m benchmarks.unrotated                        # shapes of LLaVA-1.5-7B, and grouped queries
    python -m benchmarks.unrotated --out unrotated.json --batch 1 --tokens 2025 --dtype bf16

dense: scaled_dot_product_attention on the dense cache. rotated: the packed operator on keys as they are attended, at
rank 64. 1-D: un-rotated keys under rotary embedding with one position per token. M-RoPE: under that of Qwen2.5-VL, with
the positions of one image. Un-rotated keys at rank 16 are about as faithful as rotated ones at rank 64.

Contenders take turns. Every one is compared with dense attention to the keys it stands for before any timing. Times are
milliseconds, medians of all rounds; ratios are dense over the contender.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx.kernels import ops
from attnpack_fx.kernels.aten.unrotated import scores
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import Angles, Block, PackedParts, Segment
from attnpack_fx.kernels.rotary import per_slot, rotate
from attnpack_fx.kernels.rotary_axes import tabulate
from benchmarks import measure
from benchmarks.arguments import positive

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTENDERS = ("dense", "rotated R=64", "1-D R=16", "1-D R=64", "M-RoPE R=16", "M-RoPE R=64")
_THETA = 1e6
_SECTIONS = (16, 24, 24)  # frequencies of time, rows and columns in Qwen2.5-VL, of 64
#: How long one sample lasts at least.
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Case:
    """One attention shape; tokens: rounded down to a whole number of rows of a nearly square image."""

    batch: int
    tokens: int
    dtype: torch.dtype = torch.float32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128


def default_cases() -> list[Case]:
    shapes = [(1, 1024, 32), (1, 2048, 32), (1, 8192, 32), (8, 1024, 32), (8, 2048, 32), (1, 8192, 8), (8, 2048, 8)]
    return [Case(batch, tokens, dtype, kv_heads=heads) for dtype in DTYPES.values() for batch, tokens, heads in shapes]


@torch.no_grad()
def run(case: Case, rounds: int) -> dict[str, Any]:
    """Time the contenders on one case: seconds per call, and ratios of dense to each.

    Raises RuntimeError when one's result differs from dense attention to the same keys.
    """
    random = torch.Generator().manual_seed(0)
    batch, heads, dim, dtype = case.batch, case.kv_heads, case.head_dim, case.dtype
    width = math.isqrt(case.tokens)
    tokens = case.tokens // width * width

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(dtype)

    query, scale = normal(batch, case.heads, 1, dim), 1 / math.sqrt(dim)
    grouped = case.heads != heads
    plain, split = _rotary(tokens, width, dim, dtype, one_axis=True), _rotary(tokens, width, dim, dtype, one_axis=False)
    contenders: dict[str, Callable[[], Tensor]] = {}
    errors = {}

    def add(name: str, function: Callable[[], Tensor], key: Tensor, value: Tensor) -> None:
        contenders[name] = function
        expected = F.scaled_dot_product_attention(query.double(), key, value, enable_gqa=grouped)
        errors[name] = measure.difference(function(), expected)
        if not errors[name] <= measure.TOLERANCE[dtype]:
            raise RuntimeError(f"{case}: {name} differs from dense attention by {errors[name]:.1e} of its scale")

    dense_key, dense_value = normal(batch, heads, tokens, dim), normal(batch, heads, tokens, dim)
    add(
        "dense",
        lambda: F.scaled_dot_product_attention(query, dense_key, dense_value, enable_gqa=grouped),
        dense_key.double(),
        dense_value.double(),
    )
    for rank in (64, 16):
        key, value = ((normal(batch, tokens, rank), normal(batch, heads, rank, dim) / rank**0.5) for _ in range(2))
        expanded = value[0].double()[:, None] @ value[1].double()
        rebuilt = key[0].double()[:, None] @ key[1].double()
        if rank == 64:
            add("rotated R=64", _rotated(query, key, value, scale), rebuilt, expanded)
        for kind, rotary in (("1-D", plain), ("M-RoPE", split)):
            cos, sin = per_slot(rotary, 0, tokens)
            turned = rotate(rebuilt, cos.double(), sin.double(), False)
            add(f"{kind} R={rank}", _unrotated(query, key, value, rotary, scale), turned, expanded)
    contenders = {name: contenders[name] for name in CONTENDERS}
    repeats = {name: measure.repeats_for(function, _SAMPLE_SECONDS) for name, function in contenders.items()}
    timed = measure.in_turn(contenders, rounds, repeats)
    seconds = {name: measure.summary(samples) for name, samples in timed.items()}
    return {
        **asdict(case),
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "error": errors,
        "speedup": {name: seconds["dense"]["median"] / each["median"] for name, each in seconds.items()},
    }


def _rotary(tokens: int, width: int, dim: int, dtype: torch.dtype, one_axis: bool) -> Angles[Tensor]:
    """Of text, or of an image `width` tokens wide after 16 tokens of text."""
    place = torch.arange(tokens)
    coordinates = [place] * 3 if one_axis else [torch.zeros_like(place), place // width, place % width]
    pairs = dim // 2
    sections = torch.tensor(_SECTIONS) * pairs // sum(_SECTIONS)
    owner = torch.arange(3).repeat_interleave(sections)
    owner = torch.cat([owner, owner.new_full((pairs - owner.shape[0],), 2)])
    frequency = _THETA ** (-torch.arange(pairs) / pairs)
    angles = (torch.stack(coordinates)[owner] + 16).T * frequency
    cos, sin = angles[None].cos().to(dtype), angles[None].sin().to(dtype)
    if one_axis:
        return Angles(cos, sin, None, False)
    found = tabulate(cos, sin)
    if found is None:
        raise RuntimeError(f"{tokens} tokens of an image {width} wide: no axes, the image is too small")
    return Angles(*found, False)


def _rotated(
    query: Tensor, key: tuple[Tensor, Tensor], value: tuple[Tensor, Tensor], scale: float
) -> Callable[[], Tensor]:
    batch, heads, _, dim = key[1].shape
    tail = query.new_empty((1, batch, heads, dim))
    index = torch.arange(key[0].shape[1]).expand(batch, -1).contiguous()
    tensors, layouts = flatten(*(PackedParts((Segment((Block(*pair),)),), tail, 0, index) for pair in (key, value)))
    return lambda: ops.attention(query, tensors, *layouts, 0, None, scale)


def _unrotated(
    query: Tensor, key: tuple[Tensor, Tensor], value: tuple[Tensor, Tensor], rotary: Angles[Tensor], scale: float
) -> Callable[[], Tensor]:
    """As the packed operator does it: scores, softmax, absorbed values."""
    batch, heads, _, dim = key[1].shape
    blocks, value_basis = [(0, key[0], key[1].flatten(0, 1))], value[1].flatten(0, 1)

    def attend() -> Tensor:
        rows = (query * scale).view(batch * heads, -1, dim)
        weights = scores(rows, blocks, rotary, batch).softmax(-1)
        latent = torch.bmm(weights, value[0]).view(batch * heads, -1, value[0].shape[2])
        return torch.bmm(latent, value_basis).view(query.shape)

    return attend


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    result: dict[str, Any] = {**measure.environment(), "unrotated": []}
    print(f"{result['cpu']}, {result['threads']} threads; torch {result['versions']['torch']}")
    print("Milliseconds, and in brackets dense over it")
    print("".join(name.rjust(18) if name in CONTENDERS else name.ljust(28) for name in ("shape", *CONTENDERS)))
    for case in cases(given):
        measured = run(case, given.rounds)
        result["unrotated"].append(measured)
        groups = f"H={case.heads}" + (f"/{case.kv_heads}" if case.heads != case.kv_heads else "")
        row = f"{measured['dtype']} B={case.batch} T={measured['tokens']} {groups}".ljust(28)
        for name, seconds in measured["seconds"].items():
            row += f"{seconds['median'] * 1e3:.2f} ({measured['speedup'][name]:.2f}x)".rjust(18)
        print(row, flush=True)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; shapes that are not given are None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every sample, and on what it was measured")
    parser.add_argument("--batch", type=positive, help="with --tokens: one case in place of the default ones")
    parser.add_argument("--tokens", type=positive)
    parser.add_argument("--dtype", choices=DTYPES, help="of query and cache (fp32)")
    parser.add_argument("--heads", type=positive, help="query heads (32)")
    parser.add_argument("--kv-heads", type=positive, help="key/value heads (as --heads)")
    parser.add_argument("--head-dim", type=positive, help="numbers per head (128)")
    parser.add_argument("--rounds", type=positive, default=15, help="samples of each contender (15)")
    parser.add_argument("--threads", type=positive, help="CPU threads (as PyTorch chooses)")
    given = parser.parse_args(arguments)
    heads = given.heads or 32
    given.kv_heads = given.kv_heads or heads
    if heads % given.kv_heads:
        parser.error(f"--kv-heads: got {given.kv_heads} with {heads} heads, expected a divisor of --heads")
    return given


def cases(given: argparse.Namespace) -> list[Case]:
    """The case asked for, or the default list."""
    if not (given.batch or given.tokens):
        return default_cases()
    dtype = DTYPES[given.dtype or "fp32"]
    heads, head_dim = given.heads or 32, given.head_dim or 128
    return [Case(given.batch or 1, given.tokens or 2048, dtype, heads, given.kv_heads, head_dim)]


if __name__ == "__main__":
    measure.restart_with_malloc_settings()
    main()
