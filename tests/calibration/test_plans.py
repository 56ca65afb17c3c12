import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.calibration.plans import (
    Part,
    chosen_spaces,
    fitted,
    fitted_to_error,
    padded,
    planned,
    uniform,
)
from attnpack_fx.passes.storage import Columns
from attnpack_fx.storing import store


def part(role="value", layer=0, tokens=20, heads=2, dim=8, dtype_bits=32, decay=0.5, **effects) -> Part:
    rank = min(tokens, heads * dim)
    effects = effects or {"rotated": decay}
    spectra = {space: own ** torch.arange(rank, dtype=torch.float64) for space, own in effects.items()}
    return Part(layer, "vision", role, float(tokens), heads, dim, dtype_bits, spectra)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0, 8, 4, 2])), min_size=1, max_size=3),
    st.sampled_from([(9, 2, 8), (16, 1, 16)]),
)
def test_bytes_are_those_of_what_is_stored(blocks, shape):
    tokens, heads, dim = shape
    blocks = [(min(count, 3), bits) for count, bits in blocks]
    columns = Columns(tuple(blocks))
    generator = torch.Generator().manual_seed(0)
    coefficient = torch.randn((1, tokens, columns.rank), generator=generator)
    basis = torch.randn((1, heads, columns.rank, dim), generator=generator)
    segment, _ = store(coefficient, basis, columns)
    tensors = [t for b in segment.blocks for t in (b.coefficient, b.basis, b.scale) if t is not None]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert part(tokens=tokens, heads=heads, dim=dim).bytes(columns) == held


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.9), st.floats(0.3, 0.95), st.sampled_from([16, 32]))
def test_plans_stay_within_the_budget_and_errors_fall_with_it(share, decay, dtype_bits):
    parts = [part(decay=decay, dtype_bits=dtype_bits), part("key", decay=0.8, dtype_bits=dtype_bits)]
    budget = share * sum(each.dense_bytes for each in parts)
    try:
        plan = fitted("plan", parts, ["rotated"], budget)
    except ValueError as error:
        assert "what rank 1 of every packed matrix takes" in str(error)
        least = int(str(error).split("at least ")[1].split(",")[0])
        assert fitted("plan", parts, ["rotated"], least).bytes <= least
        return
    assert plan.bytes <= budget
    assert planned("plan", parts, plan.columns, ["rotated"]).error == plan.error
    for same in uniform(parts, 1, budget):
        assert same.bytes <= budget
        assert plan.error <= same.error + 1e-12
    (layer,) = plan.layers(parts)
    assert layer.vision.key == plan.columns[1] and layer.vision.value == plan.columns[0] and layer.text is None


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 2))
def test_fewest_bytes_for_an_error(max_error):
    parts = [part(), part("key", decay=0.8)]
    plan = fitted_to_error("plan", parts, ["rotated"], max_error)
    assert plan.error <= max_error
    assert plan.bytes >= fitted_to_error("plan", parts, ["rotated"], 10 * max_error).bytes


def test_keys_are_kept_where_they_err_less():
    spectra = [{"rotated": 0.8, "unrotated": 0.4}, {"rotated": 0.6, "unrotated": 0.61}, {"rotated": 0.5}]
    parts = [part("key", layer, **own) for layer, own in enumerate(spectra)]
    straight = ["unrotated"] * 3
    first = fitted("plan", parts, straight, 0.3 * sum(each.dense_bytes for each in parts))
    assert chosen_spaces(parts, 3, first, "fidelity") == ("unrotated", "rotated", "rotated")
    spectra[1] = {"rotated": 0.61, "unrotated": 0.6}
    parts = [part("key", layer, **own) for layer, own in enumerate(spectra)]
    assert chosen_spaces(parts, 3, first, "fidelity") == ("unrotated", "unrotated", "rotated")
    assert chosen_spaces(parts, 3, first, "speed") == ("unrotated", "rotated", "rotated")


def test_uniform_plans_have_one_rank_as_high_as_fits():
    parts = [part(), part("key", rotated=0.8, unrotated=0.7)]
    budget = 0.5 * sum(each.dense_bytes for each in parts)
    plans = uniform(parts, 1, budget)
    assert {plan.spaces for plan in plans} == {("rotated",), ("unrotated",)}
    for plan in plans:
        (columns,) = set(plan.columns)
        ((rank, bits),) = columns.blocks
        more = [Columns(((rank + 1, bits),))] * 2
        assert rank == 16 or planned("more", parts, more, plan.spaces).bytes > budget


def test_a_budget_below_rank_one_is_refused():
    with pytest.raises(ValueError, match=r"budget: got 10 bytes, expected at least .* what rank 1 of every packed"):
        fitted("plan", [part()], ["rotated"], 10)


def test_effects_of_shorter_samples_end_in_zeros():
    assert padded([torch.tensor([4.0, 2.0]), torch.tensor([2.0])]).tolist() == [3.0, 1.0]
