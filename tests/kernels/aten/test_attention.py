from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten import coded_attention, unrotated
from attnpack_fx.kernels.parts import Angles
from attnpack_fx.kernels.rotary_axes import tabulate

from ..inputs import (
    ATTENTION_FLOOR,
    Shapes,
    assert_close,
    attention_arguments,
    relative_error,
    shapes,
    stored_shapes,
)
from ..multimodal import LAYOUTS, Media, cos_and_sin

# The package re-exports the function under the module's name.
implementation = import_module("attnpack_fx.kernels.aten.attention")


def attention(**arguments):
    return implementation.attention(**arguments)[0]


def check(shape: Shapes) -> None:
    arguments = attention_arguments(shape)
    out = attention(**arguments)
    assert out.dtype == shape.dtype and out.is_contiguous()
    assert_close(out, reference.attention(**arguments), floor=ATTENTION_FLOOR)


@given(shape=shapes())
@settings(max_examples=150, deadline=None)
def test_matches_the_reference(shape):
    check(shape)


@given(shape=stored_shapes())
@settings(max_examples=100, deadline=None)
def test_every_way_to_store_matches_the_reference(shape):
    check(shape)


@given(shape=shapes(mask="none", ragged=False, queries=1, segments=(33,)))
@settings(max_examples=60, deadline=None)
def test_decode_step_matches_the_reference(shape):
    check(shape)


@given(shape=shapes(), partial=st.booleans(), interleaved=st.booleans())
@settings(max_examples=120, deadline=None)
def test_keys_before_rotary_embedding_are_rotated(shape, partial, interleaved):
    rotary = shape.key_dim // 2 if partial else shape.key_dim
    fields = shape.__dict__ | {"rotary": rotary, "interleaved": interleaved}
    check(Shapes(**fields))


@given(shape=stored_shapes(queries=7))
@settings(max_examples=60, deadline=None)
def test_tiles_over_queries_and_keys_change_nothing(shape):
    arguments = attention_arguments(shape)
    with pytest.MonkeyPatch.context() as patch:
        slots = shape.key_slots + arguments["keys"].length
        patch.setattr(implementation, "SCORE_BYTES", 4 * 2 * shape.batch * shape.heads * shape.group * max(slots, 1))
        patch.setattr(unrotated, "TILE_BYTES", 4 * 5 * shape.batch * shape.heads * shape.key_dim)
        patch.setattr(coded_attention, "TILE_BYTES", {"cpu": 4 * 9 * shape.batch * shape.heads * shape.key_dim})
        out = attention(**arguments)
    assert_close(out, reference.attention(**arguments), floor=ATTENTION_FLOOR)


@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_of_real_models_give_what_their_rows_give(layout, queries):
    samples = [[Media("image", (1, 12, 20))], [Media("video", (4, 10, 6))]]
    cos, sin = cos_and_sin(layout, samples, torch.float32)
    found = tabulate(cos, sin)
    assert found is not None and 2 * found[0].shape[1] <= cos.shape[1]
    cuts = ((1.0, 8), (0.25, 0))
    shape = Shapes(batch=2, queries=queries, segments=(240,), key_dim=128, rotary=128, key_cuts=cuts)
    arguments = attention_arguments(shape)
    tables, rows = (
        arguments | {"keys": replace(arguments["keys"], angles=angles)}
        for angles in (Angles(*found, False), Angles(cos, sin, None, False))
    )
    assert_close(attention(**tables), reference.attention(**rows), floor=ATTENTION_FLOOR)


@pytest.mark.parametrize("cos_batch", [1, 2])
def test_rotation_shared_by_the_batch(cos_batch):
    arguments = attention_arguments(Shapes(batch=2, rotary=8, segments=(5, 7)))
    keys = arguments["keys"]
    angles = replace(keys.angles, cos=keys.angles.cos[:cos_batch], sin=keys.angles.sin[:cos_batch])
    arguments["keys"] = replace(keys, angles=angles)
    assert_close(attention(**arguments), reference.attention(**arguments), floor=ATTENTION_FLOOR)


def test_rows_whose_every_token_is_masked_are_zero():
    arguments = attention_arguments(Shapes(queries=3, mask="bool"))
    arguments["mask"] = torch.ones_like(arguments["mask"])
    arguments["mask"][..., 1, :] = False
    out = attention(**arguments)
    assert out[:, :, 1].eq(0).all() and out[:, :, 0].ne(0).any() and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_with_the_smallest_number_instead_of_infinity(dtype):
    arguments = attention_arguments(Shapes(dtype=dtype, mask="additive", queries=2, ragged=True))
    arguments["mask"] = arguments["mask"].clamp(min=torch.finfo(dtype).min)
    assert_close(attention(**arguments), reference.attention(**arguments), floor=ATTENTION_FLOOR)


