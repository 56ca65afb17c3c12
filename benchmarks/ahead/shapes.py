"""Decode steps and packing of one layer by shape, as the operators launch them outside a compiled graph.

    python -m benchmarks.ahead.shapes                       # a table for every shape and capability
    python -m benchmarks.ahead.shapes --json out.json --capability 90

More corners of the kernels than models reach in the time there is. Triton itself decides how arguments are specialised:
its launches are stopped where they would compile.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton import knobs

from attnpack_fx.kernels.linalg import sketch_size
from attnpack_fx.kernels.parts import E4M3, Angles, Block, PackedParts, RowForm, Rows, Segment
from attnpack_fx.kernels.triton import KERNELS
from attnpack_fx.kernels.triton.append import append_
from attnpack_fx.kernels.triton.attend import attention, takes
from attnpack_fx.kernels.triton.gather import gather_tokens
from attnpack_fx.kernels.triton.jacobi import left_singular_vectors
from attnpack_fx.kernels.triton.launch import cdiv
from benchmarks.ahead.compiled import LIMITS, USUAL, Capability, Facts, capability_of, facts_of
from benchmarks.ahead.pretend import pretending
from benchmarks.ahead.tables import as_json, table


@dataclass(frozen=True)
class Shape:
    """A decode step. tokens: of each packed segment; rotated: dims rotated in the op, for keys before rotary.

    axes, positions: of multimodal rotary embedding; without axes, every token has cos and sin of its own.
    blocks: of every segment, each of the whole rank: bits of coefficient and basis, whether they have zero points.
    coded: tokens and forms, of keys and values, of a further segment of coded rows.
    """

    batch: int = 1
    heads: int = 32
    kv_heads: int = 32
    dim: int = 128
    tokens: tuple[int, ...] = (576,)
    rank: int = 64
    tail: int = 66
    queries: int = 1
    dtype: torch.dtype = torch.bfloat16
    rotated: int = 0
    interleaved: bool = False
    axes: int = 0
    positions: int = 0
    mask: bool = False
    weights: bool = False
    cap: float = 0.0
    sinks: bool = False
    blocks: tuple[tuple[int, int, bool], ...] = ()
    coded: tuple[int, tuple[RowForm, RowForm]] | None = None


#: Shapes of the models the library is for, and the corners of what the kernels take.
SHAPES = {
    "LLaVA-1.5-7B": Shape(),
    "LLaVA-1.5-7B, batch 64": Shape(batch=64),
    "LLaVA-1.5-7B, dense rows alone": Shape(tokens=()),
    "LLaVA-1.5-13B, 16 images, batch 64": Shape(batch=64, heads=40, kv_heads=40, tokens=(4096,)),
    "Qwen2.5-VL-7B": Shape(heads=28, kv_heads=4, tokens=(9216,), mask=True),
    "Qwen2.5-VL-7B, one image": Shape(heads=28, kv_heads=4, tokens=(576,)),
    "Qwen3-VL-8B, two segments": Shape(heads=32, kv_heads=8, tokens=(9216, 640)),
    "Qwen3-VL-8B, prompt of 64 tokens": Shape(heads=32, kv_heads=8, tokens=(9216,), queries=64),
    "rank 16": Shape(tokens=(32768,), rank=16),
    "rank 128": Shape(tokens=(32768,), rank=128),
    "rank 256, head dim 256": Shape(heads=16, kv_heads=8, dim=256, tokens=(4096,), rank=256),
    "fp32": Shape(tokens=(4096,), dtype=torch.float32),
    "fp16, head dim 80, weights": Shape(dim=80, tokens=(4096,), dtype=torch.float16, weights=True),
    "un-rotated keys, rank 16": Shape(tokens=(9216,), rank=16, rotated=128),
    "un-rotated keys, rank 64, GQA": Shape(heads=32, kv_heads=8, tokens=(9216,), rotated=128),
    "un-rotated keys, rank 16, M-RoPE": Shape(tokens=(9216,), rank=16, rotated=128, axes=2, positions=192),
    "un-rotated keys of Qwen2.5-VL-7B, M-RoPE": Shape(
        heads=28, kv_heads=4, tokens=(9216, 640), rank=64, rotated=128, axes=3, positions=200, mask=True
    ),
    "LLaVA-1.5-7B, 4 bits": Shape(blocks=((4, 4, False),)),
    "LLaVA-1.5-7B, 4 bits, batch 64": Shape(batch=64, blocks=((4, 4, False),)),
    "Qwen3-VL-8B, 4 bits, two segments": Shape(heads=32, kv_heads=8, tokens=(9216, 640), blocks=((4, 4, False),)),
    "Qwen3-VL-8B, 8 and 2 bits": Shape(
        heads=32, kv_heads=8, tokens=(9216,), blocks=((8, 8, False), (2, 2, False)), mask=True, weights=True
    ),
    "E4M3 coefficients": Shape(tokens=(9216,), blocks=((E4M3, 0, False),)),
    "rank 128, 4 bits with zero points": Shape(tokens=(9216,), rank=128, blocks=((4, 4, True),), dtype=torch.float16),
    "LLaVA-1.5-7B, KIVI's rows in 2 bits": Shape(
        tokens=(), coded=(9216, (RowForm(2, channel=True, zero=True), RowForm(2, group=32, zero=True)))
    ),
    "Qwen3-VL-8B, KIVI's rows in 4 bits": Shape(
        heads=32,
        kv_heads=8,
        tokens=(),
        coded=(9216, (RowForm(4, channel=True, zero=True), RowForm(4, group=32, zero=True))),
    ),
    "Qwen3-VL-8B, 4 bits, coded rows of text": Shape(
        heads=32,
        kv_heads=8,
        tokens=(9216,),
        blocks=((4, 4, False),),
        mask=True,
        weights=True,
        coded=(640, (RowForm(4, channel=True, codebook=True, norm=True), RowForm(E4M3, group=128))),
    ),
    "LLaVA-1.5-7B, 4 bits, un-rotated keys": Shape(blocks=((4, 4, False),), rotated=128),
    "Qwen3-VL-8B, 4 bits, un-rotated keys, M-RoPE": Shape(
        heads=32,
        kv_heads=8,
        tokens=(9216, 640),
        blocks=((4, 4, False),),
        rotated=128,
        axes=3,
        positions=200,
        mask=True,
    ),
    "un-rotated keys, partial rotary, 8 and 2 bits": Shape(
        dim=80, tokens=(4096,), rank=32, rotated=32, blocks=((8, 8, False), (2, 2, True)), dtype=torch.float16
    ),
    "un-rotated keys, partial rotary": Shape(dim=80, tokens=(4096,), rank=32, rotated=32, interleaved=True),
    "Gemma-2-9B, soft cap": Shape(heads=16, kv_heads=8, dim=256, tokens=(4096,), cap=50.0, mask=True),
    "gpt-oss-20b, sinks": Shape(heads=64, kv_heads=8, dim=64, tokens=(4096,), sinks=True, mask=True),
    "sinks, one launch": Shape(heads=64, kv_heads=8, dim=64, tokens=(64,), rank=16, sinks=True),
    "un-rotated keys, soft cap and sinks": Shape(tokens=(9216,), rank=16, rotated=128, cap=50.0, sinks=True),
    "4 bits, soft cap and sinks": Shape(blocks=((4, 4, False),), cap=50.0, sinks=True),
}


class Launch(NamedTuple):
    """One kernel launch, as data: what Triton compiles for it; attributes: what it knows of arguments."""

    kernel: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    warps: int
    stages: int


def launches(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Launch]:
    """The kernels that `function` launches on fake GPU tensors, in order. Triton decides what it would compile."""
    found: list[Launch] = []

    def instead(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        sizes = compile["num_warps"], compile["num_stages"]
        found.append(Launch(fn.name, compile["signature"], compile["constants"], compile["configs"][0], *sizes))
        return True  # and nothing is compiled, nor launched

    with (
        pretending(),
        set_wrap_triton_enabled(False),
        mock.patch.object(knobs.runtime, "jit_cache_hook", instead),
        mock.patch.object(FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.element_size()),
    ):
        function(*arguments)
    return found


def decode_step(shape: Shape) -> list[Launch]:
    """What one layer launches in one decode step beside its projections: append, and attention."""
    with FakeTensorMode():

        def new(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="cuda")

        batch, heads, dim = shape.batch, shape.kv_heads, shape.dim
        tail = new(shape.tail + 16, batch, heads, dim)
        packed = sum(shape.tokens) + (shape.coded[0] if shape.coded else 0)
        index = new(batch, packed + shape.tail // 2, dtype=torch.int64)
        slots = packed + shape.tail
        mask = new(batch, 1, 1, slots, dtype=torch.bool) if shape.mask else None
        angles: Angles[Tensor] | None = None
        if shape.rotated:
            rows = shape.positions if shape.axes else packed
            cos, sin = (new(batch, rows, shape.rotated // 2, dtype=torch.float32) for _ in range(2))
            axes = new(batch, shape.axes, packed, dtype=torch.int64) if shape.axes else None
            angles = Angles(cos, sin, axes, shape.interleaved)
        keys, values = (
            PackedParts(_segments(shape, side, new), tail.clone(), shape.tail, index, ragged=shape.mask)
            for side in range(2)
        )
        keys = replace(keys, angles=angles)
        query = new(batch, shape.heads, shape.queries, dim)
        sinks = new(1, shape.heads) if shape.sinks else None
        fresh = new(batch, heads, 1, dim)

        def step(query: Tensor, keys: PackedParts[Tensor], values: PackedParts[Tensor]) -> Any:
            append_([keys.tail, values.tail], [fresh, fresh.clone()], [shape.tail - 1, shape.tail - 1])
            assert takes(query, keys, values), "a shape that the kernels refuse"
            return attention(query, keys, values, mask, 0.1, shape.cap, sinks, shape.weights)

        return launches(step, (query, keys, values))


def _segments(shape: Shape, side: int, new: Callable[..., Tensor]) -> tuple[Segment[Tensor], ...]:
    """Of keys (side 0) or values (1)."""
    found = [Segment(tuple(_blocks(shape, tokens, new))) for tokens in shape.tokens]
    if shape.coded:
        tokens, form = shape.coded[0], shape.coded[1][side]
        size = shape.batch, tokens, shape.kv_heads
        shared = shape.batch, cdiv(tokens, 32), shape.kv_heads, shape.dim
        scale = new(*shared) if form.channel else new(*size, cdiv(shape.dim, form.group))
        rows = Rows(
            form,
            _codes(new(*size, shape.dim), form.bits),
            scale,
            zero=scale if form.zero else None,
            group_of=new(shape.batch, tokens, dtype=torch.int32) if form.channel else None,
            codebook=new(2**form.bits, dtype=torch.float32) if form.codebook else None,
            norm=new(*size) if form.norm else None,
        )
        found.append(Segment((rows,)))
    return tuple(found)


def _blocks(shape: Shape, tokens: int, new: Callable[..., Tensor]) -> Iterator[Block[Tensor]]:
    for bits, basis_bits, asymmetric in shape.blocks or ((0, 0, False),):
        coefficient = _codes(new(shape.batch, tokens, shape.rank), bits)
        basis = _codes(new(shape.batch, shape.kv_heads, shape.rank, shape.dim), basis_bits)
        scaled = bits or basis_bits
        scale = new(shape.batch, 4 if asymmetric else 2, shape.rank, dtype=torch.float32) if scaled else None
        yield Block(coefficient, basis, scale, bits, None, basis_bits, asymmetric)


def _codes(x: Tensor, bits: int) -> Tensor:
    """What a factor is stored as."""
    return x if bits == 0 else x.new_empty((*x.shape[:-1], x.shape[-1] * min(bits, 8) // 8), dtype=torch.uint8)


def packing(shape: Shape) -> list[Launch]:
    """The kernels among what packs one layer's keys or values at prefill; the rest is library products."""
    with FakeTensorMode():
        tokens = sum(shape.tokens)
        dense = torch.empty((shape.batch, shape.kv_heads, tokens, shape.dim), dtype=shape.dtype, device="cuda")
        index = torch.empty((shape.batch, tokens), dtype=torch.int64, device="cuda")
        size = sketch_size(shape.rank)
        factor = torch.empty((shape.batch, size, size), dtype=torch.float32, device="cuda")
        gathered = launches(lambda x, chosen: gather_tokens([x], chosen), (dense, index))
        return gathered + launches(lambda x: left_singular_vectors(x, shape.rank), (factor,))


