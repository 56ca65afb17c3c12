"""Coding in the cache: older tokens once, in the order they have, of one form from the prompt on."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from attnpack_fx import GEAR, KIVI, KVQuant, Quantize
from attnpack_fx.coding import code, due, place_all, turned_back
from attnpack_fx.held import ROW_SEGMENT
from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten import coded_rows
from attnpack_fx.kernels.parts import RowForm, Rows
from attnpack_fx.passes.row_coding import Kind, RowCoding
from tests.layer_inputs import Mirror, mirrored
from tests.stored_inputs import Way, rotary


@dataclass(frozen=True)
class Plain(RowCoding):
    """No codes at all: all of a prompt but the newest, later so many at once; keys and values at different times."""

    keys: int = 3
    values: int = 2

    def due(self, kind: Kind, rows: int, prefill: bool) -> int:
        every = self.keys if kind == "key" else self.values
        return max(0, rows - every) // every * every

    def encode(self, rows: Tensor, kind: Kind, layer: int | None, prefill: bool) -> Rows[Tensor]:
        self.seen.append((kind, rows.shape[1], layer, prefill))
        return Rows(RowForm(0), rows, rows.new_empty((*rows.shape[:3], 0)))

    @property
    def seen(self) -> list:
        return SEEN


@dataclass(frozen=True)
class Unrotated(Plain):
    unrotated = True


SEEN: list[tuple[Kind, int, int | None, bool]] = []
WAYS = {
    "dense": ({"padding": 2}, {"factors": False}),
    "beside low rank": ({"padding": 1}, {}),
    "apart": ({"padding": 1}, {"factors": False, "apart": True}),
    "beside rotary": ({"padding": 1, "angles": "rows"}, {}),
    "beside tables": ({"angles": "tables", "vision": 36}, {}),
    "rotary alone": ({"padding": 1, "angles": "rows"}, {"factors": False, "angles": True}),
    "interleaved, scaled": ({"angles": "rows", "interleaved": True, "scale": 1.2}, {"factors": False, "angles": True}),
    "apart, rotary": ({"padding": 1, "angles": "rows"}, {"factors": False, "apart": True, "angles": True}),
}
every_way = pytest.mark.parametrize(("way", "how"), WAYS.values(), ids=WAYS)


def made(way: dict, how: dict) -> Mirror:
    mirror = mirrored(Way(**way), **how)
    mirror.reread()
    return mirror


@every_way
@pytest.mark.parametrize("method", [Plain(), Unrotated()], ids=["attended", "unrotated"])
def test_what_is_coded_without_loss_means_the_same(way, how, method):
    mirror = made(way, how)
    positions = mirror.layer.key.positions
    code(mirror.layer, method)
    mirror.check(1e-4)
    differ = 0
    for _ in range(9):
        mirror.append(1)
        before = mirror.layer.key.positions
        code(mirror.layer, method)
        mirror.check(1e-4)
        assert torch.equal(mirror.layer.key.positions, before)
        differ += mirror.layer.key.held.packed != mirror.layer.value.held.packed
    assert torch.equal(mirror.layer.key.positions[:, : positions.shape[1]], positions)
    held = mirror.layer.key.held, mirror.layer.value.held
    assert all(each.modalities[-1] == ROW_SEGMENT and each.closed for each in held)
    assert differ and held[0].placement is held[1].placement


def test_every_token_is_coded_once():
    SEEN.clear()
    mirror = made(*WAYS["dense"])
    for step in range(10):
        if step:
            mirror.append(1)
        code(mirror.layer, Plain())
    for kind, of in (("key", mirror.layer.key), ("value", mirror.layer.value)):
        counts = [count for each, count, _, _ in SEEN if each == kind]
        assert sum(counts) == of.held.packed and all(counts)
        assert [prefill for each, *_, prefill in SEEN if each == kind] == [True] + [False] * (len(counts) - 1)
    assert {layer for _, _, layer, _ in SEEN} == {1}


@pytest.mark.parametrize(
    "method", [KIVI(4, 2, 4), KVQuant(4, residual=4), GEAR(4, 2, residual=4), Quantize(8, target="tail", recent=4)]
)
@pytest.mark.parametrize("angles", ["none", "rows"])
def test_the_form_is_the_same_from_the_first_codes_on(method, angles):
    forms = []
    for text in (1, 21):
        mirror = mirrored(Way(vision=1, text=text, angles=angles, batch=1), factors=False, angles=angles != "none")
        for step in range(40):
            if step:
                mirror.append(1)
            code(mirror.layer, method)
            if mirror.layer.key.held.packed > 0 < mirror.layer.value.held.packed:
                forms.append((mirror.layer.key.form, mirror.layer.value.form))
        assert mirror.layer.key.held.packed > 0 < mirror.layer.value.held.packed
    assert len(set(forms)) == 1


@pytest.mark.parametrize("method", [KIVI(8, 2, 4), KVQuant(8, residual=4), GEAR(8, 2, residual=4)])
@every_way
def test_codes_are_near_and_what_is_dense_is_exact(way, how, method):
    mirror = made(way, how)
    code(mirror.layer, method)
    for _ in range(6):
        mirror.append(1)
        code(mirror.layer, method)
    for packed, of in ((mirror.layer.key, "key"), (mirror.layer.value, "value")):
        dense, expected = packed.dense(), mirror.dense(of)
        torch.testing.assert_close(dense, expected, atol=0.1, rtol=0.02)
        if not packed.held.heads:
            tail = packed.positions[:, packed.held.packed :]
            for sample, row in enumerate(tail.tolist()):
                kept = [position for position in row if position >= 0]
                assert torch.equal(dense[sample][:, kept], expected[sample][:, kept])


@pytest.mark.parametrize("name", ["rotary alone", "interleaved, scaled"])
def test_turning_back_undoes_rotary_embedding(name):
    mirror = made(*WAYS[name])
    packed, way = mirror.layer.key, mirror.way
    rows = packed.lease.buffer.rows[:5]
    cos, sin = (each.expand(way.batch, -1, -1) for each in rotary(way, way.tokens))
    back = turned_back(rows, packed)
    position = packed.positions[:, :5]
    turns = (each.gather(1, position[..., None].expand(-1, -1, each.shape[2])) for each in (cos, sin))
    again = reference.rotate(back.double().permute(1, 2, 0, 3), *turns, way.interleaved)
    torch.testing.assert_close(again.float(), rows.permute(1, 2, 0, 3), atol=1e-5, rtol=1e-5)


def test_unrotated_codes_are_those_of_keys_before_rotary_embedding():
    """KVQuant: what is decoded, then turned, is what attention sees."""
    mirror = made(*WAYS["rotary alone"])
    packed, way = mirror.layer.key, mirror.way
    rows = turned_back(packed.lease.buffer.rows[: packed.lease.length], packed)
    there = packed.positions >= 0
    method = KVQuant(4, residual=4, outliers=0)
    expected = method.encode(rows.permute(1, 0, 2, 3) * there[..., None, None], "key", 1, True)
    code(mirror.layer, method)
    (block,) = mirror.layer.key.segments[-1].blocks
    assert torch.equal(block.codes, expected.codes)
    decoded = coded_rows.decode(expected, 8).double().transpose(1, 2)
    cos, sin = (each.expand(way.batch, -1, -1) for each in rotary(way, way.tokens))
    position = mirror.layer.key.positions.clamp(min=0)
    turns = (each.gather(1, position[..., None].expand(-1, -1, each.shape[2])) for each in (cos, sin))
    turned = reference.rotate(decoded, *turns, way.interleaved).float()
    dense = mirror.layer.key.dense()
    for sample in range(2):
        at = mirror.layer.key.positions[sample][there[sample]]
        torch.testing.assert_close(dense[sample][:, at], turned[sample][:, there[sample]], atol=1e-5, rtol=1e-4)


def test_keys_of_unknown_angles_stay_dense():
    mirror = made(*WAYS["rotary alone"])
    method = Unrotated(keys=2, values=2)
    code(mirror.layer, method)
    coded = mirror.layer.key.held.packed
    # As a caller's own `cat` appends: nobody says where these stand.
    key = mirror.layer.key.held
    mirror.layer.key = mirror.layer.key.turned(key.angles.untracked())
    mirror.append(4)
    assert due(mirror.layer, method)[0] == 0 < due(mirror.layer, method)[1]
    code(mirror.layer, method)
    assert mirror.layer.key.held.packed == coded < mirror.layer.value.held.packed
    mirror.check(1e-4)


def test_appended_tokens_get_a_place_in_both():
    mirror = made(*WAYS["dense"])
    mirror.append(3)
    before = mirror.layer.key.positions
    place_all(mirror.layer)
    key, value = mirror.layer.key.placement, mirror.layer.value.placement
    assert key is value and key.tokens == mirror.tokens and torch.equal(key.index, before)
    layer = replace(mirror.layer)
    place_all(mirror.layer)
    assert mirror.layer.key is layer.key
