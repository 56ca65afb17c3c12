"""Codebooks and thresholds from samples: against the model's own projections and autograd, run eagerly."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx import PolicyError
from attnpack_fx.calibration.codebooks import calibrate_codebooks
from attnpack_fx.kernels.aten.codebook import ITERATIONS
from attnpack_fx.passes import codebook_file
from attnpack_fx.passes.kvquant import KVQuant, fixed_levels
from tests.kernels.coded import decoded
from tests.zoo import ZOO


@pytest.fixture(autouse=True)
def one_graph_prefills(without_inductor, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


def projected(model, inputs) -> list[list[tuple[Tensor, Tensor]]]:
    """What key and value projections of every layer give, `[N, H * D]` without padding, and its gradient: float64.

    The loss is the sum of cross-entropies of next tokens, where both tokens are no padding.
    """
    found: list[Tensor] = []

    def keep(module, inputs, output):
        output.retain_grad()
        found.append(output)

    layers = model.model.layers
    hooks = [
        projection.register_forward_hook(keep)
        for layer in layers
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    logits, ids, real = model(**inputs).logits, inputs["input_ids"], inputs["attention_mask"].bool()
    wanted = real[:, 1:] & real[:, :-1]
    F.cross_entropy(logits[:, :-1][wanted], ids[:, 1:][wanted], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    pairs = [(x.detach()[real].double(), x.grad[real].double()) for x in found]
    return [pairs[number : number + 2] for number in range(0, len(pairs), 2)]


def lloyd(numbers: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    for _ in range(ITERATIONS):
        nearest = (numbers[:, None] - levels).abs().argmin(1)
        mass = torch.zeros_like(levels).index_add_(0, nearest, weights)
        total = torch.zeros_like(levels).index_add_(0, nearest, weights * numbers)
        levels = torch.where(mass > 0, total / mass, levels)
    return levels


def distortion(numbers: Tensor, weights: Tensor, levels: Tensor) -> float:
    return float((weights * (numbers[:, None] - levels.double()).square().amin(1)).sum() / weights.sum())


@pytest.mark.parametrize("frozen", [False, True])
def test_as_projections_and_autograd_say(frozen, tmp_path):
    share, path = 0.1, str(tmp_path / "codebooks.safetensors")
    model = ZOO["llama"].build("sdpa")
    samples = [ZOO["llama"].inputs(2, 2), ZOO["llama"].inputs(1, 0)]
    expected = [[torch.cat([torch.stack(pair) for pair in each], 1) for each in zip(*layers, strict=True)]
                for layers in zip(*(projected(model, sample) for sample in samples), strict=True)]  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    before = model._compiled_call_impl
    method = calibrate_codebooks(model, samples, path, bits=4, outliers=share)
    assert method == KVQuant(4, share, codebooks=path)
    assert model._compiled_call_impl is before
    assert all(parameter.requires_grad != frozen and parameter.grad is None for parameter in model.parameters())

    found = codebook_file.read(path)
    assert sorted(found) == [0, 1]
    for number, ((keys, key_slopes), (values, value_slopes)) in enumerate(expected):
        own = found[number]
        heads, dim = own.low.shape
        # Keys: every channel without its outermost numbers.
        side = int(len(keys) * share / 2 + 0.5)
        inner = keys.sort(0).values[side : len(keys) - side]
        low, high = inner[0], inner[-1]
        assert torch.allclose(own.low.flatten().double(), low, atol=1e-4)
        assert torch.allclose(own.high.flatten().double(), high, atol=1e-4)
        inside = (keys >= low) & (keys <= high)
        normalised = (keys - (low + high) / 2) / ((high - low) / 2)
        numbers, weights = normalised[inside], key_slopes.square()[inside]
        start = fixed_levels(keys.view(1, -1, heads, dim), 4, share, True)
        best = distortion(numbers, weights, lloyd(numbers, weights, start.double()))
        assert distortion(numbers, weights, own.key) == pytest.approx(best, rel=0.05)
        assert distortion(numbers, weights, own.key) < distortion(numbers, weights, start)
        # Values: every token without its outermost numbers, ranges of every head.
        side = int(heads * dim * share / 2 + 0.5)
        place = values.argsort(1)
        kept = torch.zeros_like(values, dtype=torch.bool).scatter_(1, place[:, side : heads * dim - side], True)
        apart, mark = values.view(-1, heads, dim), kept.view(-1, heads, dim)
        low = apart.masked_fill(~mark, torch.inf).amin(2, keepdim=True)
        high = apart.masked_fill(~mark, -torch.inf).amax(2, keepdim=True)
        numbers = ((apart - (low + high) / 2) / ((high - low) / 2))[mark]
        weights = value_slopes.square().view_as(apart)[mark]
        start = fixed_levels(apart[None], 4, share, False)
        best = distortion(numbers, weights, lloyd(numbers, weights, start.double()))
        assert distortion(numbers, weights, own.value) == pytest.approx(best, rel=0.05)
        assert distortion(numbers, weights, own.value) < distortion(numbers, weights, start)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-mha", "qwen2-vl"])
def test_vision_language_models(name, tmp_path):
    model, inputs = ZOO[name].build("sdpa"), ZOO[name].inputs(1, 0)
    method = calibrate_codebooks(model, [inputs], tmp_path / "codebooks.safetensors", bits=2)
    own = codebook_file.read(method.codebooks)
    assert len(own) == 2
    for layer in own.values():
        assert layer.key.shape == layer.value.shape == (4,)
        assert (layer.low < layer.high).all()
        assert layer.key.abs().max() <= 1 and (layer.key.diff() > 0).all()
    heads, dim = own[0].low.shape
    middle, half = (own[0].high + own[0].low) / 2, (own[0].high - own[0].low) / 2
    rows = middle + half * (2 * torch.rand(1, 9, heads, dim, generator=torch.Generator().manual_seed(0)) - 1)
    found = decoded(method.encode(rows, "key", 0, True), dim)
    assert ((found - rows) / half).abs().max() < 1


def test_refusals(tmp_path):
    model, path = ZOO["llama"].build("sdpa"), tmp_path / "codebooks.safetensors"
    with pytest.raises(ValueError, match="bits: got 3"):
        calibrate_codebooks(model, [], path, bits=3)
    with pytest.raises(PolicyError, match="got 0 samples in which no layer's cache was seen"):
        calibrate_codebooks(model, [], path)
    with pytest.raises(PolicyError, match=r"samples\[0\]: got no input_ids"):
        calibrate_codebooks(model, [{"inputs_embeds": torch.zeros(1, 2, 64)}], path)
    assert not path.exists()
