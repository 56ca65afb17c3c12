"""What a cache holds is as precise as the model computes: float64, half precision with large keys, autocast to bf16."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attnpack_fx import PackedTensor, PackPolicy, pack
from attnpack_fx.folding import fold
from attnpack_fx.packing import fresh_layer
from attnpack_fx.passes.storage import Columns, Stored
from tests.packing_inputs import dense_pair
from tests.zoo import ZOO, llava_config

FULL = {"vision_rank": "full", "text_rank": "full", "strict": True}
MANY = ((1024, 0),)

Model = transformers.PreTrainedModel


@pytest.fixture(autouse=True)
def fresh(fresh_dynamo: None) -> None:
    """No graph of an earlier test, whose dtype may be another."""


def generated(model: Model, inputs: dict[str, Tensor], tokens: int = 8) -> Any:
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, max_new_tokens=tokens, **settings)


def error(actual: Any, expected: Any) -> float:
    """The largest difference of a logit, as a part of the largest logit."""
    one, other = torch.stack(actual.logits).double(), torch.stack(expected.logits).double()
    return float((one - other).abs().max() / other.abs().max())


# ---- float64 -----------------------------------------------------------------------------------------------


def assert_equals_dense(name: str = "llava-gqa", **options: Any) -> None:
    model, inputs = ZOO[name].build("sdpa").double(), ZOO[name].inputs(2, 3)
    inputs = {key: each.double() if each.is_floating_point() else each for key, each in inputs.items()}
    expected = generated(model, inputs)
    model.compile(backend="attnpack", options=FULL | options)
    actual = generated(model, inputs)
    assert all(isinstance(layer.keys, PackedTensor) for layer in actual.past_key_values.layers)
    assert actual.past_key_values.layers[0].keys.dtype == torch.float64
    assert error(actual, expected) < 1e-12
    # From its own numbers alone: keys that were rounded to fp32 anywhere are 1e-8 off.
    for packed, dense in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        real = inputs["attention_mask"][:, None, :, None].bool()
        for one, other in ((packed.keys, dense.keys), (packed.values, dense.values)):
            kept = one.dense()[:, :, : real.shape[2]]
            assert ((kept - other[:, :, : real.shape[2]]) * real).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{"key_space": "rotated"}, {"key_space": "unrotated"}, {"bases": "batch"}])
def test_float64_at_full_rank_is_dense(options: dict[str, Any], without_inductor: None) -> None:
    assert_equals_dense(**options)


@pytest.mark.slow
def test_float64_through_inductor() -> None:
    """Of a model that is float64 throughout: Llama's norms are fp32, which compiled code rounds in its own way."""
    assert_equals_dense("gpt2")


def test_float64_of_low_rank_is_the_best_there_is() -> None:
    """Also where the fast factorisation of fp32 would do."""
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((200, 6), (6, 256)))
    key = (left @ right).unflatten(1, (4, 64)).transpose(0, 1)[None]
    packed, _ = pack(key, key, PackPolicy(text_rank=8))
    assert packed.ranks == {"text": 8}
    assert (packed.dense() - key).norm() < 1e-13 * key.norm()


def test_float64_folds() -> None:
    key, value = dense_pair(tokens=24, dtype=torch.float64)
    layer = fresh_layer(key, value, PackPolicy(text_rank="full"), modality=None, real=None, layer=0)
    more, _ = dense_pair(tokens=6, dtype=torch.float64, seed=1)
    pair = layer.key.append(more), layer.value.append(more)
    for packed, dense in zip(fold(*pair, 6, Stored(Columns(MANY), Columns(MANY)), None), (key, value), strict=True):
        assert packed.tokens["dense"] == 0
        assert (packed.dense() - torch.cat([dense, more], 2)).abs().max() < 1e-12


# ---- half precision ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_large_keys_and_values_in_half_precision() -> None:
    """Each number fits, the norms of rows do not; through Inductor."""
    model = ZOO["llava-gqa"].build("sdpa")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            # Powers of two: what attention returns stays as it was.
            for large, small in ((attention.k_proj, attention.q_proj), (attention.v_proj, attention.o_proj)):
                large.weight *= 2.0**13
                small.weight *= 2.0**-13
    model = model.half()
    inputs = ZOO["llava-gqa"].inputs(1, 0)
    inputs["pixel_values"] = inputs["pixel_values"].half()
    expected = generated(model, inputs)
    model.compile(backend="attnpack", options=FULL)
    actual = generated(model, inputs)
    norms = []
    for packed, dense in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for one, other in ((packed.keys, dense.keys), (packed.values, dense.values)):
            assert isinstance(one, PackedTensor)
            factors = [part for block in one.held.factors for part in (block.coefficient, block.basis)]
            assert all(part.isfinite().all() for part in (*factors, one.lease.buffer.rows[: one.lease.length]))
            norms.append(torch.linalg.vector_norm(other.float(), dim=(1, 3)).max())
    assert max(norms) > 65_504
    assert torch.stack(actual.logits).isfinite().all()
    assert error(actual, expected) < 0.02


# ---- autocast ----------------------------------------------------------------------------------------------


def forced(model: Model, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits after the prompt and after each of these tokens, float64 `[n, V]`."""
    with torch.no_grad():
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        logits = [out.logits[:, -1]]
        for token in tokens:
            out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[:, -1])
    return torch.cat(logits).double()


@pytest.mark.slow
@pytest.mark.parametrize("key_space", ["rotated", "unrotated"])
def test_autocast_to_bf16_is_as_precise_as_eager(key_space: str) -> None:
    """Tokens differ from eager's where two logits are within rounding: against fp32, either is as far off.

    A vision tower of two layers, under which that was seen. Through Inductor, whose rounding is part of it.
    """
    config = llava_config()
    config.vision_config.num_hidden_layers = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).eval()
    inputs = ZOO["llava-gqa"].inputs(1, 0)
    tokens = torch.arange(40, 56)
    exact = forced(model, inputs, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = forced(model, inputs, tokens)
        model.compile(backend="attnpack", options=FULL | {"key_space": key_space})
        packed = forced(model, inputs, tokens)
    of_eager, of_packed = ((each - exact).square().mean(1).sqrt() for each in (eager, packed))
    # Rounding to bf16 is seen at all, and the packed cache adds none to it.
    assert of_eager.mean() > 1e-4 * exact.abs().max()
    assert of_packed.mean() <= 1.1 * of_eager.mean()
    assert of_packed.max() <= 1.25 * of_eager.max()
