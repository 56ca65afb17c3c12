"""Keys and values stored in every way, beside the dense ones they stand for: un-rotated, quantised, of any spectrum."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnpack_fx import Columns, PackedTensor, Partial
from attnpack_fx.angles import SharedAngles
from attnpack_fx.held import Held, rank_of
from attnpack_fx.kernels import ops, reference
from attnpack_fx.passes.state import TEXT, VISION
from attnpack_fx.placement import Placement
from attnpack_fx.regrouping import regroup
from attnpack_fx.storing import squares_of, store
from attnpack_fx.tail import allocate

HEADS, DIM = 2, 8
WIDTH = HEADS * DIM


@dataclass(frozen=True)
class Way:
    """How a prompt of one layer is stored: two text tokens, vision tokens, the other text tokens.

    angles: `"none"`: keys as they are attended; `"rows"`: before 1-D rotary embedding; `"tables"`: before that of three
    axes, vision tokens in a square. padding: tokens before the text of sample 0. decay: of the singular values.
    text: how many text tokens, and whether they are packed. scale: of cos and sin, as in YaRN.
    """

    seed: int = 0
    batch: int = 2
    vision: int = 9
    text: int = 5
    packed_text: bool = False
    padding: int = 0
    rank: int = WIDTH
    bits: int = 0
    angles: str = "none"
    interleaved: bool = False
    decay: float = 1.0
    scale: float = 1.0

    @property
    def tokens(self) -> int:
        return self.padding + self.text + self.vision


@dataclass
class Pair:
    """Packed keys and values, and the dense `[B, H, T, D]` ones they stand for, which grow with them."""

    way: Way
    key: PackedTensor
    value: PackedTensor
    dense_key: Tensor
    dense_value: Tensor
    random: torch.Generator = field(repr=False)

    def append(self, count: int) -> None:
        """Some more text tokens, as a compiled graph appends them."""
        shape = self.way.batch, self.way.tokens + self.appended + count
        cos, sin = rotary(self.way, shape[1])
        key, value = (spectral(self.way, count, self.random) for _ in range(2))
        new = cos[:, -count:].float().contiguous(), sin[:, -count:].float().contiguous()
        attended = key
        if self.way.angles != "none":
            attended = reference.rotate(key.double(), cos[:, -count:], sin[:, -count:], self.way.interleaved).float()
        angles = self.key.held.angles
        self.key, self.value = self.key.append(attended), self.value.append(value)
        if angles is not None:
            self.key = self.key.turned(angles.appended(*new))
        self.dense_key = torch.cat([self.dense_key, attended], 2)
        self.dense_value = torch.cat([self.dense_value, value], 2)

    @property
    def appended(self) -> int:
        return self.dense_key.shape[2] - self.way.tokens

    @property
    def is_text(self) -> Tensor:
        """Bool `[T]`: which tokens are text (padding among them)."""
        flags = torch.ones(self.dense_key.shape[2], dtype=torch.bool)
        flags[self.way.padding + 2 : self.way.padding + 2 + self.way.vision] = False
        return flags


def spectral(way: Way, tokens: int, random: torch.Generator) -> Tensor:
    """Fp32 `[B, H, tokens, D]` whose singular values, heads concatenated, fall by `decay` each."""
    turn = torch.linalg.qr(torch.randn((WIDTH, WIDTH), generator=torch.Generator().manual_seed(way.seed))).Q
    scale = way.decay ** torch.arange(WIDTH)
    rows = torch.randn((way.batch, tokens, WIDTH), generator=random) * scale @ turn
    return rows.unflatten(2, (HEADS, DIM)).transpose(1, 2).contiguous()


def rotary(way: Way, tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin float64 `[B or 1, tokens, D / 2]` of the prompt and what follows."""
    place = torch.arange(tokens).expand(3, -1).clone()
    if way.angles == "tables":
        side, start = round(way.vision**0.5), way.padding + 2
        assert side * side == way.vision
        span = torch.arange(way.vision)
        place[:, start : start + way.vision] = torch.stack([span * 0, span // side, span % side]) + start
        place[:, start + way.vision :] -= way.vision - side
    positions = place.expand(way.batch, -1, -1).clone()
    if way.padding:
        positions[0] -= way.padding
    else:
        positions = positions[:1]
    pairs = torch.arange(DIM // 2)
    angle = positions[:, pairs % 3].transpose(1, 2) * 3.0 ** -pairs.double()
    return angle.cos() * way.scale, angle.sin() * way.scale


def stored_pair(way: Way) -> Pair:
    """A prompt stored that way. Losses are known, and angles of the tail are kept, as for folds."""
    random = torch.Generator().manual_seed(way.seed + 1)
    key, value = (spectral(way, way.tokens, random) for _ in range(2))
    real = torch.ones((way.batch, way.tokens), dtype=torch.bool)
    real[0, : way.padding] = False
    modality = torch.zeros((1, way.tokens), dtype=torch.bool)
    modality[:, way.padding + 2 : way.padding + 2 + way.vision] = True
    attended, (cos, sin) = key, rotary(way, way.tokens)
    if way.angles != "none":
        attended = reference.rotate(key.double(), cos, sin, way.interleaved).float()
    *indices, slot = ops.plan(modality, real, key, way.packed_text, [], [])
    placement = Placement.from_plan(indices, slot)
    made = []
    for source, tail in ((key, attended), (value, value)):
        segments, modalities, losses = [], [], []
        for name, index in zip((VISION, TEXT), indices, strict=False):
            if index.shape[1]:
                rank = min(way.rank, index.shape[1], WIDTH)
                squares = squares_of(source.square().sum((1, 3)), index)
                segment, loss = store(*ops.compress(source, index, rank), Columns(((rank, way.bits),)), squares)
                segments.append(segment)
                modalities.append(name)
                losses.append((name, loss))
        packed, angles = indices[0].shape[1] + indices[1].shape[1], None
        if way.angles != "none" and packed and source is key:
            each = cos.float(), sin.float()
            angles = SharedAngles.of_prompt(*each, placement.index, packed, way.interleaved, keep_tail=True)
        held = Held(tuple(segments), tuple(modalities), placement, angles, losses=tuple(losses))
        rows = ops.take_rows(tail, indices[2], 0)
        made.append(PackedTensor(held, allocate(rows, rows.shape[0]).lease(rows.shape[0])))
    hidden = ~real[:, None, :, None]
    return Pair(way, *made, attended.masked_fill(hidden, 0), value.masked_fill(hidden, 0), random)


def in_blocks(pair: Pair, partial: Partial, bits: int = 0) -> None:
    """Cut the columns of the vision tokens where the groups of `partial` do, as a policy with it has them stored."""
    for name in ("key", "value"):
        packed = getattr(pair, name)
        segment, *rest = packed.segments
        (block,) = segment.blocks
        columns = Columns(((rank_of(block), bits),)).cut(partial.columns(rank_of(block)))
        cut, _ = store(block.coefficient, block.basis, columns)
        setattr(pair, name, PackedTensor(replace(packed.held, segments=(cut, *rest)), packed.lease))


def with_importance(pair: Pair, seed: int) -> Tensor:
    """Give the vision tokens a random importance, and return it."""
    importance = torch.rand((pair.way.batch, pair.way.vision), generator=torch.Generator().manual_seed(seed))
    pair.key = pair.key.attended(importance.masked_fill(pair.key.index[:, : pair.way.vision] < 0, 0))
    return importance


def grouped(way: Way, partial: Partial, seed: int = 0, bits: int = 0) -> Pair:
    """With vision tokens grouped by a random importance, each group with its columns."""
    pair = stored_pair(way)
    in_blocks(pair, partial, bits)
    with_importance(pair, seed)
    pair.key, pair.value = regroup(pair.key, pair.value, partial)
    return pair
