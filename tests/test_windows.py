"""Layers with a sliding window: they hold the newest tokens, packed or not, and the memory of others is freed."""

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnpack_fx
from attnpack_fx import PackedTensor, PackPolicy, cache_bytes, hf, pack
from attnpack_fx.windows import compacted
from tests.acceptance.families import FAMILIES
from tests.acceptance.further import FURTHER

HEADS, DIM = 2, 8
LOSSLESS: dict[str, Any] = {"vision_rank": "full", "text_rank": "full"}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    prompt=st.integers(4, 60),
    window=st.integers(2, 50),
    vision=st.booleans(),
    steps=st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=40),
)
def test_the_newest_tokens_are_held(seed, batch, prompt, window, vision, steps):
    """Whatever is appended; samples may be repeated and dropped between."""
    random = torch.Generator().manual_seed(seed)

    def normal(tokens: int, samples: int) -> torch.Tensor:
        return torch.randn(samples, HEADS, tokens, DIM, generator=random)

    dense = [normal(prompt, batch)[:, :, -window:] for _ in range(2)]
    mask = torch.rand(batch, dense[0].shape[2], generator=random) < 0.6
    policy = PackPolicy(vision_rank="full", text_rank=None if vision else "full")
    pair = list(pack(*dense, policy, modality=mask))
    for count, forked in steps:
        rows = torch.tensor([batch - 1, 0]) if forked else torch.arange(len(dense[0]))
        for number in range(2):
            rows = rows.clamp(max=len(dense[number]) - 1)
            new = normal(count, len(rows))
            dense[number] = torch.cat([dense[number][rows], new], 2)[:, :, -window:]
            pair[number] = torch.cat([pair[number].index_select(0, rows), new], 2)[:, :, -window:]
        pair = list(compacted(*pair))
        for packed, expected in zip(pair, dense, strict=True):
            assert isinstance(packed, PackedTensor)
            close(packed.dense(), expected)
            assert packed.held.left < 8


GENERATE: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}


def generated(model: Any, inputs: dict[str, Any], tokens: int, **settings: Any) -> Any:
    torch._dynamo.reset()
    return model.generate(**inputs, **GENERATE, **settings, max_new_tokens=tokens, min_new_tokens=tokens)


def layers(out: Any) -> list[tuple[Any, Any]]:
    return hf.keys_and_values(hf.cache_of(out))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 2, "length_penalty": 0.0}, id="beams", marks=pytest.mark.slow),
    ],
)
def test_past_the_window(settings, without_inductor):
    """A prompt that is longer than the window of 64, and until no token of it is left."""
    family = FURTHER["mistral-sliding"]
    model, inputs = family.build(), family.inputs(0)
    expected = generated(model, inputs, 90, **settings)
    attnpack_fx.compile(model, **LOSSLESS)
    actual = generated(model, inputs, 90, **settings)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(isinstance(key, PackedTensor) and key.tokens.keys() == {"dense"} for key, _ in layers(actual))
    # Filler of tokens that have left, and room for those to come: for beams, that are copied at each step, a quarter.
    most = 1.5 if settings else 1.25
    assert cache_bytes(hf.cache_of(actual)) < most * cache_bytes(hf.cache_of(expected))


@pytest.mark.slow
def test_a_prompt_that_grows_into_its_window(without_inductor):
    family = FURTHER["mistral-sliding"]
    model, inputs = family.build(), {name: each[:, -40:] for name, each in family.inputs(0).items()}
    expected = generated(model, inputs, 60)
    attnpack_fx.compile(model, **LOSSLESS)
    actual = generated(model, inputs, 60)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(isinstance(key, PackedTensor) and key.shape[2] == 63 for key, _ in layers(actual))


@pytest.mark.slow
def test_layers_share_where_their_tokens_are(without_inductor):
    """After tokens have left, and their memory with them."""
    family = FURTHER["mistral-sliding"]
    model, inputs = family.build(), family.inputs(0)
    attnpack_fx.compile(model, **LOSSLESS)
    for tokens in (5, 25):
        pairs = layers(generated(model, inputs, tokens))
        assert len({id(each.placement) for pair in pairs for each in pair}) == 1
        assert len({id(key.held.angles) for key, _ in pairs}) == 1


