"""What a decode step costs, and the setting that is fastest at the same error. No time is asserted."""

from functools import lru_cache

import pytest
import torch

from attnpack_fx import PackedTensor, PackPolicy, Quantize, hf, pack, step_cost
from attnpack_fx.kernels import reference
from attnpack_fx.step_cost import Layer, _repacked, attention_arguments, dense_step, packed_step, step_costs
from tests.acceptance.families import FAMILIES
from tests.acceptance.families import LAYERS as COUNT

POLICY = PackPolicy(vision_rank=8)


@lru_cache
def cached(name: str, policy: PackPolicy | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The cache of a family's prompt."""
    import attnpack_fx

    torch._dynamo.reset()
    family = FAMILIES[name]
    model = family.build()
    if policy is not None:
        attnpack_fx.compile(model, policy=policy)
    with torch.no_grad():
        return hf.keys_and_values(hf.cache_of(model(**family.inputs(0), use_cache=True)))


def layers_of(name: str, policy: PackPolicy) -> list[Layer]:
    pairs = zip(cached(name, None), cached(name, policy), strict=True)
    heads = hf.query_heads(FAMILIES[name].build())
    assert heads == 8
    layers = [Layer(dense, packed, heads) for dense, packed in pairs]
    assert len(layers) == COUNT and all(isinstance(key, PackedTensor) for layer in layers for key in layer.packed)
    return layers


@pytest.fixture(params=["llava-gqa-padded", pytest.param("qwen2.5-vl", marks=pytest.mark.slow)])
def name(request: pytest.FixtureRequest, without_inductor: None) -> str:
    return str(request.param)


def test_the_packed_step_reads_what_is_packed(name: str) -> None:
    for layer in layers_of(name, POLICY):
        key, value = layer.packed
        found = torch.ops.attnpack.attention(*attention_arguments(layer.query, key.parts, value.parts))
        scale = layer.query.shape[-1] ** -0.5
        expected = reference.attention(layer.query, key.parts, value.parts, None, scale)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_step_is_predicted_and_measured(name: str) -> None:
    layer = layers_of(name, POLICY)[0]
    steps = dense_step(layer), packed_step(layer)
    assert all(step.predicted > 0 and step.measured > 0 for step in steps)
    # Bytes alone: eight columns of 256. What a call takes besides is measured, and the machine may have been busy.
    assert min(packed_step(layer).predicted for _ in range(3)) < steps[0].predicted * 8


def test_rotated_keys_at_the_rank_that_is_named_lose_no_more(name: str) -> None:
    policy, layers = POLICY, layers_of(name, POLICY)
    settings = step_costs(policy, layers)[1]
    assert [each.seconds for each in settings] == sorted(each.seconds for each in settings)
    others = [each.policy for each in settings if each.policy not in (policy, None)]
    assert {each.policy for each in settings} >= {policy, None} and len(others) == 1
    rank, of_values = others[0].vision_rank
    assert (others[0].key_space, of_values) == ("rotated", 8) and rank > 4
    for plain, layer in zip(cached(name, others[0]), layers, strict=True):
        errors = [float((key.dense() - layer.dense[0]).norm()) for key in (plain[0], layer.packed[0])]
        assert errors[0] <= 1.05 * errors[1]
    # One rank less would not do in the layer that asks for most.
    fewer = [_lost(layer, rank - 2) for layer in layers]
    assert any(
        lost > float((layer.packed[0].dense() - layer.dense[0]).norm())
        for lost, layer in zip(fewer, layers, strict=True)
    )


def _lost(layer: Layer, rank: int) -> float:
    key = layer.packed[0]
    parts = _repacked(layer, {"vision": rank})
    coefficient, basis = parts.segments[0].blocks[0].coefficient, parts.segments[0].blocks[0].basis
    made = torch.einsum("bnr,bhrd->bhnd", coefficient, basis)
    index = key.positions[:, : made.shape[2]]
    real = (index >= 0)[:, None, :, None]
    dense = layer.dense[0].gather(2, index.clamp(min=0)[:, None, :, None].expand_as(made))
    return float(((made - dense) * real).norm())


@pytest.mark.parametrize(
    "policy", [PackPolicy(text_rank=4), PackPolicy(text_rank=8, passes=(Quantize(),))], ids=["rotated", "codes"]
)
def test_where_no_other_key_space_is_offered(policy: PackPolicy) -> None:
    dense = torch.randn(2, 2, 2, 64, 16).unbind()
    found = step_costs(policy, [Layer(dense, pack(*dense, policy), 4)])[1]
    assert {each.policy for each in found} == {policy, None}


def test_no_rank_is_offered_that_would_stay_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cost, "_SLACK", 0.0)
    found = step_costs(POLICY, layers_of(name, POLICY))[1]
    assert {each.policy for each in found} == {POLICY, None}


def test_nothing_packed() -> None:
    assert step_costs(PackPolicy(), []) == ([], [])
