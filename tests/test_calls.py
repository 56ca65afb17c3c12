"""Every graph of a call knows its vision tokens, however the model is cut: between images, by layers, hooks or DDP.

Families that cut themselves are in tests/acceptance/test_further.py.
"""

import functools
import inspect
import warnings
from typing import Any

import pytest
import torch

import attnpack_fx
from attnpack_fx import AttnpackWarning, PackedTensor, hf, modality
from tests.acceptance.families import FAMILIES

OPTIONS: dict[str, Any] = {"vision_rank": "full", "text_rank": None}
GENERATE: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def stored(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[dict[str, int]]]:
    """The text, and where each layer holds its tokens; nothing for a dense one."""
    out = model.generate(**inputs, **GENERATE, return_dict_in_generate=True)
    layers = hf.keys_and_values(hf.cache_of(out))
    return out.sequences, [key.tokens if isinstance(key, PackedTensor) else {} for key, _ in layers]


def assert_vision(model: Any, inputs: dict[str, Any], expected: torch.Tensor, vision: int) -> None:
    sequences, layers = stored(model, inputs)
    assert torch.equal(sequences, expected)
    assert [tokens.get("vision") for tokens in layers] == [vision] * len(layers)


def llava() -> tuple[Any, dict[str, Any], torch.Tensor, int]:
    family = FAMILIES["llava-mha"]
    model, inputs = family.build(), family.inputs(0)
    return model, inputs, stored(model, inputs)[0], family.vision


def compile_layers(model: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.compile(backend="attnpack", options=OPTIONS)


def test_layers_compiled_one_by_one(either_way):
    model, inputs, expected, vision = llava()
    compile_layers(model)
    assert_vision(model, inputs, expected, vision)


@pytest.mark.slow
def test_more_layers_than_dynamo_compiles(without_inductor):
    model, inputs, _, _ = llava()
    compile_layers(model)
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.warns(AttnpackWarning, match="the 3 layers of this model"),
    ):
        stored(model, inputs)


def test_a_stated_mask_wins_over_what_graphs_and_ids_say(either_way):
    model, inputs, _, vision = llava()
    attnpack_fx.compile(model, **OPTIONS)
    assert all(tokens["vision"] == vision for tokens in stored(model, inputs)[1])
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, :10] = True
    with modality(mask):
        assert [tokens["vision"] for tokens in stored(model, inputs)[1]] == [10] * 3
    assert all(tokens["vision"] == vision for tokens in stored(model, inputs)[1])


def hooked(module: torch.nn.Module) -> None:
    """As accelerate does it: `forward` of every module is replaced by one that runs hooks Dynamo does not trace."""
    for each in module.modules():
        if not list(each.children()) or type(each).__name__.endswith("DecoderLayer"):
            own = each.forward

            @functools.wraps(own)
            def forward(*args: Any, own: Any = own, **kwargs: Any) -> Any:
                torch._dynamo.graph_break()
                return own(*args, **kwargs)

            each.forward = forward  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False], ids=["attnpack_fx.compile", "module.compile"])
def test_hooks_between_modules(ours, without_inductor):
    model, inputs, expected, vision = llava()
    hooked(model.model.language_model)
    with torch._dynamo.config.patch(recompile_limit=64):
        if ours:
            attnpack_fx.compile(model, **OPTIONS)
        else:
            model.compile(backend="attnpack", options=OPTIONS)
        assert_vision(model, inputs, expected, vision)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_buckets_of_distributed_data_parallel(process_group, either_way):
    """Dynamo cuts the graph where gradients of a bucket are reduced."""
    model, inputs, _, vision = llava()
    parallel = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
    parallel.compile(backend="attnpack", options=OPTIONS)
    with torch.no_grad():
        out = parallel(**inputs, use_cache=True)
    layers = hf.keys_and_values(hf.cache_of(out))
    assert [key.tokens["vision"] for key, _ in layers] == [vision] * 3


