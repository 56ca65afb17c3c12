"""Pruned prefill of transformers models, against their own modules with hooks that leave out rows."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from attnpack_fx import backend
from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.state import SiteReport
from tests.decoder import close
from tests.passes.test_prune_tokens import compiled, fastv_rows, of_tokens
from tests.zoo import ZOO, _seeded, prompt

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ONE_TOKEN: dict[str, Any] = {
    "max_new_tokens": 1,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def oracle(name: str, inputs: dict[str, Tensor], number: int, ratio: float) -> tuple[Tensor, list[int]]:
    """Last logits `[1, V]` of one prompt, and how many rows each layer saw; padding stays among them."""
    model = ZOO[name].build("eager")
    decoder = model.model.language_model
    vision = (inputs["input_ids"] == 319)[0]
    kept: list[Tensor] = []
    seen: list[int] = []

    def attended(module, arguments, output):
        kept.append(fastv_rows(output[1][0, :, -1].double().mean(0), vision, ratio))

    def fewer(module, arguments, given, first):
        (hidden,) = arguments
        (rows,) = kept
        if first:
            module.whole, hidden = hidden, hidden[:, rows]
        cos, sin = given["position_embeddings"]
        mask = given["attention_mask"]
        given = given | {"position_embeddings": (cos[:, rows], sin[:, rows])}
        if mask is not None:
            given["attention_mask"] = mask[:, :, rows][..., rows]
        seen.append(hidden.shape[1])
        return (hidden,), given

    def back(module, arguments, output):
        whole = decoder.layers[number].whole.clone()
        whole[:, kept[0]] = output
        return whole

    decoder.layers[number - 1].self_attn.register_forward_hook(attended)
    for place, layer in enumerate(decoder.layers[number:]):
        layer.register_forward_pre_hook(partial(fewer, first=place == 0), with_kwargs=True)
    decoder.layers[-1].register_forward_hook(back)
    out = model.generate(**inputs, **ONE_TOKEN)
    return out.logits[0], seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch", "padding", "attention", "inductor"),
    [
        ("llava-mha", 1, 0, "sdpa", False),
        ("llava-gqa", 2, 3, "sdpa", False),
        ("llava-gqa", 2, 3, "eager", True),
        ("qwen2.5-vl", 2, 3, "sdpa", False),
        ("qwen2-vl", 1, 0, "sdpa", False),
        ("internvl", 2, 0, "sdpa", False),
    ],
)
def test_fastv_of_transformers_models(name, batch, padding, attention, inductor, request):
    """Through Inductor where tests/acceptance has no such case."""
    if not inductor:
        request.getfixturevalue("without_inductor")
    inputs = ZOO[name].inputs(batch, padding)
    reports: list[SiteReport] = []
    with torch.no_grad():
        expected = []
        for sample in range(batch):
            own = {key: value.chunk(batch)[sample] for key, value in inputs.items()}
            logits, seen = oracle(name, own, 1, 0.5)
            expected.append(logits)
        model = ZOO[name].build(attention)
        model.forward = compiled(model.forward, FastV(1, 0.5), reports)
        out = model.generate(**inputs, **ONE_TOKEN)
    assert of_tokens(reports) == [("pruned", "FastV")]
    close(out.logits[0], torch.cat(expected), 1e-5)
    # Padding leaves too: the longest sample decides how many rows there are.
    keys = out.past_key_values.layers[1].keys
    assert keys.slots == seen[0] and keys.shape[2] == inputs["input_ids"].shape[1]


@pytest.mark.slow
def test_images_of_different_number_with_padding(without_inductor):
    with _seeded(3):
        two = prompt(1, 0, (319, 16), (319, 16), tokens=12)
        one = prompt(1, 4, (319, 16), tokens=24)
        pixels = torch.randn(3, 3, 56, 56)
    inputs = {key: torch.cat([two[key], one[key]]) for key in two} | {"pixel_values": pixels}
    samples = [two | {"pixel_values": pixels[:2]}, one | {"pixel_values": pixels[2:]}]
    with torch.no_grad():
        expected = torch.cat([oracle("llava-gqa", sample, 1, 0.75)[0] for sample in samples])
        model = ZOO["llava-gqa"].build("sdpa")
        reports: list[SiteReport] = []
        model.forward = compiled(model.forward, FastV(1, 0.75), reports)
        out = model.generate(**inputs, **ONE_TOKEN)
    assert of_tokens(reports) == [("pruned", "FastV")]
    close(out.logits[0], expected, 1e-5)
    assert out.past_key_values.layers[1].keys.slots == 8 + 24  # of vision most in one sample, of text in the other


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-next", "smolvlm", "paligemma"])
def test_keeping_everything_changes_nothing(name, without_inductor):
    inputs = ZOO[name].inputs(2, 3)
    reports: list[SiteReport] = []
    with torch.no_grad():
        model = ZOO[name].build("sdpa")
        expected = model.generate(**inputs, **ONE_TOKEN)
        model.forward = compiled(model.forward, FastV(1, 0.0), reports)
        out = model.generate(**inputs, **ONE_TOKEN)
    assert of_tokens(reports) == [("pruned", "FastV")]
    close(out.logits[0], expected.logits[0], 1e-5)


@pytest.mark.slow
def test_prompts_of_any_length_and_number(monkeypatch):
    """The second length makes every size symbolic, and attention without a mask then sees how many rows there are."""
    behind: list[Any] = []
    inductor = backend._inductor

    def counted(module, examples, patches):
        if any("scatter_tokens" in str(node.target) for node in module.graph.nodes):
            behind.append(module)
        return inductor(module, examples, patches)

    monkeypatch.setattr(backend, "_inductor", counted)
    model = ZOO["llava-mha"].build("sdpa")
    reports: list[SiteReport] = []
    model.forward = compiled(model.forward, FastV(1, 0.5), reports)
    for batch, text in ((1, 12), (1, 17), (2, 20), (1, 30)):
        with _seeded(text), torch.no_grad():
            inputs = prompt(batch, 0, (319, 16), tokens=text) | {"pixel_values": torch.randn(batch, 3, 56, 56)}
            out = model.generate(**inputs, **ONE_TOKEN)
            for sample in range(batch):
                one = {key: value[sample : sample + 1] for key, value in inputs.items()}
                close(out.logits[0][sample : sample + 1], oracle("llava-mha", one, 1, 0.5)[0], 1e-5)
        assert out.past_key_values.layers[1].keys.slots == text + 8
    assert of_tokens(reports) == [("pruned", "FastV")] * 3  # one sample, any length, any number
    assert len(behind) == 3  # the layers behind the choice are compiled too, once each
