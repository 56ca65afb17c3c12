"""`cache_bytes` says what a cache keeps alive, found by walking all it refers to; and nothing else is kept."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from attnpack_fx import (
    AVL,
    H2O,
    KIVI,
    AttnpackWarning,
    Energy,
    MiniCache,
    PackedTensor,
    Partial,
    Quantize,
    StreamingLLM,
    cache_bytes,
)
from attnpack_fx.hf import cache_argument, empty_cache
from tests.decoder import IMAGE, Decoder, prompt
from tests.live_storages import all_live_storages, live_storages
from tests.zoo import ZOO

Cache = transformers.DynamicCache


def compiled(name: str, **options: Any) -> transformers.PreTrainedModel:
    model = ZOO[name].build("sdpa")
    model.compile(backend="attnpack", options={"strict": True} | options)
    return model


def generated(model: transformers.PreTrainedModel, inputs: dict[str, Tensor], tokens: int = 12) -> Cache:
    """The cache that `generate` leaves."""
    cache = empty_cache(model)
    model.generate(**inputs, **cache_argument(cache), max_new_tokens=tokens, do_sample=False)
    return cache


def packed(cache: Cache) -> list[PackedTensor]:
    every = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    return [each for each in every if isinstance(each, PackedTensor)]


def assert_counted(cache: Cache) -> None:
    """All that lives by the cache is counted, and no part is a piece of something larger."""
    assert cache_bytes(cache) == sum(live_storages(cache).values())
    for each in packed(cache):
        for part in each.tensors:
            if part is not each.lease.buffer.rows:  # with spare room
                assert part.untyped_storage().nbytes() == part.numel() * part.element_size(), part.shape


def assert_one_copy(cache: Cache) -> None:
    """All layers, which place their tokens alike, have one index; and one table of angles."""
    every = packed(cache)
    assert len(every) == 4
    assert len({each.index.untyped_storage().data_ptr() for each in every}) == 1
    turned = [each.held.angles.packed for each in every if each.held.angles is not None]
    assert len({angles.cos.untyped_storage().data_ptr() for angles in turned}) <= 1
    assert len({angles.sin.untyped_storage().data_ptr() for angles in turned}) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("llava-mha", 1),
        ("llava-mha", 12),
        ("qwen2.5-vl", 1),
        ("qwen2.5-vl", 12),
    ],
)
def test_generated_through_inductor(name, batch, fresh_dynamo):
    cache = generated(compiled(name, vision_rank=4, text_rank=4), ZOO[name].inputs(batch, 2 if batch > 1 else 0))
    assert_counted(cache)
    assert_one_copy(cache)


@pytest.mark.slow
def test_graphs_of_one_call_share_what_they_find_alike(fresh_dynamo):
    example = ZOO["qwen3-vl"]
    cache = generated(compiled("qwen3-vl", vision_rank=4, text_rank=4, key_space="unrotated"), example.inputs(2, 2))
    assert all(each.held.angles is not None for each in packed(cache)[::2])
    assert_counted(cache)
    assert_one_copy(cache)


POLICIES = {
    "folds": {"vision_rank": 4, "text_rank": 4, "fold_every": 4, "recent": 4},
    "ranks by energy": {"vision_rank": Energy(0.9, 6), "text_rank": 4},
    "in part": {"vision_rank": 4, "text_rank": 4, "partial": Partial(regroup_every=3)},
    "one basis": {"vision_rank": 4, "text_rank": 4, "bases": "batch"},
    "H2O": {"vision_rank": 4, "passes": (H2O(0.6, every=2),)},
    "H2O, heads apart": {"vision_rank": None, "passes": (H2O(0.6, every=2),)},
    "StreamingLLM": {"vision_rank": None, "passes": (StreamingLLM(12),)},
    "KIVI": {"vision_rank": None, "passes": (KIVI(4, group=4, residual=4),)},
    "MiniCache": {"vision_rank": None, "passes": (MiniCache(first=0.0, residual=4),)},
    "AVL": {"vision_rank": 4, "passes": (AVL(0.8, 0.4, every=3),)},
    "Quantize": {"vision_rank": 4, "text_rank": 4, "passes": (Quantize(8, 8),)},
}


def others(cache: Cache) -> Iterator[Cache]:
    """What users make of a cache."""
    for change in (
        lambda fork: None,
        lambda fork: fork.reorder_cache(torch.tensor([1, 0])),
        lambda fork: fork.batch_select_indices(torch.tensor([-1, 0])),
        lambda fork: fork.batch_repeat_interleave(3),
        lambda fork: fork.crop(-20),
        lambda fork: move(fork, torch.float64),
    ):
        fork = copy.deepcopy(cache)
        change(fork)
        yield fork


def move(cache: Cache, dtype: torch.dtype) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)


@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES.keys())
def test_methods_and_forks(options, without_inductor):
    cache = generated(compiled("qwen2.5-vl", **options), ZOO["qwen2.5-vl"].inputs(2, 2), 15)
    placements = len({id(each.placement) for each in packed(cache)})
    assert_counted(cache)
    for fork in others(cache):
        assert_counted(fork)
        assert len({id(each.placement) for each in packed(fork)}) == placements


class Unrolled(Decoder):
    """Its graph breaks between two layers."""

    def forward(self, ids: Tensor, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        hidden = self.embed(ids).masked_scatter((ids == IMAGE)[..., None], features)
        hidden, lower = self.layers[0](hidden, None)
        torch._dynamo.graph_break()
        _, upper = self.layers[1](hidden, None)
        return [lower, upper]


def test_dense_layers_do_not_keep_what_travels_from_graph_to_graph(without_inductor):
    # Methods do not know that tokens of a window leave by themselves.
    options = {"vision_rank": 4, "passes": (StreamingLLM(2, 30),)}
    step = torch.compile(Unrolled(windows=(8, None)), backend="attnpack", options=options)
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=AttnpackWarning):
        cache = step(*prompt())
    assert [isinstance(key, PackedTensor) for key, _ in cache] == [False, True]
    assert cache_bytes(cache) == sum(live_storages(cache).values())


@pytest.mark.slow
def test_a_kept_prefix_keeps_nothing_of_what_continued_it(without_inductor):
    model = compiled("llava-mha", vision_rank=4, text_rank=4, key_space="unrotated", fold_every=8, recent=4)
    prefix = generated(model, ZOO["llava-mha"].inputs(2, 2), 2)
    new = torch.full((2, 1), 20)

    def continued(tokens: int) -> None:
        fork = copy.deepcopy(prefix)
        with torch.no_grad():
            for _ in range(tokens):
                model(input_ids=new, past_key_values=fork)
        assert packed(fork)[0].tokens["text"] > tokens - 12

    continued(20)  # compiles
    before = all_live_storages()
    continued(200)
    assert sum(all_live_storages().values()) == sum(before.values())
    assert_counted(prefix)
