"""Cached layers beside the dense keys and values they stand for, which go along with whatever is done to them."""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnpack_fx import PackedTensor
from attnpack_fx.angles import SharedAngles
from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.held import Held, fake_parts
from attnpack_fx.kernels import ops
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.moving import choose, taken
from attnpack_fx.placement import Placement
from attnpack_fx.tail import allocate
from tests.stored_inputs import DIM, HEADS, Way, rotary, stored_pair

GROUP = 2  # query heads of a KV head


@dataclass
class Mirror:
    """A layer and what it stands for.

    key, value: `[B, H, T, D]`, all tokens there have been; kept: bool `[B', T]`, those a step reads; score: fp32
    `[B', T]`, what is remembered of each; vision: bool `[T]`. B' counts samples, or (sample, head) pairs.
    """

    way: Way
    layer: CachedLayer
    key: Tensor
    value: Tensor
    kept: Tensor
    score: Tensor
    vision: Tensor
    random: torch.Generator

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    @property
    def heads(self) -> int:
        """How many heads keep tokens of their own."""
        return self.layer.key.held.heads

    def rows(self, of_tokens: Tensor) -> Tensor:
        """`[B', T]` as `[B, H or 1, T]`."""
        return of_tokens.unflatten(0, (-1, self.heads or 1))

    def append(self, count: int) -> None:
        """Some text tokens, as a compiled graph appends them."""
        batch = self.key.shape[0]
        new = [torch.randn((batch, HEADS, count, DIM), generator=self.random) for _ in range(2)]
        angles = self.layer.key.held.angles
        self.layer.key, self.layer.value = self.layer.key.append(new[0]), self.layer.value.append(new[1])
        if angles is not None:
            end = self.tokens + count
            whole = rotary(self.way, max(end, self.way.tokens))  # of a prompt at least as long as what was stored
            turns = (each[:, self.tokens : end].float() for each in whole)
            cos, sin = (each.expand(batch, -1, -1).contiguous() for each in turns)
            self.layer.key = self.layer.key.turned(angles.appended(cos, sin, self.heads))
        self.key, self.value = (torch.cat(pair, 2) for pair in zip((self.key, self.value), new, strict=True))
        self.kept = torch.cat([self.kept, self.kept.new_ones((len(self.kept), count))], 1)
        more = torch.rand((len(self.kept), count), generator=self.random)
        self.score = torch.cat([self.score, more], 1)
        self.vision = torch.cat([self.vision, self.vision.new_zeros(count)])
        self.layer = replace(self.layer, prefill=False, added=count)
        self.remember()

    def remember(self) -> None:
        """Put the scores where the layer has them."""
        positions = self.layer.key.positions
        score = self.score.gather(1, positions.clamp(min=0)).masked_fill(positions < 0, 0)
        self.layer.key = self.layer.key.attended(score)

    def evict(self, share: float) -> None:
        """Keep about such a share of the tokens, others in every sample."""
        layer = self.layer
        keep = torch.rand(layer.key.positions.shape, generator=self.random) < share
        keep &= layer.key.positions >= 0
        layer.key, layer.value = taken(layer.key, layer.value, choose(layer.key, layer.value, keep))
        self.follow()

    def follow(self) -> None:
        """What is read now, by what the layer says."""
        self.kept = torch.zeros_like(self.kept)
        for sample, row in enumerate(self.layer.key.positions.tolist()):
            self.kept[sample, [position for position in row if position >= 0]] = True

    def reread(self) -> None:
        """Coding is not exact: stand for what the layer holds now."""
        self.key, self.value = self.layer.key.dense(), self.layer.value.dense()

    def select(self, rows: Tensor) -> None:
        """Other samples, as beam search chooses them."""
        self.layer.key, self.layer.value = (each.index_select(0, rows) for each in (self.layer.key, self.layer.value))
        self.key, self.value = self.key[rows], self.value[rows]
        self.kept, self.score = (self.rows(each)[rows].flatten(0, 1) for each in (self.kept, self.score))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.layer.key, self.layer.value = function(self.layer.key), function(self.layer.value)

    def crop(self, tokens: int) -> None:
        self.map(lambda each: each[:, :, :tokens])
        self.key, self.value = self.key[:, :, :tokens], self.value[:, :, :tokens]
        self.kept, self.score, self.vision = self.kept[:, :tokens], self.score[:, :tokens], self.vision[:tokens]

    def dense(self, of: str) -> Tensor:
        """What `PackedTensor.dense` is to say."""
        whole: Tensor = getattr(self, of)
        return whole.masked_fill(~self.rows(self.kept)[..., None], 0)

    def check(self, tolerance: float = 2e-5) -> None:
        """That the layer means what it should, holds the scores of its tokens, and attends to them alone."""
        key, value = self.layer.key, self.layer.value
        for packed, of in ((key, "key"), (value, "value")):
            assert isinstance(packed, PackedTensor) and packed.shape == self.key.shape
            torch.testing.assert_close(packed.dense(), self.dense(of), atol=tolerance, rtol=tolerance)
            assert_as_traced(packed)
        positions = key.positions
        assert torch.equal(positions, value.positions) and positions.shape[1] == key.slots == value.slots
        assert key.placement.ragged or not (positions < 0).any()
        expected = [row.nonzero()[:, 0].tolist() for row in self.kept]
        assert [sorted(p for p in row if p >= 0) for row in positions.tolist()] == expected
        if key.importance is not None:
            there = positions >= 0
            found = key.importance[:, : key.slots].masked_fill(~there, 0)
            assert torch.equal(found, self.score.gather(1, positions.clamp(min=0)).masked_fill(~there, 0))
        queries = 2
        query = torch.randn((key.shape[0], HEADS * GROUP, queries, DIM), generator=self.random)
        mask = torch.rand((key.shape[0], 1, queries, self.tokens), generator=self.random) < 0.8
        for given in (None, mask):
            torch.testing.assert_close(
                attend(key, value, query, given), self.attention(query, given), atol=10 * tolerance, rtol=1e-3
            )

    def attention(self, query: Tensor, mask: Tensor | None) -> Tensor:
        """In float64 over the tokens that are kept, at their logical positions."""
        key, value = (self.dense(of).double().repeat_interleave(GROUP, 1) for of in ("key", "value"))
        scores = query.double() @ key.mT * DIM**-0.5
        seen = self.rows(self.kept).expand(-1, HEADS, -1).repeat_interleave(GROUP, 1)[:, :, None]
        seen = seen if mask is None else seen & mask
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
        return (weights @ value).float()