def inspect(launch: Launch, capability: Capability) -> Facts:
    """Compile one launch for one capability and read the result."""
    kernel = next(each for each in KERNELS if each.__name__ == launch.kernel)
    source = triton.compiler.ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    binary = triton.compile(source, target=LIMITS[capability].target(capability), options=options)
    return facts_of(Facts(launch.kernel, capability), binary)


def survey(
    capabilities: Sequence[Capability], names: Sequence[str] | None = None, workers: int = 2
) -> Iterator[tuple[str, Facts]]:
    """Every launch of the named shapes (all unless given) that is compiled anew, with its first shape."""
    jobs, seen = [], set()
    for name in names or SHAPES:
        for launch in packing(SHAPES[name]) + decode_step(SHAPES[name]):
            # The same kernel with the same kinds of arguments is the same code.
            if repr(launch) not in seen:
                seen.add(repr(launch))
                jobs += [(name, launch, capability) for capability in capabilities]
    # Not forked: the parent's threads would be missing in the child.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        shapes, *rest = zip(*jobs, strict=True)
        yield from zip(shapes, pool.map(inspect, *rest), strict=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=capability_of, choices=LIMITS, nargs="+", default=USUAL)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", help="all unless given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the facts")
    parser.add_argument("--workers", type=int, default=2, help="compiling processes (2)")
    given = parser.parse_args(arguments)
    rows = list(survey(given.capability, given.shape, given.workers))
    sys.stdout.write(table(rows) + "\n")
    if given.json:
        given.json.write_text(as_json(rows))


if __name__ == "__main__":
    main()
