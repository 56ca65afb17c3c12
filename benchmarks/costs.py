"""Multiplications and bytes read by one layer's attention at one decode step, measured and by closed form.

    python -m benchmarks.costs                       # LLaVA-1.5-7B and Qwen3-VL-8B
    python -m benchmarks.costs --out costs.json

Measured on the ATen implementation of the packed operator, per sample, in bf16. Multiplications: those of matrix
products by `torch.utils.flop_counter.FlopCounterMode` (half of its operations: a product and a sum each), and those of
elementwise products by `Products`; a product of complex numbers has four. Bytes: of the operands that any operation
read, each once: factors, scales, dense rows, cos and sin; not the query, nor the placement, nor what the step itself
writes and reads again, which a fused kernel keeps in registers. The rest of the prompt and generated tokens, which cost
what they cost in dense attention, are left out: all T tokens are vision tokens.

Closed forms are the functions below, with T tokens, Hq query heads, H KV heads, head dim D, rank R, batch B and b bytes
a number. All of them include `Hq D` multiplications for the scale of the query.

Keys before rotary embedding are about as faithful at a quarter of the rank, so they stand at R and at R / 4, with
values at R. The form that the implementation chooses by itself is marked with a star.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from attnpack_fx import partial
from attnpack_fx.kernels.aten import unrotated
from attnpack_fx.kernels.aten.attention import attention
from attnpack_fx.kernels.aten.decompress import decompress
from attnpack_fx.kernels.aten.quantize import quantize
from attnpack_fx.kernels.parts import Angles, Block, PackedParts, Segment, rank_of
from attnpack_fx.kernels.rotary_axes import tabulate
from benchmarks import measure

DTYPE = torch.bfloat16
_BYTES = 2  # b
_BITS = 4
_SAMPLES = 8  # that share a basis
#: The paper's defaults: a quarter of the tokens read whole, the others at R / 4.
PARTIAL = partial.Partial()


@dataclass(frozen=True)
class Shape:
    """Attention of one layer over T vision tokens.

    rank: of keys, and of values unless value_rank is given. grid: of the image, where rotary embedding has its axes.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    rank: int
    grid: tuple[int, int] | None = None
    value_rank: int | None = None

    @property
    def width(self) -> int:
        """H D."""
        return self.kv_heads * self.head_dim


SHAPES = (
    Shape("LLaVA-1.5-7B", 32, 32, 128, 576, 64),
    Shape("Qwen3-VL-8B", 32, 8, 128, 1024, 64, (32, 32)),
    Shape("Qwen3-VL-8B", 32, 8, 128, 16384, 64, (128, 128)),
)


class Cost(NamedTuple):
    """Of one layer, one decode step and one sample."""

    multiplies: float
    bytes: float


def dense(s: Shape) -> Cost:
    """`2 Hq T D`; bytes `2 b T H D`."""
    return _cost(s, 2 * s.heads * s.tokens * s.head_dim, 2 * s.tokens * s.width)


def decompressed(s: Shape) -> Cost:
    """The paper: K and V rebuilt, then dense attention, `2 T R H D + 2 Hq T D`; bytes `2 b R (T + H D)`."""
    rebuilt = 2 * s.tokens * s.rank * s.width
    return _cost(s, rebuilt + 2 * s.heads * s.tokens * s.head_dim, 2 * s.rank * (s.tokens + s.width))


def decompressed_partial(s: Shape) -> Cost:
    """The same with partial values: with `n = sum_f t_f R_f` over groups of t_f tokens, `T R H D + n H D + 2 Hq T D`;
    bytes `b (R T + n + 2 R H D)`."""
    kept = _kept(s)
    rebuilt = (s.tokens * s.rank + kept) * s.width
    return _cost(s, rebuilt + 2 * s.heads * s.tokens * s.head_dim, s.rank * s.tokens + kept + 2 * s.rank * s.width)


def absorbed(s: Shape) -> Cost:
    """`2 Hq R (T + D)`; bytes `2 b R (T + H D)`."""
    return _cost(s, 2 * s.heads * s.rank * (s.tokens + s.head_dim), 2 * s.rank * (s.tokens + s.width))


def partial_values(s: Shape) -> Cost:
    """With `n = sum_f t_f R_f`: `Hq (R T + n + 2 R D)`; bytes `b (R T + n + 2 R H D)`."""
    read = s.rank * s.tokens + _kept(s)
    return _cost(s, s.heads * (read + 2 * s.rank * s.head_dim), read + 2 * s.rank * s.width)


