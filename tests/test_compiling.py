"""`attnpack_fx.compile` takes a model in any form, compiles it in place, and refuses bad options at once."""

import pytest
import torch

import attnpack_fx
from attnpack_fx import PackedTensor, PackPolicy, backend, hf
from tests.acceptance.families import FAMILIES
from tests.decoder import Decoder, close, prompt

OPTIONS = {"vision_rank": "full", "strict": True}


def assert_packs(model) -> None:
    ids, features = prompt()
    expected, _ = Decoder()(ids, features)
    logits, cache = model(ids, features)
    close(logits, expected)
    assert all(isinstance(key, PackedTensor) for key, _ in cache)


def test_a_module_is_compiled_in_place(without_inductor):
    model = Decoder()
    assert attnpack_fx.compile(model, **OPTIONS) is model
    assert_packs(model)


def test_a_wrapper_gives_its_original_back_compiled(without_inductor):
    model = Decoder()
    wrapper = torch.compile(model)
    assert attnpack_fx.compile(wrapper, **OPTIONS) is model
    assert_packs(model)


def test_a_policy_is_taken_whole(without_inductor):
    model = attnpack_fx.compile(Decoder(), policy=PackPolicy(vision_rank="full", strict=True))
    assert_packs(model)


def test_mode_and_inductor_options_reach_inductor(monkeypatch, fresh_dynamo):
    seen = []
    monkeypatch.setattr(backend, "_inductor", lambda module, examples, patches: seen.append(patches) or module)
    model = attnpack_fx.compile(Decoder(), mode="max-autotune-no-cudagraphs", epilogue_fusion=False, **OPTIONS)
    assert_packs(model)
    assert seen[0]["max_autotune"] is True
    assert seen[0]["epilogue_fusion"] is False
    assert not OPTIONS.keys() & seen[0].keys()


def test_fullgraph_is_passed_on(without_inductor):
    model = attnpack_fx.compile(Decoder(broken=True), fullgraph=True, **OPTIONS)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(*prompt())


@pytest.mark.slow
def test_sizes_that_are_all_dynamic(without_inductor):
    """The softmax scale, an attribute of the model, is then an input of the graph as well."""
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs(0)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **settings).sequences
    attnpack_fx.compile(model, dynamic=True, text_rank="full", strict=True)
    out = model.generate(**inputs, **settings)
    assert torch.equal(out.sequences, expected)
    assert all(isinstance(key, PackedTensor) for key, _ in hf.keys_and_values(hf.cache_of(out)))


def test_a_function_is_refused():
    with pytest.raises(ValueError, match=r"got function, expected a torch\.nn\.Module; compile a function with"):
        attnpack_fx.compile(lambda x: x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vison_rank": 4}, "vison_rank.*did you mean 'vision_rank'"),
        ({"vision_rank": 0}, "vision_rank: got 0"),
        ({"mode": "fastest"}, "mode: got 'fastest'"),
        ({"policy": PackPolicy(), "text_rank": 3}, "one or the other"),
        ({"dynamic": "yes"}, "dynamic: got 'yes', expected True or False"),
        ({"fullgraph": None}, "fullgraph: got None, expected True or False"),
        ({"options": {"vision_rank": 4}}, "options: got .* give its fields as arguments"),
        ({"backend": "attnpack"}, "backend: got 'attnpack'.* leave it out"),
    ],
)
def test_a_bad_option_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        attnpack_fx.compile(Decoder(), **options)


def test_a_refused_option_leaves_the_model_as_it_was():
    model = Decoder()
    with pytest.raises(ValueError):
        attnpack_fx.compile(model, vision_rank=-1)
    assert model._compiled_call_impl is None
