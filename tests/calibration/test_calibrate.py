"""One budget becomes a policy: tiny models show what is counted and refused, the trained one what it is worth."""

import pytest
import torch
import transformers

import attnpack_fx
from attnpack_fx import PackedTensor, PackPolicy, calibrate, hf
from attnpack_fx.calibration import calibrate as module
from attnpack_fx.calibration.capture import Observed, Read
from attnpack_fx.calibration.trial import Forced, generated
from tests.acceptance.families import FAMILIES
from tests.zoo import ZOO

TOKENS = 5


@pytest.fixture(autouse=True)
def one_graph_prefills(without_inductor, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def parts_of(cache) -> list[PackedTensor]:
    found = [each for pair in hf.keys_and_values(cache) for each in pair if isinstance(each, PackedTensor)]
    assert found
    return found


def factor_bytes(cache) -> int:
    """Bytes of factors and scales of the packed parts of a cache of one sample."""
    blocks = [block for packed in parts_of(cache) for block in packed.held.blocks]
    tensors = [part for b in blocks for part in (b.coefficient, b.basis, b.scale) if part is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def angle_bytes(cache) -> int:
    """Bytes of cos and sin of the packed tokens, each copy once."""
    angles = {id(packed.held.angles): packed.held.angles for packed in parts_of(cache) if packed.held.angles}
    return sum(tensor.untyped_storage().nbytes() for each in angles.values() for tensor in each.tensors)


def run(model, inputs, policy, tokens=None):
    """What `generate` returns through the backend; with `tokens`, these and no others."""
    cache = hf.empty_cache(model)
    more = {} if tokens is None else {"logits_processor": [Forced(tokens, cache, {}, None)]}
    before = model._compiled_call_impl
    attnpack_fx.compile(model, policy=policy)
    try:
        return generated(
            model, inputs, TOKENS if tokens is None else tokens.shape[1], **hf.cache_argument(cache), **more
        )
    finally:
        model._compiled_call_impl = before


def divergence(dense, packed) -> float:
    left, right = (torch.stack(out.logits, 1)[:, 1:].log_softmax(-1) for out in (dense, packed))
    return float((left.exp() * (left - right)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [("llava-mha", False), ("qwen2-vl", True)])
def test_policy_is_within_its_budget_and_as_good_as_reported_when_really_run(name, text, tmp_path):
    model = ZOO[name].build("sdpa")
    inputs = ZOO[name].inputs(1, 0)
    before = model._compiled_call_impl
    policy, report = calibrate(model, [inputs], budget=0.35, new_tokens=TOKENS, text=text, report=True)
    assert model._compiled_call_impl is before
    assert isinstance(policy, PackPolicy) and len(policy.layers) == 2
    assert all((plan.text is not None) == text and plan.vision is not None for plan in policy.layers)
    assert not report.notes

    policy.save(tmp_path / "policy.json")
    loaded = PackPolicy.load(tmp_path / "policy.json")
    assert loaded == policy
    dense = generated(model, inputs, TOKENS)
    packed = run(model, inputs, loaded, dense.sequences[:, -TOKENS:])
    assert factor_bytes(packed.past_key_values) == report.bytes <= 0.35 * report.dense_bytes
    assert angle_bytes(packed.past_key_values) == report.shared_bytes
    best, *others = report.candidates
    assert best.name == report.chosen and best.bytes == report.bytes
    assert all(best.divergence <= other.divergence for other in others)
    assert sum(other.name.startswith("uniform") for other in report.candidates) >= 4
    assert divergence(dense, packed) == pytest.approx(best.divergence, rel=1e-2, abs=1e-7)


def test_batches_padding_and_half_precision():
    example = ZOO["llava-mha"]
    model = example.build("sdpa").to(torch.bfloat16)
    inputs = example.inputs(2, 3)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    policy, report = calibrate(model, [inputs], max_error=0.4, new_tokens=TOKENS, report=True)
    assert report.error <= 0.4 and len(policy.layers) == 2
    assert (report.samples, report.queries) == (2, 2 * (TOKENS - 1))
    assert report.dense_bytes == 2 * 2 * 16 * 64 * 2  # layers, keys and values, tokens, H * D, bytes
    assert report.bytes < report.dense_bytes
    text = str(report)
    assert "expected relative error" in text and "KL" in text and f"{report.bytes:,} packed" in text


def test_text_alone_is_packed_where_asked_for():
    example = ZOO["gpt2"]  # its output projection is an addmm, and it has no rotary embedding
    model, inputs = example.build("sdpa"), example.inputs(1, 0)
    policy, report = calibrate(model, [inputs], budget=0.5, new_tokens=TOKENS, text=True, report=True)
    assert all(plan.vision is None and plan.text is not None for plan in policy.layers)
    assert not report.notes and report.shared_bytes == 0


def observed(vision: bool) -> Observed:
    """One layer of five tokens, of which the second and third are vision tokens if any."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn((1, 2, 6, 4), generator=generator) for _ in range(2))
    mask = torch.tensor([[False, vision, vision, False, False]])
    reads = [Read(torch.randn((1, 2, 1, 4), generator=generator), 6, None)]
    return Observed(key, value, 5, None, mask, None, None, 0.5, reads)


def study(vision: bool, text: bool) -> module._Study:
    made = module._Study(text, 2)
    made.observer.layers = {0: observed(vision)}
    made._weigh(0, [True])
    return made


def test_prompts_without_vision_tokens_need_text():
    with pytest.raises(ValueError, match="no vision token is seen, with text=False"):
        study(vision=False, text=False).parts()
    assert {part.modality for part in study(vision=False, text=True).parts()} == {"text"}
    assert {part.modality for part in study(vision=True, text=True).parts()} == {"vision", "text"}
    (key, value) = study(vision=True, text=False).parts()
    assert (key.role, value.role, key.tokens, len(key.effects["rotated"])) == ("key", "value", 2, 2)


def test_an_output_projection_that_is_not_found_is_noted():
    made = study(vision=True, text=False)
    parts = made.parts()
    (plan, *_) = module._plans(parts, 1, made.budget(parts, 0.9), None, "fidelity")
    (note,) = made.report(parts, [(0.0, plan, PackPolicy())], plan).notes
    assert "layer 0: the output projection is not recognised" in note


def test_a_model_whose_layers_stay_dense_is_refused():
    example = ZOO["mistral-sliding"]
    with pytest.raises(ValueError, match=r"samples\[0\]: the backend packs no layer of this model"):
        calibrate(example.build("sdpa"), [example.inputs(1, 0)], budget=0.5, new_tokens=TOKENS, text=True)


def test_calibrated_is_better_than_uniform_on_a_trained_model():
    pytest.importorskip("sklearn")
    from attnpack_cli.models import trained_model
    from attnpack_fx.demo import digits
    from attnpack_fx.demo.load import batch_inputs, load

    loaded = load(str(trained_model()))
    asked = digits.held_out_questions("read", 2, 2, 7, "train")
    samples = [batch_inputs(loaded, [each.prompt], [each.images]) for each in asked[:1]]
    _, report = calibrate(loaded.model, samples, budget=1 / 32, new_tokens=8, report=True)
    assert report.chosen == "calibrated"
    uniform = [each.divergence for each in report.candidates if each.name.startswith("uniform")]
    assert report.candidates[0].divergence < 0.5 * min(uniform)
    assert report.candidates[0].divergence < 0.01
    assert report.shared_bytes > 0


class Nothing(torch.nn.Module):
    """Has what a model is known by, and cannot be run."""

    config = transformers.LlamaConfig()

    def generate(self) -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got budget=None and max_error=None, expected one of them"),
        ({"budget": 0.1, "max_error": 0.1}, "got budget=0.1 and max_error=0.1, expected one of them"),
        ({"budget": 0}, "budget: got 0, expected a share"),
        ({"budget": 1.5}, "budget: got 1.5, expected a share"),
        ({"budget": True}, "budget: got True, expected a share"),
        ({"max_error": -1}, "max_error: got -1, expected a number >= 0"),
        ({"budget": 0.1, "new_tokens": 1}, "new_tokens: got 1, expected an int >= 2"),
        ({"budget": 0.1, "prefer": "both"}, "prefer: got 'both', expected"),
        ({"budget": 0.1, "text": 1}, "text: got 1, expected a bool"),
        ({"budget": 0.1}, "samples: got none, expected at least one prompt"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(Nothing(), [], **options)


def test_bad_models_and_samples_are_refused():
    with pytest.raises(ValueError, match="model: got Linear, expected a transformers model with generate"):
        calibrate(torch.nn.Linear(1, 1), [], budget=0.1)
    with pytest.raises(ValueError, match=r"samples\[0\]: got Tensor, expected a mapping"):
        calibrate(Nothing(), [torch.zeros(1)], budget=0.1)


def test_nothing_after_the_end_counts():
    tokens = torch.tensor([[5, 2, 0, 2], [2, 0, 0, 0], [5, 6, 7, 8]])
    expected = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert module._alive(tokens, 2).tolist() == expected
    assert module._alive(tokens, [2, 9]).tolist() == expected
    assert module._alive(tokens, None).all()


@pytest.mark.slow
def test_layers_without_a_number_are_said_to_be_missing():
    """Qwen3-VL's prefill, where not all layers take deepstack features, shows each layer alone."""
    family = FAMILIES["qwen3-vl"]
    with pytest.raises(NotImplementedError, match="number of the layer is not known"):
        calibrate(family.build(), [family.inputs(0)], budget=0.5, new_tokens=3)
