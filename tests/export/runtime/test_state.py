"""Folds of an artefact's cache, against those of `attnpack_fx/folding.py` on the same tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx import Columns, PackedTensor, PackPolicy, Stored, folding
from attnpack_fx.export.layout import Layout
from attnpack_fx.export.policies import layout_of
from attnpack_fx.export.runtime.state import CacheState, due, fold
from tests.kernels.inputs import SEEDS, relative_error
from tests.stored_inputs import DIM, HEADS, WIDTH, Way, stored_pair

KINDS = ("key", "value")


def policy_of(way: Way, fold_every: int = 4, recent: int = 3) -> PackPolicy:
    space = "rotated" if way.angles == "none" else "unrotated"
    vision = way.rank if way.vision else None
    return PackPolicy(vision_rank=vision, text_rank=way.rank, key_space=space, fold_every=fold_every, recent=recent)


def layout_for(way: Way, layers: int = 1) -> Layout:
    sizes = {"layers": layers, "kv_heads": HEADS, "head_dim": DIM}
    return layout_of(policy_of(way), **sizes, axes=1, dtype=torch.float32, vision=way.vision > 0)


def angles_for(way: Way):
    """cos and sin of positions, as `stored_inputs.rotary` has them."""

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = (positions[..., None].double() * 3.0 ** -torch.arange(DIM // 2).double()).repeat(1, 1, 2)
        return (angle.cos() * way.scale).float(), (angle.sin() * way.scale).float()

    return angles


def rows_of(packed: PackedTensor, modality: str) -> Tensor:
    """What the low-rank segment of a modality stands for, `[B, H, N, D]`."""
    for segment, name in zip(packed.segments, packed.held.modalities, strict=True):
        if name == modality:
            return sum(block.coefficient[:, None].double() @ block.basis.double() for block in segment.factors).float()
    return packed.lease.buffer.rows.new_zeros((packed.shape[0], HEADS, 0, DIM))


def tail_of(packed: PackedTensor) -> Tensor:
    return packed.lease.buffer.rows[: packed.lease.length].permute(1, 2, 0, 3)


class Twin:
    """A pair of `stored_inputs`, and the state of an artefact that holds the same."""

    def __init__(self, way: Way) -> None:
        self.way, self.layout, self.pair = way, layout_for(way), stored_pair(way)
        key, batch = self.pair.key, way.batch
        index = key.placement.index
        sizes = [rows_of(key, name).shape[2] for name in self.layout.modalities]
        *packed, prompt = index.split([*sizes, index.shape[1] - sum(sizes)], 1)
        held = {f"{name}_mask": (part >= 0).long() for name, part in zip(self.layout.modalities, packed, strict=True)}
        held["prompt_mask"] = (prompt >= 0).long()
        held |= {
            f"{name}_position_ids": self.positions(part)
            for name, part in zip(self.layout.modalities, packed, strict=True)
            if name in self.layout.turns
        }
        held["position_offset"] = self.positions(torch.full((batch, 1), way.tokens))
        self.prompt_positions = self.positions(prompt)
        for kind in KINDS:
            source = getattr(self.pair, kind)
            for segment in self.layout.segments(0, kind):
                rows = rows_of(source, segment.modality)
                if segment.rows is not None:
                    held[segment.rows] = rows
                    continue
                (block,) = segment.blocks
                # Factors of fewer columns than the layout has, where there are fewer tokens.
                u, s, v = torch.linalg.svd(rows.transpose(1, 2).flatten(2).double(), full_matrices=False)
                size = min(block.rank, s.shape[1])
                coefficient = torch.zeros((batch, rows.shape[2], block.rank))
                coefficient[..., :size] = u[..., :size] * s[:, None, :size]
                basis = torch.zeros((batch, block.rank, WIDTH))
                basis[:, :size] = v[:, :size]
                held |= {block.coefficient: coefficient, block.basis: basis.unflatten(2, (HEADS, DIM)).transpose(1, 2)}
            held[f"prompt.0.{kind}"] = tail_of(source)
        self.state = CacheState.empty(self.layout, held, self.prompt_positions)

    def positions(self, logical: Tensor) -> Tensor:
        """Position ids of logical positions, which padding does not count in."""
        found = logical.clone()
        if self.way.padding:
            found[0] -= self.way.padding
        return found.clamp(min=0)

    def append(self, count: int) -> None:
        self.pair.append(count)
        present = {}
        for kind in KINDS:
            before = self.state.window[f"past_key_values.0.{kind}"]
            present[f"present.0.{kind}"] = torch.cat([before, tail_of(getattr(self.pair, kind))[:, :, -count:]], 2)
        new = self.pair.appended - count + torch.arange(count).expand(self.way.batch, -1)
        mask = torch.cat([self.state.mask, torch.ones_like(new)], 1)
        self.state.grow(present, mask, torch.cat([self.state.positions, new], 1))

    def fold(self, count: int) -> None:
        stored = Stored(*[Columns(((self.way.rank, 0),))] * 2)
        self.pair.key, self.pair.value = folding.fold(self.pair.key, self.pair.value, count, stored, None)
        angles = None if self.way.angles == "none" else angles_for(self.way)
        fold(self.state, self.layout, count, angles)

    def check(self) -> None:
        state, layout = self.state, self.layout
        prompt = state.packed["prompt_mask"].shape[1]
        index = self.pair.key.placement.index
        for kind in KINDS:
            source = getattr(self.pair, kind)
            for segment in layout.segments(0, kind):
                found = rows(state, segment)
                assert relative_error(found, rows_of(source, segment.modality), floor=0.01) < 2e-5, (kind, segment)
            tail = torch.cat([state.packed[f"prompt.0.{kind}"], state.window[f"past_key_values.0.{kind}"]], 2)
            assert torch.equal(tail, tail_of(source)) and state.packed[f"prompt.0.{kind}"].shape[2] == prompt
        names = [*layout.modalities, "prompt"]
        placed = torch.cat([state.packed[f"{name}_mask"] for name in names], 1)
        # Appended tokens join placed ones as they are folded.
        assert torch.equal(placed, (index >= 0).long())
        assert state.mask.shape == state.positions.shape == (self.way.batch, tail.shape[2] - prompt)
        assert self.state.prompt_positions.shape == (self.way.batch, prompt)
        for name in layout.turns:
            own = state.packed[f"{name}_position_ids"]
            start = sum(state.packed[f"{each}_mask"].shape[1] for each in names[: names.index(name)])
            logical = index[:, start : start + own.shape[1]]
            assert torch.equal(own[logical >= 0], self.positions(logical)[logical >= 0])


def rows(state: CacheState, segment) -> Tensor:
    if segment.rows is not None:
        return state.packed[segment.rows]
    (block,) = segment.blocks
    assert state.packed[block.coefficient].shape[2] == state.packed[block.basis].shape[2] == block.rank
    return (state.packed[block.coefficient][:, None].double() @ state.packed[block.basis].double()).float()


@given(
    way=st.builds(
        Way,
        seed=SEEDS,
        batch=st.integers(2, 3),
        vision=st.sampled_from([0, 9]),
        text=st.integers(2, 9),
        packed_text=st.booleans(),
        padding=st.integers(0, 2),
        rank=st.sampled_from([1, 3, 8, WIDTH - 1, WIDTH]),
        angles=st.sampled_from(["none", "rows"]),
        decay=st.sampled_from([0.4, 0.7, 1.0]),
        scale=st.sampled_from([1.0, 1.3]),
    ),
    steps=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 12)), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_folds_is_that_of_the_library(way, steps):
    if way.rank == WIDTH:
        # Rows, whose keys are as they are attended; the library has factors, of keys before rotary embedding.
        way = replace(way, angles="none")
    # Nothing packed at prefill is nothing un-rotated, for the library.
    twin = Twin(way if way.vision else replace(way, packed_text=True))
    twin.check()
    for appended, count in steps:
        twin.append(appended)
        twin.check()
        assert due(twin.state, policy_of(way)) == folding.due(twin.pair.key, policy_of(way))
        twin.fold(min(count, twin.pair.key.lease.length))
        twin.check()


def test_rows_take_folds_without_a_loss():
    """At full rank, which the layout has as rows; un-rotated keys are then kept as they are attended."""
    twin = Twin(Way(rank=WIDTH, vision=0, text=6, packed_text=True))
    (segment,) = twin.layout.segments(0, "key")
    before = rows(twin.state, segment)
    twin.append(5)
    newest = twin.state.window["past_key_values.0.key"]
    twin.fold(4)
    assert segment.rows is not None
    assert torch.equal(rows(twin.state, segment), torch.cat([before, newest[:, :, :4]], 2))
    assert torch.equal(twin.state.window["past_key_values.0.key"], newest[:, :, 4:])


def test_filler_in_the_window_is_folded_as_zero():
    twin = Twin(Way(rank=3, vision=0, text=6, packed_text=True))
    twin.append(4)
    twin.state.mask[0, 1] = 0
    fold(twin.state, twin.layout, 3, None)
    for kind in KINDS:
        (segment,) = twin.layout.segments(0, kind)
        assert rows(twin.state, segment)[0, :, -2].abs().amax() < 1e-6
        assert rows(twin.state, segment)[1, :, -2].abs().amax() > 1e-3
    assert twin.state.packed["text_mask"][:, -3:].tolist() == [[1, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("prompt", "window", "fold_every", "recent", "expected"),
    [
        (0, 6, 4, 3, 0),
        (0, 7, 4, 3, 4),
        (5, 2, 4, 3, 4),
        (9, 3, 4, 3, 8),
        (2, 0, 4, 3, 0),
        (9, 9, None, 3, 0),
        (0, 9, 4, 0, 8),
    ],
)
def test_when_folds_are_due(prompt, window, fold_every, recent, expected):
    none = torch.zeros((1, 0), dtype=torch.int64)
    packed = {"position_offset": none[:, :1], "prompt_mask": none.new_ones((1, prompt))}
    mask = none.new_ones((1, window))
    text = None if fold_every is None else 4
    policy = PackPolicy(text_rank=text, fold_every=fold_every, recent=recent)
    assert due(CacheState(packed, {}, mask, mask, packed["prompt_mask"]), policy) == expected


def test_an_empty_window_has_the_layout_of_the_model():
    layout = layout_for(Way(vision=9, rank=4), layers=3)
    packed = {"position_offset": torch.zeros((2, 1), dtype=torch.int64), "prompt_mask": torch.ones((2, 3))}
    state = CacheState.empty(layout, packed, torch.zeros((2, 3), dtype=torch.int64))
    assert list(state.window) == [f"past_key_values.{layer}.{kind}" for layer in range(3) for kind in KINDS]
    assert all(each.shape == (2, HEADS, 0, DIM) and each.dtype == torch.float32 for each in state.window.values())
    assert state.mask.shape == state.positions.shape == (2, 0)
    assert state.packed is not packed and state.packed == packed


def test_bytes_are_those_of_all_tensors():
    twin = Twin(Way(rank=3, vision=0, text=6, packed_text=True))
    batch, heads = twin.way.batch, HEADS
    # Per kind: coefficients of 6 tokens and a basis; the text's mask and the offset are int64.
    expected = 2 * 4 * batch * (6 * 3 + heads * 3 * DIM) + 8 * batch * (6 + 1)
    assert twin.state.bytes == expected
    twin.append(5)
    # Rows of both kinds, mask and positions.
    assert twin.state.bytes == expected + batch * 5 * (2 * 4 * heads * DIM + 2 * 8)


def test_what_a_fold_leaves_keeps_nothing_else_alive():
    twin = Twin(Way(rank=3, vision=0, text=6))
    twin.append(9)
    twin.fold(8)
    for tensor in (*twin.state.window.values(), twin.state.packed["prompt_mask"], twin.state.mask):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_positions_of_three_axes_are_folded_along():
    """Generated tokens have the same position on every axis, from the offset on."""
    batch, prompt, window, count = 2, 3, 4, 5
    policy = PackPolicy(vision_rank=None, text_rank=3, fold_every=1)
    layout = layout_of(policy, layers=1, kv_heads=HEADS, head_dim=DIM, axes=3, dtype=torch.float32, vision=True)
    random = torch.Generator().manual_seed(0)
    packed = {
        spec.name: torch.zeros(spec.resolved({"batch_size": batch, "text_length": 0, "prompt_length": prompt}))
        for spec in layout.packed()
    }
    packed |= {"text_mask": torch.zeros((batch, 0)).long(), "prompt_mask": torch.ones((batch, prompt)).long()}
    packed["text_position_ids"] = torch.zeros((3, batch, 0)).long()
    packed["position_offset"] = torch.tensor([[7], [9]])
    positions = torch.randint(9, (3, batch, prompt), generator=random)
    state = CacheState.empty(layout, packed, positions)
    present = {f"present.0.{kind}": torch.randn((batch, HEADS, window, DIM), generator=random) for kind in KINDS}
    places = torch.arange(window).expand(batch, -1)
    state.grow(present, torch.ones_like(places), places)
    asked = []

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(positions)
        return torch.ones((batch, count, DIM)), torch.zeros((batch, count, DIM))

    fold(state, layout, count, angles)
    expected = torch.cat([positions, (places[:, :2] + packed["position_offset"]).expand(3, -1, -1)], 2)
    assert len(asked) == 1 and torch.equal(asked[0], expected)
    assert torch.equal(state.packed["text_position_ids"], expected)
    assert state.prompt_positions.shape == (3, batch, 0) and torch.equal(state.positions, places[:, 2:])
