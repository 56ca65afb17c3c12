"""The attention kernels, each way a launcher may choose, against the float64 reference."""

import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.parts import Angles, RowForm
from attnpack_fx.kernels.rotary import per_slot

from ..inputs import ATTENTION_FLOOR, Shapes, assert_close, attention_arguments, map_blocks, shapes
from .interpreted import attend, unrotated

# The interpreter is too slow to shrink what fails.
QUICKLY = settings(deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


def taken(given) -> bool:
    """Whether the kernels take these arguments of attention."""
    return attend.takes(given["query"], given["keys"], given["values"])


def check(shape: Shapes, **changes) -> None:
    arguments = attention_arguments(shape) | changes
    out, _ = attend.attention(**arguments)
    assert out.dtype == shape.dtype and out.is_contiguous()
    expected, expected_weights = reference.attention_weights(**arguments)
    assert_close(out, expected, floor=ATTENTION_FLOOR)
    if shape.queries > 1:
        return  # the kernels keep the weights of one query
    out, weights = attend.attention(**arguments, weights=True)
    assert weights.dtype == torch.float32
    assert_close(out, expected, floor=ATTENTION_FLOOR)
    assert_close(weights, expected_weights, shape.dtype)


@given(shape=shapes())
@settings(QUICKLY, max_examples=60)
def test_matches_the_reference(shape):
    check(shape)


@pytest.mark.slow
@given(shape=shapes(queries=1, segments=(70,)), batch=st.integers(1, 5))
@settings(QUICKLY, max_examples=25)
def test_decode_steps_match_the_reference(shape, batch):
    check(dataclasses.replace(shape, batch=batch))


@pytest.mark.slow
@given(shape=shapes(), fused=st.booleans())
@settings(QUICKLY, max_examples=50)
def test_the_way_taken_changes_nothing(shape, fused):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "fits_fused", lambda problem: fused)
        check(shape)


@pytest.mark.slow
@given(shape=shapes(), partial=st.booleans(), interleaved=st.booleans())
@settings(QUICKLY, max_examples=50)
def test_keys_before_rotary_embedding_are_rotated(shape, partial, interleaved):
    rotary = shape.key_dim // 2 if partial else shape.key_dim
    check(dataclasses.replace(shape, rotary=rotary, interleaved=interleaved))


def check_axes(shape: Shapes, axes: int, samples: int | None = None) -> None:
    """Tables of angles per axis, against the same angles of every slot."""
    arguments = attention_arguments(dataclasses.replace(shape, rotary=shape.rotary or shape.key_dim))
    random = torch.Generator().manual_seed(shape.seed)
    samples, slots, rows = samples or shape.batch, sum(shape.segments), 7
    positions = torch.randint(rows, (samples, axes, slots), generator=random) + rows * torch.arange(axes)[:, None]
    keys = arguments["keys"]
    pairs = keys.angles.cos.shape[2]
    wide = attention_arguments(dataclasses.replace(shape, batch=samples, segments=(rows * axes,), rotary=2 * pairs))
    owner = torch.randint(axes, (pairs,), generator=random)
    elsewhere = torch.arange(rows * axes)[:, None] // rows != owner
    given = wide["keys"].angles
    cos, sin = (each.masked_fill(elsewhere, 0) for each in (given.cos, given.sin))
    tables = Angles(cos, sin, positions, shape.interleaved)
    by_slot = Angles(*per_slot(tables, 0, slots), None, shape.interleaved)
    arguments["keys"] = dataclasses.replace(keys, angles=by_slot)
    expected, expected_weights = reference.attention_weights(**arguments)
    arguments["keys"] = dataclasses.replace(keys, angles=tables)
    out, _ = attend.attention(**arguments)
    assert_close(out, expected, floor=ATTENTION_FLOOR)
    if shape.queries > 1:
        return  # the kernels keep the weights of one query
    out, weights = attend.attention(**arguments, weights=True)
    assert_close(out, expected, floor=ATTENTION_FLOOR)
    assert_close(weights, expected_weights, shape.dtype)


