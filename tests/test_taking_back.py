"""Drafts that are cropped: what methods know and do afterwards is what it would be had they never been there."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attnpack_fx import AVL, H2O, KIVI, PackPolicy, Partial, RandomEviction, Scissorhands, StreamingLLM
from attnpack_fx.passes.method import Method
from tests.layer_inputs import mirrored
from tests.stored_inputs import Way
from tests.zoo import TEXT_TOKENS, ZOO

Model = transformers.PreTrainedModel
Cache = transformers.DynamicCache

METHODS: dict[str, tuple[Method, ...]] = {
    "H2O": (H2O(14, every=2),),
    "H2O, together": (H2O(14, every=2, heads="together"),),
    "H2O, a share, and few bits": (H2O(0.5), KIVI(4, group=4, residual=4)),
    "Scissorhands": (Scissorhands(16, window=400),),
    "StreamingLLM": (StreamingLLM(2, recent=10, every=2),),
    "RandomEviction": (RandomEviction(14),),
    "AVL": (AVL(text_rate=0.5, text_least=8),),
}


def compiled(name: str = "llava-gqa", **policy: Any) -> Model:
    model = ZOO[name].build("sdpa")
    model.compile(backend="attnpack", options={"policy": PackPolicy(strict=True, **policy)})
    return model


def text(tokens: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(TEXT_TOKENS.start, TEXT_TOKENS.stop, (1, tokens), generator=random)


def run(model: Model, calls: list[tuple[int, int]]) -> tuple[Cache, list[Tensor]]:
    """A prompt, then further calls; of each so many tokens stay and so many are cropped again.

    Returns the cache and, after every call, the logits of what stays.
    """
    inputs, cache, logits = ZOO["llava-gqa"].inputs(1, 0), transformers.DynamicCache(), []
    for number, (staying, cropped) in enumerate(calls):
        ids = torch.cat([text(staying, number), text(cropped, 90 + number)], 1)
        given: dict[str, Any] = {"input_ids": ids}
        if not number:
            ids = torch.cat([inputs["input_ids"], ids], 1)
            given = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            out = model(**given, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, : ids.shape[1] - cropped])
        if cropped:
            cache.crop(-cropped)
    return cache, logits


@pytest.mark.parametrize("rank", [None, "full"])
@pytest.mark.parametrize("name", METHODS)
def test_as_if_they_had_never_been_there(name: str, rank: str | None, without_inductor: None) -> None:
    """At prefill and later; several tokens, all but one, and none."""
    if rank is not None and len(METHODS[name]) > 1:
        pytest.skip("once is enough")
    model = compiled(vision_rank=rank, passes=METHODS[name])
    calls = [(6, 9), (3, 4), (1, 5), (4, 0), (2, 1), (1, 6)]
    (cropped, one), (never, other) = run(model, calls), run(model, [(staying, 0) for staying, _ in calls])
    for actual, expected in zip(one, other, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    evicted = False
    for actual, expected in zip(cropped.layers, never.layers, strict=True):
        for kind in ("keys", "values"):
            left, right = getattr(actual, kind), getattr(expected, kind)
            assert _stored(left) == _stored(right)
            torch.testing.assert_close(left.dense(), right.dense(), atol=1e-4, rtol=1e-4)
        scores = [_scores(each.keys) for each in (actual, expected)]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
        evicted |= min(map(len, _stored(actual.keys))) < actual.keys.shape[2]
    assert evicted


def _stored(packed: Any) -> list[list[int]]:
    return [sorted(position for position in row if position >= 0) for row in packed.positions.tolist()]


def _scores(packed: Any) -> Tensor:
    """Of every logical position, `[B', T]`."""
    positions = packed.positions
    found = torch.zeros((positions.shape[0], packed.shape[2] + 1))
    if packed.scores is not None:
        found.scatter_(1, positions % found.shape[1], packed.scores)
    return found[:, :-1]


def test_partial_decompression(without_inductor: None) -> None:
    model = compiled(vision_rank=8, partial=Partial(regroup_every=2))
    calls = [(6, 4), (2, 3), (1, 2), (2, 2)]
    caches = [run(model, each)[0] for each in (calls, [(staying, 0) for staying, _ in calls])]
    for actual, expected in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(actual.keys.index[:, :16], expected.keys.index[:, :16])
        torch.testing.assert_close(actual.keys.importance, expected.keys.importance, atol=1e-5, rtol=1e-4)


def test_the_whole_of_a_call_and_more_can_be_cropped(without_inductor: None) -> None:
    """What went before is then as it was left."""
    model = compiled(vision_rank=None, passes=(H2O(14, every=2),))
    cache, _ = run(model, [(6, 0), (3, 0)])
    cache.crop(-3)
    before, _ = run(model, [(6, 0)])
    for actual, expected in zip(cache.layers, before.layers, strict=True):
        assert all(
            set(left) <= set(right) for left, right in zip(_stored(actual.keys), _stored(expected.keys), strict=True)
        )
        assert actual.keys.shape == expected.keys.shape


def test_nothing_is_kept_once_the_next_call_has_begun(without_inductor: None) -> None:
    """Nor after a call of one token, which is no draft."""
    model = compiled(vision_rank=None, passes=(H2O(14),))
    cache, _ = run(model, [(6, 2)])
    held = [layer.keys for layer in cache.layers]
    assert all(key.taken_back is not None for key in held)
    with torch.no_grad():
        model(input_ids=text(1, 0), past_key_values=cache, use_cache=True)
    assert all(key.taken_back is None for key in [*held, *(layer.keys for layer in cache.layers)])


def test_slots_that_are_free_again_say_nothing_of_tokens_that_take_them() -> None:
    mirror = mirrored(Way(padding=1), factors=False)
    mirror.append(3)
    slots = mirror.layer.slots
    key = mirror.layer.key.attended(torch.full((2, slots), 7.0))
    cropped = key[..., :-2, :]
    assert cropped.scores.shape == (2, slots - 2) and (cropped.scores == 7).all()
    longer = cropped.grow(2)
    assert longer.scores[:, -2:].eq(0).all() and longer.scores[:, :-2].eq(7).all()


# ---- assisted generation -----------------------------------------------------------------------------------


def generated(model: Model, inputs: dict[str, Tensor], tokens: int, **how: Any) -> Any:
    settings = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": tokens}
    return model.generate(**inputs, **settings, **how)


def assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    for one, other in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        # The last call may have left a token of the answer out, or not.
        shortest = min(one.keys.shape[2], other.keys.shape[2])
        assert shortest >= actual.sequences.shape[1] - 2
        left, right = (
            [[position for position in row if position < shortest] for row in _stored(each.keys)]
            for each in (one, other)
        )
        assert left == right


def test_prompt_lookup_through_inductor(fresh_dynamo: None) -> None:
    """Vision tokens leave after prefill alone, and so at the same point with drafts behind the prompt as without."""
    model = compiled(vision_rank=None, passes=(H2O(0.5, target="vision"),))
    inputs = ZOO["llava-gqa"].inputs(1, 0)
    ids = torch.cat([inputs["input_ids"], text(6, 1), text(6, 1)[:, :4]], 1)  # ends as it began: there are drafts
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generated(model, inputs, 20)
    actual = generated(model, inputs, 20, prompt_lookup_num_tokens=3)
    assert_same(actual, expected)
    assert min(map(len, _stored(actual.past_key_values.layers[0].keys))) < ids.shape[1]


@pytest.mark.parametrize("name", ["H2O", "Scissorhands", "StreamingLLM"])
def test_an_assistant(name: str, without_inductor: None) -> None:
    """Its drafts alone would fill the budget: nothing leaves on their account. What stays are the tokens themselves."""
    rule = {"H2O": H2O(40), "Scissorhands": Scissorhands(40), "StreamingLLM": StreamingLLM(4, 36)}[name]
    model, inputs = compiled("llama", vision_rank=None, passes=(rule,)), ZOO["llama"].inputs(1, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assistant = transformers.LlamaForCausalLM(model.config).eval()
    assistant.generation_config.num_assistant_tokens = 20
    assistant.generation_config.assistant_confidence_threshold = 0
    assistant.generation_config.eos_token_id = None
    prompt = inputs["input_ids"].shape[1]
    expected = generated(model, inputs, 40 - prompt)
    assert_same(generated(model, inputs, 40 - prompt, assistant_model=assistant), expected)
