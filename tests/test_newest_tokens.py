"""Whatever a rule evicts, the newest tokens stay: the end of the question, and what has just been generated."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attnpack_fx import AVL, H2O, PackPolicy, RandomEviction, Scissorhands, StreamingLLM
from attnpack_fx.hf import cache_argument, empty_cache
from attnpack_fx.passes.eviction import Eviction
from tests.zoo import TEXT_TOKENS, ZOO

STEPS = 12

#: Rules, and how many of the newest tokens each keeps for certain: after prefill, and after every later eviction.
RULES: dict[str, tuple[Eviction, int, int]] = {
    "RandomEviction": (RandomEviction(0.2), 10, 10),
    "RandomEviction, a few": (RandomEviction(8, recent=5), 5, 5),
    "Scissorhands": (Scissorhands(), 10, 10),
    "Scissorhands, of a small share": (Scissorhands(0.05), 10, 10),
    # A fifth of 52 tokens are 11, half of them heavy hitters; 10 are left where two leave at once.
    "H2O": (H2O(), 5, 5),
    "H2O of one token": (H2O(1), 1, 1),
    "StreamingLLM": (StreamingLLM(4, recent=12), 12, 10),
    # Of 20 text tokens half are heavy hitters; 18 are left where three leave at once.
    "AVL": (AVL(text_rate=0.6), 10, 9),
}


class Watch(transformers.LogitsProcessor):
    """Looks into the cache after prefill and after every step."""

    def __init__(self, cache: Any, rule: Eviction, first: int, later: int) -> None:
        self.cache, self.rule, self.first, self.later = cache, rule, first, later
        self.calls, self.evicted = 0, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        expected = self.later if self.calls else self.first
        for layer in self.cache.layers:
            positions, seen = layer.keys.positions, layer.keys.shape[2]
            assert seen == input_ids.shape[1]
            newest = torch.arange(seen - expected, seen)
            for row in positions:
                assert torch.isin(newest, row).all(), (self.calls, newest.tolist(), sorted(row.tolist()))
            self.evicted |= positions.shape[1] < seen
        self.calls += 1
        return scores


def watched(rule: Eviction, first: int, later: int, **policy: Any) -> Watch:
    model = ZOO["llava-gqa"].build("sdpa")
    inputs = ZOO["llava-gqa"].inputs(2, 5)
    random = torch.Generator().manual_seed(3)
    question = torch.randint(TEXT_TOKENS.start, TEXT_TOKENS.stop, (2, 24), generator=random)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], question], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(question)], 1)
    model.compile(backend="attnpack", options={"policy": PackPolicy(passes=(rule,), strict=True, **policy)})
    cache = empty_cache(model)
    watch = Watch(cache, rule, first, later)
    settings = {"do_sample": False, "logits_processor": [watch], "max_new_tokens": STEPS}
    model.generate(**inputs, **cache_argument(cache), **settings)
    return watch


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), [*((name, None) for name in RULES), ("RandomEviction", 4), ("AVL", 4)])
def test_the_newest_tokens_stay(name: str, rank: int | None, without_inductor: None) -> None:
    """In every layer and head, of a sample with padding on the left and of one without."""
    watch = watched(*RULES[name], vision_rank=rank)
    assert watch.calls == STEPS and watch.evicted


@pytest.mark.slow
def test_through_inductor_at_default_options(fresh_dynamo: None) -> None:
    assert watched(RandomEviction(0.2), 10, 10).evicted