def partial_both(s: Shape) -> Cost:
    """Keys too: `2 Hq (n + R D)`; bytes `2 b (n + R H D)`."""
    kept = _kept(s)
    return _cost(s, 2 * s.heads * (kept + s.rank * s.head_dim), 2 * (kept + s.rank * s.width))


def shared_basis(s: Shape) -> Cost:
    """`2 Hq R (T + D)`; bytes `2 b R (T + H D / B)`."""
    return Cost(absorbed(s).multiplies, 2 * _BYTES * s.rank * (s.tokens + s.width / _SAMPLES))


def quantised(s: Shape) -> Cost:
    """Codes times scales besides: `2 Hq R (T + D) + 2 R (T + H D)`; bytes `2 R (T + H D) bits / 8 + 16 R`."""
    numbers = 2 * s.rank * (s.tokens + s.width)
    return Cost(absorbed(s).multiplies + numbers, numbers * _BITS / 8 + 16 * s.rank)


def turned_queries(s: Shape) -> Cost:
    """Keys before rotary embedding: two matrices of `Hq R D / 2` numbers, two products each; turned by the angles of
    every token, times coefficients: `2 Hq R D + Hq R T D + Hq R T`. Values of rank Rv: `Hq Rv (T + D)`. Bytes:
    `b (R + Rv) (T + H D)` and angles."""
    keys = s.heads * s.rank * (2 * s.head_dim + s.tokens * s.head_dim + s.tokens)
    return _unrotated(s, keys)


def turned_keys(s: Shape) -> Cost:
    """Keys rebuilt and turned, four products a pair of dims: `T R H D + 2 T H D + Hq T D`. Values and bytes as
    `turned_queries`."""
    return _unrotated(s, s.tokens * (s.rank * s.width + 2 * s.width + s.heads * s.head_dim))


def tables(s: Shape) -> Cost:
    """Queries turned by the P rows of A tables instead of T tokens, then one look-up a token and axis:
    `2 Hq R D + P Hq R D + A T Hq R`. Values and bytes as `turned_queries`."""
    angles = _angles(s)
    assert angles.axes is not None
    rows, count = angles.cos.shape[1], angles.axes.shape[1]
    return _unrotated(s, s.heads * s.rank * ((2 + rows) * s.head_dim + count * s.tokens))


def _unrotated(s: Shape, keys: float) -> Cost:
    """With absorbed values; angles are `b T D` bytes, or `b P D + 8 A T` as tables."""
    angles = sum(each.nbytes for each in tree_leaves(_angles(s)) if isinstance(each, Tensor))
    values = s.value_rank or s.rank
    numbers = (s.rank + values) * (s.tokens + s.width)
    cost = _cost(s, keys + s.heads * values * (s.tokens + s.head_dim), numbers)
    return Cost(cost.multiplies, cost.bytes + angles)


def _cost(s: Shape, multiplies: float, numbers: float) -> Cost:
    return Cost(multiplies + s.heads * s.head_dim, numbers * _BYTES)


def _kept(s: Shape) -> int:
    """sum_f t_f R_f."""
    return sum(tokens * columns for tokens, columns in _blocks(s))


def _blocks(s: Shape) -> list[tuple[int, int]]:
    """Tokens and columns of each block of a segment whose groups read `PARTIAL` of it, first columns first."""
    ends = [round(sum(PARTIAL.shares[: number + 1]) * s.tokens) for number in range(len(PARTIAL.shares))]
    columns = [*PARTIAL.columns(s.rank), 0]
    return [(end, columns[number] - columns[number + 1]) for number, end in enumerate(ends)][::-1]


@dataclass(frozen=True)
class Mode:
    """One way to attend. query, keys, values: of the packed operator; decompressed: whether K and V are rebuilt before;
    form: of un-rotated scores, a function of `kernels/aten/unrotated.py`, in place of the one it would choose."""

    name: str
    shape: Shape
    closed_form: Callable[[Shape], Cost]
    query: Tensor
    keys: PackedParts[Tensor]
    values: PackedParts[Tensor]
    decompressed: bool = False
    form: str | None = None

    @property
    def chosen(self) -> bool:
        """Whether the implementation would take this form by itself."""
        if self.form is None:
            return False
        assert self.keys.angles is not None
        rows = self.query.float().view(1, self.shape.kv_heads, -1, self.shape.head_dim)
        blocks = [(block.coefficient, block.basis) for segment in self.keys.segments for block in segment.factors]
        return unrotated._form(rows, blocks, self.keys.angles).__name__ == self.form

    def __call__(self) -> Tensor:
        """`[B, Hq, 1, D]`."""
        keys, values = self.keys, self.values
        if self.decompressed:
            keys, values = (self._rebuilt(each) for each in (keys, values))
        with self._forced():
            return attention(self.query, keys, values, None, self.shape.head_dim**-0.5)[0]

    def _rebuilt(self, parts: PackedParts[Tensor]) -> PackedParts[Tensor]:
        """Dense rows alone."""
        rows = decompress(replace(parts, slot=parts.index)).permute(2, 0, 1, 3)
        return PackedParts((), rows, rows.shape[0], parts.index[:, :0])

    def _forced(self) -> AbstractContextManager[Any]:
        if self.form is None:
            return nullcontext()
        form = getattr(unrotated, self.form)
        return mock.patch.object(unrotated, "_form", lambda *_: form)

    @property
    def operands(self) -> list[Tensor]:
        """What counts as read, if it is: all tensors but the query and the placement."""
        leaves = tree_leaves((self.keys, self.values))
        return [each for each in leaves if isinstance(each, Tensor) and each is not self.keys.index]