def test_an_image_and_a_video(either_way):
    """Qwen2.5-VL puts them into the prompt one after the other, with a graph break in between."""
    family = FAMILIES["qwen2.5-vl"]
    model, inputs = family.build(), dict(family.inputs(0))
    config, ids = model.config, inputs["input_ids"].clone()
    places = (ids[0] == config.image_token_id).nonzero()[:, 0]
    grid = inputs["image_grid_thw"][:1]
    patches = int(grid.prod())
    # The image again, as a video of one frame behind the prompt.
    video = torch.full((1, len(places)), config.video_token_id)
    edges = [torch.tensor([[each]]) for each in (config.vision_start_token_id, config.vision_end_token_id)]
    ids = torch.cat([ids[:1], edges[0], video, edges[1]], 1)
    kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": inputs["pixel_values"][:patches],
        "image_grid_thw": grid,
        "pixel_values_videos": inputs["pixel_values"][:patches].flip(0),
        "video_grid_thw": grid,
    }
    expected, _ = stored(model, given)
    model.compile(backend="attnpack", options=OPTIONS)
    assert_vision(model, given, expected, 2 * len(places))


@pytest.mark.slow
def test_images_of_a_later_turn_are_said_to_stay_dense(without_inductor):
    model, inputs, _, vision = llava()
    attnpack_fx.compile(model, **OPTIONS)
    with torch.no_grad():
        cache = hf.cache_of(model(**inputs, use_cache=True))
        twice = {"attention_mask": torch.cat([inputs["attention_mask"]] * 2, 1), **hf.cache_argument(cache)}
        with pytest.warns(AttnpackWarning, match="images of a later turn stay dense"):
            later = hf.cache_of(model(**inputs | twice, use_cache=True))
    (key, _), *_ = hf.keys_and_values(later)
    assert key.tokens["vision"] == vision and key.tokens["dense"] > vision


# ---- masks that change their mind --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes",
    [pytest.param((), id="all kept"), pytest.param((attnpack_fx.H2O(0.9),), id="H2O", marks=pytest.mark.slow)],
)
def test_a_token_masked_at_prefill_and_shown_later_is_refused(passes, without_inductor):
    model, inputs, _, _ = llava()
    attnpack_fx.compile(model, vision_rank="full", text_rank="full" if not passes else None, passes=passes)
    ids, shown = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    prompt = shown.clone()
    prompt[:, 25:28] = 0
    with torch.no_grad():
        cache = hf.cache_of(model(**inputs | {"attention_mask": prompt}, use_cache=True))
        step = {"input_ids": ids[:, -1:], **hf.cache_argument(cache)}
        one = torch.ones((1, 1), dtype=shown.dtype)
        model(**step, attention_mask=torch.cat([prompt, one], 1))
        with pytest.raises(RuntimeError, match=r"got \[0\] zeros among the \d+ tokens of the prompt"):
            model(**step, attention_mask=torch.cat([shown, one, one], 1))


# ---- what no graph ever had --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_layer_that_dynamo_skips_is_said_to_be_dense(without_inductor):
    model, inputs, expected, _ = llava()
    layer = model.model.language_model.layers[1]
    layer.forward = torch._dynamo.disable(layer.forward)
    attnpack_fx.compile(model, **OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sequences, layers = stored(model, inputs)
        stored(model, inputs)
    assert torch.equal(sequences, expected)
    assert [bool(tokens) for tokens in layers] == [True, False, True]
    told = [each for each in caught if "no compiled graph has their attention" in str(each.message)]
    assert len(told) == 1 and "layers 1 of the cache are dense" in str(told[0].message)
    assert told[0].filename == __file__


@pytest.mark.slow
def test_a_break_in_the_loop_over_more_layers_than_dynamo_compiles_a_function(without_inductor):
    """Qwen3-VL's prefill is a graph a layer."""
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this PyTorch has one limit for all")
    family = FAMILIES["qwen3-vl"]
    config = family.config()
    config.text_config.num_hidden_layers = 12
    model = family.model._from_config(config).eval()
    model.generation_config.eos_token_id = None
    attnpack_fx.compile(model, **OPTIONS)
    _, layers = stored(model, family.inputs(0))
    assert [tokens["vision"] for tokens in layers] == [family.vision] * 12


def test_a_warning_points_at_the_line_of_the_caller(without_inductor):
    model, inputs, _, _ = llava()
    attnpack_fx.compile(model, vision_rank=None)
    with pytest.warns(AttnpackWarning, match="stay dense|no attention site") as caught:
        stored(model, inputs)
    assert {each.filename for each in caught if each.category is AttnpackWarning} == {__file__}
