"""Drafts that are cropped: what methods know and do afterwards is what it would be had they never been there."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attnpack_fx import (
    AVL,
    H2O,
    KIVI,
    PackPolicy,
    Partial,
    RandomEviction,
    Scissorhands,
    StreamingLLM,
    cache_bytes,
)
from attnpack_fx.passes.method import Method
from tests.decoder import Decoder, next_ids, prompt
from tests.layer_inputs import mirrored
from tests.stored_inputs import Way
from tests.zoo import TEXT_TOKENS, ZOO

Model = transformers.PreTrainedModel
DecoderCache = list[tuple[Any, Any]]

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


def run(policy: PackPolicy, calls: list[tuple[int, int]], batch: int = 1) -> tuple[DecoderCache, list[Tensor]]:
    """A prompt, then further calls; of each so many tokens stay and so many are cropped again.

    Returns the cache and, after every call, the logits of what stays.
    """
    torch._dynamo.reset()
    model = torch.compile(Decoder(layers=2), backend="attnpack", options={"policy": policy})
    ids, features = prompt(text=14, vision=10, batch=batch)
    cache: DecoderCache | None = None
    logits = []
    for number, (staying, cropped) in enumerate(calls):
        new = torch.cat([next_ids(staying, batch, number), next_ids(cropped, batch, 90 + number)], 1)
        given = (new, None) if number else (torch.cat([ids, new], 1), features)
        found, cache = model(*given, cache)
        end = found.shape[1] - cropped
        logits.append(found[:, :end])
        if cropped:
            cache = [(key[..., :-cropped, :], value[..., :-cropped, :]) for key, value in cache]
    assert cache is not None
    return cache, logits


@pytest.mark.parametrize(
    ("name", "rank", "batch"),
    [*((name, None, 1) for name in METHODS), ("AVL", "full", 1), ("H2O", None, 2), ("Scissorhands", "full", 2)],
)
def test_as_if_they_had_never_been_there(name: str, rank: str | None, batch: int, without_inductor: None) -> None:
    """At prefill and later; several tokens, all but one, and none."""
    policy = PackPolicy(vision_rank=rank, passes=METHODS[name], strict=True)
    calls = [(6, 9), (3, 4), (1, 5), (4, 0), (2, 1), (1, 6)]
    # More forms of a cache in one test than a program meets.
    with torch._dynamo.config.patch(recompile_limit=64):
        cropped, one = run(policy, calls, batch)
        never, other = run(policy, [(staying, 0) for staying, _ in calls], batch)
    for actual, expected in zip(one, other, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    evicted = False
    for actual, expected in zip(cropped, never, strict=True):
        for left, right in zip(actual, expected, strict=True):
            assert _stored(left) == _stored(right)
            torch.testing.assert_close(left.dense(), right.dense(), atol=1e-4, rtol=1e-4)
        scores = [_scores(each[0]) for each in (actual, expected)]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
        evicted |= min(map(len, _stored(actual[0]))) < actual[0].shape[2]
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
    policy = PackPolicy(vision_rank=8, partial=Partial(regroup_every=2), strict=True)
    calls = [(6, 4), (2, 3), (1, 2), (2, 2)]
    caches = [run(policy, each)[0] for each in (calls, [(staying, 0) for staying, _ in calls])]
    for (actual, _), (expected, _) in zip(*caches, strict=True):
        assert torch.equal(actual.index[:, :10], expected.index[:, :10])
        torch.testing.assert_close(actual.importance, expected.importance, atol=1e-5, rtol=1e-4)


def test_the_whole_of_a_call_can_be_cropped(without_inductor: None) -> None:
    """What went before is then as it was left, but for what left since."""
    policy = PackPolicy(vision_rank=None, passes=(H2O(14, every=2),), strict=True)
    cache, _ = run(policy, [(6, 0), (3, 0)])
    for (key, _), (before, _) in zip(cache, run(policy, [(6, 0)])[0], strict=True):
        cropped = key[..., :-3, :]
        assert cropped.shape == before.shape
        pairs = zip(_stored(cropped), _stored(before), strict=True)
        assert all(set(left) <= set(right) for left, right in pairs)


def test_nothing_is_kept_once_the_next_call_has_begun(without_inductor: None) -> None:
    """Nor after a call of one token, which is no draft. Until then it counts as memory."""
    policy = PackPolicy(vision_rank=None, passes=(H2O(14),), strict=True)
    model = torch.compile(Decoder(layers=2), backend="attnpack", options={"policy": policy})
    _, cache = model(*prompt(text=14, vision=10))
    held = [part for pair in cache for part in pair]
    assert all(part.taken_back is not None for part in held)
    before = cache_bytes(held)
    _, later = model(next_ids(1), None, cache)
    assert all(part.taken_back is None for part in [*held, *(part for pair in later for part in pair)])
    assert cache_bytes(held) < before / 1.5


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
    """The same answer, of the same stored tokens, of which the same is known."""
    assert torch.equal(actual.sequences, expected.sequences)
    for one, other in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert one.keys.shape == other.keys.shape and _stored(one.keys) == _stored(other.keys)
        torch.testing.assert_close(_scores(one.keys), _scores(other.keys), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_prompt_lookup_through_inductor(fresh_dynamo: None) -> None:
    """Vision tokens leave after prefill alone, and so at the same point with drafts behind the prompt as without."""
    model = compiled(vision_rank=None, passes=(H2O(0.5, target="vision"),))
    inputs = ZOO["llava-gqa"].inputs(1, 0)
    ids = torch.cat([inputs["input_ids"], text(6, 1), text(6, 1)[:, :4]], 1)  # ends as it began: there are drafts
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generated(model, inputs, 20)
    actual = generated(model, inputs, 20, prompt_lookup_num_tokens=3)
    assert_same(actual, expected)
    key = actual.past_key_values.layers[0].keys
    assert [len(row) for row in _stored(key)] == [key.shape[2] - 8] * 2  # half of 16 vision tokens have left


@pytest.mark.slow
@pytest.mark.parametrize("rule", [H2O(40), Scissorhands(40)], ids=lambda rule: rule.name)
def test_an_assistant(rule: Method, without_inductor: None) -> None:
    """Most of its drafts are rejected, and they have been part of the very first call."""
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