@given(shape=shapes(queries=1), axes=st.integers(1, 3), interleaved=st.booleans(), numbers=st.sampled_from([0, 2**13]))
@settings(QUICKLY, max_examples=15)
def test_keys_before_rotary_embedding_are_split_by_axis(shape, axes, interleaved, numbers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unrotated, "SPLIT_NUMBERS", numbers)
        check_axes(dataclasses.replace(shape, interleaved=interleaved), axes)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        (Shapes(batch=2, segments=(40, 33), queries=3, group=2, ragged=True, mask="bool"), 3),
        (Shapes(batch=2, segments=(40,), key_rank=70, key_dim=128, value_rank=40, dtype=torch.bfloat16), 2),
        (Shapes(segments=(40,), rotary=8), 2),  # the other ways rebuild the keys: partial rotary,
        (Shapes(segments=(40,), queries=9, group=2), 2),  # many query rows,
        (Shapes(segments=(40,)), 1),  # an axis as long as the tokens,
        (Shapes(segments=(40,)), 5),  # many axes,
        (Shapes(segments=(150,), key_rank=140, key_dim=256), 2),  # high rank
    ],
)
def test_shapes_with_axes(shape, axes, monkeypatch):
    check_axes(shape, axes)
    check_axes(shape, axes, samples=1)
    monkeypatch.setattr(unrotated, "SPLIT_NUMBERS", 2**13)
    check_axes(shape, axes)