@pytest.mark.slow
def test_an_uncompiled_model_goes_on(without_inductor):
    family = FURTHER["mistral-sliding"]
    model, inputs = family.build(), family.inputs(0)
    packed = attnpack_fx.compile(copy.deepcopy(model), **LOSSLESS)
    caches = [hf.cache_of(generated(each, inputs, 4)) for each in (model, packed)]
    ids = torch.arange(20, 60).view(2, 20)
    with torch.no_grad():
        expected, actual = (model(input_ids=ids, **hf.cache_argument(cache)).logits for cache in caches)
    close(actual, expected)
    assert all(isinstance(key, PackedTensor) and key.shape[2] == 63 for key, _ in hf.keys_and_values(caches[1]))


@pytest.mark.slow
def test_through_inductor(fresh_dynamo):
    """230 tokens behind a prompt of 80, two layers of three with a window of 32, and sinks."""
    family = FURTHER["gpt-oss"]
    model, inputs = family.build(), family.inputs(0)
    expected = generated(model, inputs, 230)
    attnpack_fx.compile(model, **LOSSLESS)
    actual = generated(model, inputs, 230)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(isinstance(key, PackedTensor) for key, _ in layers(actual))


def test_methods_leave_such_layers_alone_and_say_so(without_inductor):
    family = FURTHER["mistral-sliding"]
    model, inputs = family.build(), family.inputs(0)
    attnpack_fx.compile(model, vision_rank=None, passes=(attnpack_fx.H2O(0.5),))
    with pytest.warns(attnpack_fx.AttnpackWarning, match="sliding window: methods"):
        out = generated(model, inputs, 3)
    assert not any(isinstance(key, PackedTensor) for key, _ in layers(out))


@pytest.mark.slow
def test_padding_behind_a_prompt_that_is_longer_than_the_window(without_inductor):
    """Which is none of the newest tokens at any later step."""
    family = FURTHER["mistral-sliding"]
    model = family.build()
    ids = torch.arange(10, 90)[None]
    mask = torch.ones_like(ids).index_fill(1, torch.arange(74, 80), 0)
    logits = []
    for compiled in (False, True):
        if compiled:
            attnpack_fx.compile(model, **LOSSLESS)
        with torch.no_grad():
            cache = hf.cache_of(model(input_ids=ids, attention_mask=mask, use_cache=True))
            longer, steps = mask, []
            for token in range(20, 32):
                longer = torch.cat([longer, torch.ones_like(longer[:, :1])], 1)
                step = {"input_ids": torch.tensor([[token]]), "attention_mask": longer}
                steps.append(model(**step, **hf.cache_argument(cache)).logits)
        logits.append(torch.cat(steps, 1))
    close(logits[1], logits[0])


def test_images_of_a_second_turn_behind_a_dense_one(without_inductor):
    """Layers with a window then have fewer tokens than others: these are packed, and what stays dense is reported."""
    family = FAMILIES["gemma3"]
    model, inputs = family.build(), dict(family.inputs(0))
    text = torch.arange(10, 110)[None]
    inputs["attention_mask"] = torch.ones((1, 100 + inputs["input_ids"].shape[1]), dtype=torch.int64)
    logits = []
    for compiled in (False, True):
        if compiled:
            attnpack_fx.compile(model, vision_rank="full", strict=True)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cache = hf.cache_of(model(input_ids=text, token_type_ids=torch.zeros_like(text), use_cache=True))
            steps = [model(**inputs, use_cache=True, **hf.cache_argument(cache)).logits[:, -1]]
            for token in (20, 21, 22):
                step = model(input_ids=torch.tensor([[token]]), use_cache=True, **hf.cache_argument(cache))
                steps.append(step.logits[:, -1])
        logits.append(torch.cat(steps))
    close(logits[1], logits[0])
    packed = [isinstance(key, PackedTensor) for key, _ in hf.keys_and_values(cache)]
    assert packed == [number not in family.windows for number in range(len(packed))]
    assert any("tokens of an earlier call" in str(each.message) for each in caught)
