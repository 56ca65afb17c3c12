"""How many prompts fit into a memory: planned on small batches, held against larger ones."""

import functools

import pytest
import torch

import attnpack_fx
from attnpack_fx import PackPolicy, Quantize
from attnpack_fx.compiling import called_through
from attnpack_fx.plan_batch import BatchPlan, _measured, _repeated, plan_batch
from tests.zoo import ZOO

_CPU = torch.device("cpu")
_PLENTY = 1 << 30
POLICY = PackPolicy(vision_rank=4)


def check(family: str, policy: PackPolicy | None, new_tokens: int, batches: tuple[int, ...] = (12, 40)) -> None:
    """Never under what a larger batch takes, and at most a tenth over."""
    torch._dynamo.reset()
    model, example = ZOO[family].build("sdpa"), ZOO[family].inputs(1, 0)
    plan = plan_batch(model, policy, example, memory=_PLENTY, new_tokens=new_tokens)
    assert plan.weights == sum(each.nbytes for each in model.parameters()) + sum(
        each.nbytes for each in model.buffers()
    )
    backend = functools.partial(attnpack_fx.attnpack_backend, options={"policy": policy})
    with called_through(model, None if policy is None else backend):
        for batch in batches:
            prefill, decode, cache = _measured(model, _repeated(example, batch), new_tokens, _CPU)
            measured = plan.weights + max(prefill, decode)
            assert measured <= plan.peak(batch) <= 1.1 * measured
            assert cache == pytest.approx(batch * plan.cache, rel=0.1)


def test_a_dense_model_is_planned():
    check("llava-gqa", None, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "policy", "tokens"),
    [
        ("qwen2.5-vl", PackPolicy(vision_rank=4, text_rank=4, fold_every=8, recent=2), 20),
        ("gemma3", PackPolicy(vision_rank=4, passes=(Quantize(4),)), 40),
    ],
)
def test_larger_batches_take_what_is_planned(family, policy, tokens):
    check(family, policy, tokens, (24,))


def test_the_largest_batch_fits_and_one_more_does_not():
    plan = BatchPlan(0, 10**9, 10**8, 10**6, 3 * 10**6, 2 * 10**6, 10**6)
    assert plan.peak(100) == 10**8 + 10**6 + 3 * 10**8
    model, example = ZOO["llava-gqa"].build("sdpa"), ZOO["llava-gqa"].inputs(1, 0)
    found = plan_batch(model, None, example, memory=4_000_000, new_tokens=4)
    assert found.peak(found.batch) <= 0.95 * 4_000_000 < found.peak(found.batch + 1)
    assert f"batch {found.batch} at its peak" in str(found)
    none = plan_batch(model, None, example, memory=found.weights, new_tokens=4)
    assert none.batch == 0


@pytest.mark.slow
def test_the_model_is_left_as_it_was(without_inductor):
    model = attnpack_fx.compile(ZOO["llava-gqa"].build("sdpa"), policy=PackPolicy())
    before = model._compiled_call_impl
    plan_batch(model, POLICY, ZOO["llava-gqa"].inputs(1, 0), memory=_PLENTY, new_tokens=2)
    assert model._compiled_call_impl is before


def test_bad_input_is_refused():
    model, example = ZOO["llava-gqa"].build("sdpa"), ZOO["llava-gqa"].inputs(1, 0)
    with pytest.raises(ValueError, match="memory: got none for a model on cpu"):
        plan_batch(model, None, example)
    with pytest.raises(ValueError, match=r"example: got \['pixel_values'\], expected the arguments"):
        plan_batch(model, None, {"pixel_values": example["pixel_values"]}, memory=1)
    with pytest.raises(ValueError, match="new_tokens: got 1, expected an int of at least 2"):
        plan_batch(model, None, example, memory=1, new_tokens=1)
    for given, told in (
        ({"memory": "80GB"}, "memory: got '80GB', expected a number of bytes"),
        ({"memory": -5}, "memory: got -5"),
        ({"policy": {"vision_rank": 4}}, "policy: got dict, expected a PackPolicy"),
        ({"example": example | {"max_new_tokens": 4}}, "got max_new_tokens, which plan_batch sets itself"),
        ({"example": None}, "example: got NoneType"),
        ({"model": torch.nn.Linear(1, 1)}, "model: got Linear, expected a transformers model"),
    ):
        with pytest.raises(ValueError, match=told):
            plan_batch(**({"model": model, "policy": None, "example": example, "memory": 10**9} | given))


@pytest.mark.slow
def test_the_policy_is_that_of_the_model_behind_a_wrapper(without_inductor):
    model, example = ZOO["llava-gqa"].build("sdpa"), ZOO["llava-gqa"].inputs(1, 0)
    found = [
        plan_batch(each, PackPolicy(vision_rank=4), example, memory=10**8, new_tokens=2).cache
        for each in (model, torch.compile(model))
    ]
    assert found[0] == found[1] != plan_batch(model, None, example, memory=10**8, new_tokens=2).cache
