"""`explain` runs a model once dense and once packed, and says what became of every site and layer."""

import json

import pytest
import torch
import transformers
from torch import nn

from attnpack_fx import PackPolicy, explain
from tests.decoder import Decoder, prompt
from tests.packing_inputs import FULL

REPORT_KEYS = {
    *("policy", "graphs", "layers", "fastest", "bytes_before", "bytes_after"),
    *("processes", "bytes_before_in_all", "bytes_after_in_all"),
}
LAYER_KEYS = {"layer", "tokens", "key_rank", "value_rank", "key_space", "key_error", "value_error", "fold_error"}
LAYER_KEYS |= {"bytes", "dense_bytes", "dense_step", "packed_step"}


POLICY = PackPolicy(vision_rank=4, skip_layers=(1,))


@pytest.fixture(scope="module")
def decoder_report():
    """A hand-written module with one layer that is packed and one that is not, which has a sliding window."""
    from attnpack_fx import backend

    torch._dynamo.reset()
    model = Decoder(windows=(None, 4))
    ids, features = prompt(text=8, vision=40)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(match="the policy leaves this layer dense"):
        patch.setattr(backend, "_inductor", lambda module, examples, patches: module)
        yield explain(model, policy=POLICY, ids=ids, features=features)


def test_the_report_is_a_plain_dict(decoder_report):
    assert isinstance(decoder_report, dict)
    assert set(decoder_report) == REPORT_KEYS
    assert json.loads(json.dumps(decoder_report)) == decoder_report
    assert decoder_report["policy"] == POLICY.to_dict()


def test_every_site_is_listed_with_what_became_of_it(decoder_report):
    (sites,) = decoder_report["graphs"]
    assert [site["action"] for site in sites] == ["compressed", "dense"]
    assert "the policy leaves" in sites[1]["reason"]
    assert [site["layer"].split(".")[-1].strip("]['") for site in sites] == ["0", "1"]


def test_every_layer_has_its_tokens_ranks_bytes_and_error(decoder_report):
    packed, sliding = decoder_report["layers"]
    assert set(packed) == set(sliding) == LAYER_KEYS
    assert packed["tokens"] == {"vision": 40, "dense": 8}
    assert packed["key_rank"] == packed["value_rank"] == {"vision": 4}
    assert 0 < packed["key_error"] < 1 and 0 < packed["value_error"] < 1
    assert packed["bytes"] < packed["dense_bytes"]
    assert sliding["tokens"] == {"dense": 4}
    assert sliding["key_error"] is None and sliding["bytes"] == sliding["dense_bytes"]


def test_bytes_are_those_of_all_layers(decoder_report):
    layers = decoder_report["layers"]
    assert decoder_report["bytes_before"] == sum(layer["dense_bytes"] for layer in layers)
    assert decoder_report["bytes_after"] < decoder_report["bytes_before"]


def test_the_report_prints_sites_layers_and_totals(decoder_report):
    text = str(decoder_report)
    assert "compressed" in text and "the policy leaves" in text
    assert "vision 40, dense 8" in text and "vision 4/4" in text
    assert f"{decoder_report['bytes_before']:,} bytes dense" in text
    assert "x smaller" in text
    assert "attention of a decode step" in text and "this policy" in text and "dense keys and values" in text


def test_steps_are_predicted_and_measured_where_a_layer_is_packed(decoder_report):
    packed, sliding = decoder_report["layers"]
    for name in ("dense_step", "packed_step"):
        assert set(packed[name]) == {"predicted", "measured"} and min(packed[name].values()) > 0
        assert sliding[name] is None
    times = [each["milliseconds"] for each in decoder_report["fastest"]]
    assert times == sorted(times) and len(times) >= 2


def test_the_error_is_that_of_the_stored_tokens(without_inductor):
    ids, features = prompt(text=8, vision=40)
    errors = [
        explain(Decoder(layers=1), policy=PackPolicy(vision_rank=rank), ids=ids, features=features)["layers"][0][
            "key_error"
        ]
        for rank in (2, 8, "full")
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_is_left_as_it_was_found(compiled, without_inductor):
    model = Decoder(layers=1)
    if compiled:
        model.compile(backend="eager")
    before = model._compiled_call_impl
    explain(model, policy=FULL, **dict(zip(("ids", "features"), prompt(), strict=True)))
    assert model._compiled_call_impl is before
    assert all(module._compiled_call_impl is None for module in model.children())


def test_the_model_is_left_as_it_was_found_after_an_error(without_inductor):
    model = Decoder(layers=1)
    with pytest.raises(TypeError):
        explain(model, nothing=1)
    assert model._compiled_call_impl is None


def test_what_torch_compile_returned_is_explained_too(without_inductor):
    report = explain(torch.compile(Decoder(layers=1)), policy=FULL, ids=prompt()[0])
    assert report["layers"][0]["tokens"] == {"text": 16, "dense": 0}


def test_a_transformers_model_is_run_through_generate(without_inductor):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    input_ids = torch.randint(3, 64, (1, 9))
    report = explain(model, policy=FULL, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    actions = [[site["action"] for site in sites] for sites in report["graphs"]]
    assert actions == [["compressed"] * 2, ["packed"] * 2]
    assert [layer["tokens"] for layer in report["layers"]] == [{"text": 9, "dense": 2}] * 2
    assert all(layer["key_error"] < 1e-5 and layer["value_error"] < 1e-5 for layer in report["layers"])
    assert "compressed, packed" in str(report)
    assert model._compiled_call_impl is None


def test_a_model_without_a_cache_reports_no_bytes(without_inductor):
    class Encoder(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x * 1.0, x * 2.0, x * 3.0).sum()

    report = explain(Encoder(), x=torch.randn(1, 2, 3, 4))
    assert [[site["action"] for site in sites] for sites in report["graphs"]] == [["uncached"]]
    assert (report["layers"], report["bytes_after"]) == ([], 0)
    assert "no cache" in str(report)