def modes(s: Shape) -> Iterator[Mode]:
    """Every way, on random numbers."""
    make = _Maker(s)
    whole, groups = [(s.tokens, s.rank)], _blocks(s)
    yield make.dense()
    for name, closed_form, key_blocks, value_blocks, rebuilt in (
        ("decompress, then attend", decompressed, whole, whole, True),
        ("decompress, partial values", decompressed_partial, whole, groups, True),
        ("rotated", absorbed, whole, whole, False),
        ("rotated, partial values", partial_values, whole, groups, False),
        ("rotated, partial values and keys", partial_both, groups, groups, False),
    ):
        key, value = make.factors(key_blocks), make.factors(value_blocks)
        yield make.packed(name, closed_form, key, value, decompressed=rebuilt)
    key, value = (make.factors(whole, _SAMPLES) for _ in range(2))
    yield make.packed(f"rotated, basis shared by {_SAMPLES}", shared_basis, key, value)
    yield make.packed(f"rotated, {_BITS} bit", quantised, make.codes(), make.codes())
    forms = (turned_queries, turned_keys, *([] if s.grid is None else [tables]))
    for rank in (s.rank, s.rank // 4):
        for form in forms:
            key, value = make.factors([(s.tokens, rank)]), make.factors(whole)
            name = f"un-rotated keys R={rank}, {form.__name__.replace('_', ' ')}"
            yield make.packed(name, form, key, value, angles=_angles(s), form="_" + form.__name__)


class _Maker:
    """Makes modes of one shape."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._random = torch.Generator().manual_seed(0)

    def factors(self, blocks: Sequence[tuple[int, int]], samples: int = 1) -> tuple[Block[Tensor], ...]:
        """blocks: tokens and columns of each."""
        s = self._shape
        coefficients = [self._normal(samples, tokens, columns) for tokens, columns in blocks]
        bases = [self._normal(1, s.kv_heads, columns, s.head_dim) for _, columns in blocks]
        return tuple(map(Block, coefficients, bases))

    def codes(self) -> tuple[Block[Tensor], ...]:
        (plain,) = self.factors([(self._shape.tokens, self._shape.rank)])
        return (Block(*quantize(plain.coefficient, plain.basis, _BITS), _BITS),)

    def dense(self) -> Mode:
        s = self._shape
        key, value = (self._normal(s.tokens, 1, s.kv_heads, s.head_dim) for _ in range(2))
        return self._mode("dense", s, dense, ((), ()), (key, value))

    def packed(
        self,
        name: str,
        closed_form: Callable[[Shape], Cost],
        key: tuple[Block[Tensor], ...],
        value: tuple[Block[Tensor], ...],
        **how: Any,
    ) -> Mode:
        s, samples = self._shape, key[0].coefficient.shape[0]
        empty = self._normal(0, samples, s.kv_heads, s.head_dim)
        key_rank, value_rank = (sum(map(rank_of, blocks)) for blocks in (key, value))
        shape = replace(s, rank=key_rank, value_rank=value_rank)
        return self._mode(name, shape, closed_form, (key, value), (empty, empty), **how)

    def _mode(
        self,
        name: str,
        shape: Shape,
        closed_form: Callable[[Shape], Cost],
        blocks: Sequence[tuple[Block[Tensor], ...]],
        rows: tuple[Tensor, Tensor],
        angles: Angles[Tensor] | None = None,
        decompressed: bool = False,
        form: str | None = None,
    ) -> Mode:
        samples = rows[0].shape[1]
        query = self._normal(samples, shape.heads, 1, shape.head_dim)
        index = torch.arange(shape.tokens).expand(samples, -1).contiguous()
        segments = ((Segment(each),) if each else () for each in blocks)
        keys, values = (
            PackedParts(each, tail, tail.shape[0], index) for each, tail in zip(segments, rows, strict=True)
        )
        return Mode(name, shape, closed_form, query, replace(keys, angles=angles), values, decompressed, form)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._random).to(DTYPE)


def _angles(s: Shape) -> Angles[Tensor]:
    """cos and sin, of tokens in a row or, with a grid, as tables of the axes, and what token has which of their rows.

    The frequencies take turns with the axes, as in Qwen3-VL.
    """
    place, pairs = torch.arange(s.tokens), s.head_dim // 2
    width = 1 if s.grid is None else s.grid[1]
    positions = torch.stack([place] * 3 if s.grid is None else [place * 0, place // width, place % width])
    angle = positions[torch.arange(pairs) % 3].T * 1e6 ** (-torch.arange(pairs) / pairs)
    cos, sin = angle[None].cos().to(DTYPE), angle[None].sin().to(DTYPE)
    found = None if s.grid is None else tabulate(cos, sin)
    return Angles(cos, sin, None, False) if found is None else Angles(*found, False)


class Products(TorchDispatchMode):
    """Counts multiplications of elementwise products and of weighted embedding bags, and which storages are read.

    multiplies: one for each number that `mul` or `addcmul` makes of floating-point ones (four if complex), and one for
    each weight and column of an embedding bag. Integer products, which make indices, do not count. read: addresses of
    storages that any operation but a view took.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiplies = 0
        self.read: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (torch.ops.aten.mul, torch.ops.aten.mul_, torch.ops.aten.addcmul, torch.ops.aten.addcmul_):
            if result.is_complex():
                self.multiplies += 4 * result.numel()
            elif result.is_floating_point():
                self.multiplies += result.numel()
        elif packet in (torch.ops.aten._embedding_bag, torch.ops.aten._embedding_bag_forward_only):
            table, places = args[:2]
            self.multiplies += places.numel() * table.shape[1]
        if not func.is_view:
            tensors = (each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
            self.read |= {each.untyped_storage().data_ptr() for each in tensors}
        return result


@torch.no_grad()
def measured(mode: Mode) -> Cost:
    """What one call of it costs, per sample."""
    operands = mode.operands
    flops, products = FlopCounterMode(display=False), Products()
    with flops, products:
        mode()
    samples = mode.query.shape[0]
    read = sum(each.nbytes for each in operands if each.untyped_storage().data_ptr() in products.read)
    multiplies = flops.get_total_flops() // 2 + products.multiplies
    return Cost(multiplies / samples, read / samples)


def run(shape: Shape) -> dict[str, Any]:
    """Every mode of one shape: measured, by closed form, and measured as a part of dense attention."""
    found: dict[str, Any] = {}
    base = None
    for mode in modes(shape):
        cost = measured(mode)
        base = base or cost
        found[mode.name] = {
            "rank": mode.shape.rank,
            "chosen": mode.chosen,
            "measured": cost._asdict(),
            "closed_form": mode.closed_form(mode.shape)._asdict(),
            "of_dense": {"multiplies": cost.multiplies / base.multiplies, "bytes": cost.bytes / base.bytes},
        }
    return {**asdict(shape), "dtype": str(DTYPE).removeprefix("torch."), "modes": found}


def table(result: dict[str, Any]) -> str:
    """One shape as text; millions."""
    head = ("multiplies", "closed form", "of dense", "MB read", "closed form", "of dense")
    lines = [" " * 42 + "".join(name.rjust(13) for name in head)]
    for name, each in result["modes"].items():
        line = (name + (" *" if each["chosen"] else "")).ljust(42)
        for unit in ("multiplies", "bytes"):
            counts = f"{each['measured'][unit] / 1e6:.3f}", f"{each['closed_form'][unit] / 1e6:.3f}"
            line += "".join(text.rjust(13) for text in (*counts, f"{each['of_dense'][unit]:.3f}"))
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every count, and with what it was made")
    given = parser.parse_args(arguments)
    result: dict[str, Any] = {**measure.environment(), "costs": []}
    for shape in SHAPES:
        costs = run(shape)
        result["costs"].append(costs)
        sizes = f"T={shape.tokens}, Hq={shape.heads}, H={shape.kv_heads}, D={shape.head_dim}, R={shape.rank}"
        print(f"{shape.name}: {sizes}; one layer, one decode step, one sample, in millions")
        print(table(costs), flush=True)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