@pytest.mark.parametrize("rotary", [0, 64])
@pytest.mark.parametrize("rank", [8, 20, 96, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ranks(rank, rotary, dtype):
    check(Shapes(rotary=rotary, key_rank=rank, value_rank=rank // 2, key_dim=64, segments=(300,), dtype=dtype))


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (1, 8), (4, 7), (40, 1), (2, 40)])
def test_head_counts(heads, group):
    check(Shapes(heads=heads, group=group, segments=(40,), mask="additive", mask_shape=(True, True, True, True)))


@pytest.mark.parametrize(
    ("heads", "group", "tokens", "shared"),
    [(8, 1, 150, 4), (4, 4, 150, 4), (2, 7, 150, 2), (6, 8, 150, 2), (3, 1, 150, 1), (4, 9, 150, 1), (4, 1, 30, 2)],
)
def test_keys_of_several_heads_are_rebuilt_by_one_program(heads, group, tokens, shared, monkeypatch):
    taken, choose = [], unrotated._heads_of_a_program
    monkeypatch.setattr(unrotated, "_heads_of_a_program", lambda *given: taken.append(choose(*given)) or taken[-1])
    long = {"segments": (tokens - 10, 10), "kept": 30, "ragged": True, "batch": 1}
    masked = {"mask": "additive", "mask_shape": (True, True, True, True)}
    check(Shapes(heads=heads, group=group, rotary=8, key_dim=24, key_rank=40, interleaved=group == 1, **long, **masked))
    assert set(taken) == {shared}


@pytest.mark.parametrize("dim", [16, 80, 96, 256])
@pytest.mark.parametrize("rotary", [False, True])
def test_head_dims(dim, rotary):
    check(Shapes(key_dim=dim, value_dim=256 // dim * 16, segments=(40,), rotary=dim if rotary else 0))


@pytest.mark.parametrize("rotary", [0, 16])
def test_many_splits_of_segments_and_tail(rotary):
    check(Shapes(segments=(700, 450), kept=150, appended=200, batch=2, ragged=True, mask="bool", rotary=rotary))


@pytest.mark.parametrize("rotary", [0, 16])
def test_many_queries(rotary):
    check(Shapes(queries=70, group=2, segments=(50, 30), mask="bool", rotary=rotary))


@pytest.mark.parametrize("cos_batch", [1, 2])
def test_rotation_shared_by_the_batch(cos_batch):
    shape = Shapes(batch=2, rotary=8, segments=(5, 7))
    keys = attention_arguments(shape)["keys"]
    angles = dataclasses.replace(keys.angles, cos=keys.angles.cos[:cos_batch], sin=keys.angles.sin[:cos_batch])
    check(shape, keys=dataclasses.replace(keys, angles=angles))


@pytest.mark.parametrize("rotary", [0, 16])
def test_rows_whose_every_token_is_masked_are_zero(rotary):
    arguments = attention_arguments(Shapes(queries=3, mask="bool", rotary=rotary))
    mask = torch.ones_like(arguments["mask"])
    mask[..., 1:, :] = False
    out, weights = attend.attention(**arguments | {"mask": mask}, weights=True)
    assert out[:, :, 1:].eq(0).all() and out[:, :, 0].ne(0).any() and out.isfinite().all()
    assert weights.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotary", [0, 16])
def test_masks_with_the_smallest_number_instead_of_infinity(dtype, rotary):
    shape = Shapes(dtype=dtype, mask="additive", queries=2, ragged=True, rotary=rotary)
    check(shape, mask=attention_arguments(shape)["mask"].clamp(min=torch.finfo(dtype).min))


def test_nothing_to_attend_to_gives_zeros():
    arguments = attention_arguments(Shapes(segments=(), kept=0, appended=0))
    out, weights = attend.attention(**arguments, weights=True)
    assert out.eq(0).all() and weights.shape == (1, 0)


def test_filler_and_what_lies_beyond_the_tail_are_never_read():
    arguments = attention_arguments(Shapes(ragged=True, segments=(12,), kept=4, batch=2))
    out, _ = attend.attention(**arguments)
    for name in ("keys", "values"):
        arguments[name].tail[arguments[name].length :] = float("nan")
    assert torch.equal(out, attend.attention(**arguments)[0])


@pytest.mark.parametrize("transposed", [(1, 2), (2, 3)])
def test_strided_queries(transposed):
    shape = Shapes(batch=2, queries=3, heads=3)
    query = attention_arguments(shape)["query"]
    check(shape, query=query.transpose(*transposed).contiguous().transpose(*transposed))


@pytest.mark.parametrize(("side", "name"), [("keys", "tail"), ("values", "tail"), ("keys", "index")])
@pytest.mark.parametrize("rotary", [0, 16])
@pytest.mark.parametrize("fused", [False, True])
def test_strided_tails_and_indices(side, name, rotary, fused, monkeypatch):
    monkeypatch.setattr(attend, "fits_fused", lambda problem: fused)
    shape = Shapes(batch=2, heads=3, rotary=rotary, ragged=True, mask="bool")
    parts = attention_arguments(shape)[side]
    strided = getattr(parts, name).transpose(0, 1).contiguous().transpose(0, 1)
    check(shape, **{side: dataclasses.replace(parts, **{name: strided})})


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_masks_with_fewer_dims(dims):
    shape = Shapes(mask="bool", queries=3)
    mask = attention_arguments(shape)["mask"][0, 0]
    check(shape, mask=mask[(None,) * (dims - 2)] if dims > 1 else mask[0])


def test_only_what_the_kernels_were_made_for_is_taken():
    def takes(shape=None, **changes):
        return taken(attention_arguments(shape or Shapes()) | changes)

    assert takes() and takes(Shapes(segments=(0, 3, 4)))
    assert not takes(Shapes(segments=(2, 3, 4)))
    assert not takes(Shapes(key_dim=272))
    assert not takes(Shapes(kept=5, value_rows=((1, RowForm(0)),)))
    more = attention_arguments(Shapes(segments=(13,)))
    assert not takes(values=more["values"])  # than there are keys in segments
    assert not takes(query=torch.randn(1, 2, 1, 16, dtype=torch.float16))
    two = Shapes(batch=2)

    def shared(shape, name):
        parts = attention_arguments(shape)[name]
        return {name: map_blocks(parts, lambda block: dataclasses.replace(block, basis=block.basis[:1]))}

    assert takes(two) and takes(two, **shared(two, "keys")) and takes(two, **shared(two, "values"))
    turned = dataclasses.replace(two, rotary=16)
    assert takes(turned, **shared(turned, "keys"))


def test_which_codes_are_taken():
    def takes(**changes):
        return taken(attention_arguments(dataclasses.replace(Shapes(), **changes)))

    four = ((1.0, 4), (0.5, 0))
    assert takes(key_cuts=four) and takes(value_cuts=four) and takes(segments=(5, 7), key_cuts=four, value_cuts=four)
    assert not takes(segments=(5, 7), key_cuts=((1.0, 4),) * 3, key_rank=9)  # six blocks
    assert takes(key_cuts=four, rotary=16) and takes(key_cuts=four, rotary=16, axes=3) and not takes(owned=1)
    assert not takes(key_cuts=four, rotary=16, interleaved=True) and not takes(key_cuts=four, rotary=4)
    assert not takes(key_cuts=four, rotary=16, axes=5)
    rows = ((9, RowForm(4, group=8)),)
    assert takes(key_rows=rows, value_rows=rows) and takes(key_rows=rows, value_rows=rows, segments=())
    assert takes(key_rows=rows, value_rows=((8, RowForm(4, group=8)),)) and not takes(key_rows=rows)
    assert not takes(key_rows=rows * 2, value_rows=rows * 2, segments=())
    assert not takes(key_rows=rows, value_rows=rows, rotary=16)
    for extra in ({"outliers": True}, {"rank": 2}):
        other = ((9, RowForm(4, group=8, **extra)),)
        assert not takes(key_rows=other, value_rows=rows) and not takes(key_rows=rows, value_rows=other)


def test_rows_and_factors_are_not_taken_as_one_segment():
    coded = attention_arguments(Shapes(segments=(), key_rows=((12, RowForm(0)),), value_rows=((12, RowForm(0)),)))
    low_rank = attention_arguments(Shapes(kept=3))
    assert not taken(low_rank | {"keys": coded["keys"]})