def test_nothing_to_attend_to_gives_zeros():
    arguments = attention_arguments(Shapes(segments=(), kept=0, appended=0))
    assert attention(**arguments).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_scores_stay_finite_and_accurate(dtype):
    arguments = attention_arguments(Shapes(dtype=dtype, queries=2)) | {"scale": 20.0}
    out = attention(**arguments)
    limit = {torch.float32: 1e-4, torch.float16: 0.06, torch.bfloat16: 0.5}[dtype]
    error = (out.double() - reference.attention(**arguments)).norm() / out.double().norm()
    assert out.isfinite().all() and error < limit


@given(shape=shapes(mask="none", ragged=False, padding=0, cap=0.0, sinks="none"))
@settings(max_examples=40, deadline=None)
def test_agrees_with_attention_on_the_dense_meaning(shape):
    arguments = attention_arguments(shape)
    both = arguments["keys"], arguments["values"]
    key, value = (reference.decompress(replace(each, slot=torch.argsort(each.index, 1))) for each in both)
    if key.shape[2]:
        query = arguments["query"].double()
        dense = F.scaled_dot_product_attention(query, key, value, scale=arguments["scale"], enable_gqa=True)
        assert_close(attention(**arguments), dense, floor=ATTENTION_FLOOR)


@pytest.mark.parametrize("transposed", ["query", "keys"])
def test_strided_arguments(transposed):
    def strided(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    arguments = attention_arguments(Shapes(batch=2, queries=3, heads=3))
    given = arguments[transposed]
    arguments[transposed] = strided(given) if transposed == "query" else replace(given, tail=strided(given.tail))
    assert_close(attention(**arguments), reference.attention(**arguments), floor=ATTENTION_FLOOR)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_accuracy_at_a_typical_size(dtype, limit):
    shape = Shapes(dtype=dtype, heads=8, group=2, key_dim=64, value_dim=64, segments=(576,), key_rank=64, value_rank=64)
    arguments = attention_arguments(shape)
    assert relative_error(attention(**arguments), reference.attention(**arguments)) < limit


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor an operation makes; views make none."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("rotary", [0, 64])
@pytest.mark.parametrize("queries", [1, 64])
def test_no_dense_keys_or_values_are_built(rotary, queries, monkeypatch):
    shape = Shapes(heads=8, key_dim=64, value_dim=64, segments=(600,), queries=queries, rotary=rotary)
    arguments = attention_arguments(shape)
    monkeypatch.setattr(implementation, "SCORE_BYTES", 100_000)
    monkeypatch.setattr(unrotated, "TILE_BYTES", 100_000)
    with LargestTensor() as recorded:
        attention(**arguments)
    assert 0 < recorded.largest <= 600 * 8 * 64 // 8


@given(shape=st.one_of(shapes(), stored_shapes()))
@settings(max_examples=60, deadline=None)
def test_weights(shape):
    arguments = attention_arguments(shape)
    out, weights = implementation.attention(**arguments, weights=True)
    expected_out, expected = reference.attention_weights(**arguments)
    assert weights.dtype == torch.float32
    assert_close(out, expected_out.to(shape.dtype), floor=ATTENTION_FLOOR)
    assert_close(weights, expected, shape.dtype)


@pytest.mark.parametrize("each", [2, 32])
@pytest.mark.parametrize("tile", [1, 2, 64])
def test_the_weights_of_the_newest_queries_each_by_itself(each, tile, monkeypatch):
    """First the sum of those of older queries; with one query at a time they are those of that query."""
    shape = Shapes(queries=5, ragged=True)
    arguments = attention_arguments(shape)
    slots = arguments["keys"].index.shape[1] + arguments["keys"].length
    expected, singly = implementation.attention(**arguments, weights=True)[0], []
    for number in range(5):
        mask = arguments["mask"]
        mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., number : number + 1, :]
        one = arguments | {"query": arguments["query"][:, :, number : number + 1], "mask": mask}
        singly.append(implementation.attention(**one, weights=True)[1])
    monkeypatch.setattr(implementation, "SCORE_BYTES", 4 * tile * arguments["query"][:, :, 0, 0].numel() * slots)
    out, seen = implementation.attention(**arguments, weights=True, each=each)
    assert_close(out, expected, floor=ATTENTION_FLOOR)
    kept = min(each, 5)
    assert seen.shape[1] == 1 + kept
    torch.testing.assert_close(seen[:, 1:], torch.stack(singly[5 - kept :], 1))
    older = sum(singly[: 5 - kept], torch.zeros_like(singly[0]))
    torch.testing.assert_close(seen[:, 0], older)


def test_queries_in_half_precision_are_scaled_in_single():
    """As in scaled_dot_product_attention: rounded once more, large scores are off by what softmax makes much of."""
    arguments = attention_arguments(Shapes(dtype=torch.float16, queries=1)) | {"scale": 0.3}
    arguments["query"] = arguments["query"] * 16
    assert relative_error(attention(**arguments), reference.attention(**arguments)) < 5e-4