def attend(key: PackedTensor, value: PackedTensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as a rewritten graph calls it; mask bool `[B, 1, Tq, T]`."""
    heads, batch = key.held.heads, query.shape[0]
    if heads:
        query = query.unflatten(1, (heads, -1)).flatten(0, 1)
        mask = None if mask is None else mask.repeat_interleave(heads, 0)
    tensors, layouts = flatten(key.parts, value.parts)
    out = ops.attention(query, tensors, *layouts, key.lease.length, mask, DIM**-0.5)
    return out.reshape(batch, -1, *out.shape[2:])


def mirrored(way: Way, *, factors: bool = True, apart: bool = False, angles: bool = False) -> Mirror:
    """A prompt stored that way; without factors all its tokens are dense, and with `angles` those of keys are kept."""
    pair = stored_pair(way)
    tokens = way.tokens
    vision = torch.zeros(tokens, dtype=torch.bool)
    vision[way.padding + 2 : way.padding + 2 + way.vision] = True
    kept = torch.ones((way.batch, tokens), dtype=torch.bool)
    kept[0, : way.padding] = False
    key, value, old = pair.key, pair.value, pair.key.placement
    if factors:
        placed = Placement.from_plan([old.index], old.slot, vision & kept, moves=True)
        held = [replace(each.held, placement=placed) for each in (key, value)]
        rows = [each.lease.buffer.rows[: each.lease.length] for each in (key, value)]
    else:
        *_, index, slot = ops.plan(None, kept, pair.dense_key, False, [], [])
        placed = Placement.from_plan([index], slot, vision & kept, moves=True)
        turns = None
        if angles:
            cos, sin = (each.float().expand(way.batch, -1, -1) for each in rotary(way, tokens))
            turns = SharedAngles.of_prompt(cos, sin, index, 0, way.interleaved, keep_tail=True)
        held = [Held((), (), placed, turns), Held((), (), placed)]
        rows = [ops.take_rows(each, index, 0) for each in (pair.dense_key, pair.dense_value)]
    if apart:
        held, rows = [each.apart(HEADS) for each in held], [each.flatten(1, 2)[:, :, None] for each in rows]
        kept = kept.repeat_interleave(HEADS, 0)
    made = (PackedTensor(h, allocate(r, len(r)).lease(len(r))) for h, r in zip(held, rows, strict=True))
    random = torch.Generator().manual_seed(way.seed + 7)
    score = torch.rand((len(kept), tokens), generator=random)
    layer = CachedLayer(1, *made, added=tokens, prefill=True)
    mirror = Mirror(way, layer, pair.dense_key, pair.dense_value, kept, score, vision, random)
    mirror.remember()
    return mirror


def saved(packed: PackedTensor) -> PackedTensor:
    """Through a file."""
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_as_traced(packed: PackedTensor) -> None:
    """Every tensor has the shape, dtype and strides that a graph is compiled for."""
    held = packed.held
    segments, index, tokens, angles = fake_parts(held.forms[0], packed.lease.buffer.rows, held.sizes)
    fake = replace(
        held,
        segments=segments,
        placement=replace(packed.placement, index=index, tokens=tokens),
        angles=None if angles is None else replace(held.angles, packed=angles),
    )
    for name, tensor in held.named.items():
        traced = fake.named[name]
        assert (tensor.shape, tensor.dtype) == (traced.shape, traced.dtype), name
        assert not tensor.numel() or tensor.is_contiguous(), name
    assert len(fake.named) == len(held.named)
