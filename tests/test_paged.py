"""Batches that transformers fills as requests come: what their paged cache is, and that it is said to stay dense."""

import inspect
import warnings

import pytest
import transformers
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import attnpack_fx
from attnpack_fx import AttnpackWarning
from tests.acceptance.families import FAMILIES

LENGTHS = (9, 14)


@pytest.fixture
def stored(monkeypatch):
    """Of every update of a paged cache: the shape of the new keys, and what memory the cache has."""
    calls, update = [], PagedAttentionCache.update

    def watched(self, key_states, *arguments, **options):
        calls.append((tuple(key_states.shape), self.cache_tensor.data_ptr(), self.cache_tensor.nbytes))
        return update(self, key_states, *arguments, **options)

    watched._torchdynamo_disable = True
    monkeypatch.setattr(PagedAttentionCache, "update", watched)
    return calls


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of "paged|", which later versions of transformers do without
def test_a_paged_cache_is_said_to_stay_dense(fresh_dynamo, stored):
    family = FAMILIES["llama"]
    model = family.build()
    model.set_attn_implementation("paged|sdpa")
    prompts = [family.inputs(0)["input_ids"][0, :length].tolist() for length in LENGTHS]
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=3)
    pages = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=32, max_batch_tokens=256)
    results = []
    for compiled in (False, True):
        if compiled:
            stored.clear()
            attnpack_fx.compile(model, text_rank=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = model.generate_batch(prompts, settings, pages, warmup=False)
        results.append(sorted(each.generated_tokens for each in made.values()))
    assert results[0] == results[1]
    told = [str(each.message) for each in caught if issubclass(each.category, AttnpackWarning)]
    assert told and all("paged cache" in text for text in told)
    # Why, as docs/how-it-works.md says: tokens of all requests are one row, in memory that was taken before the first.
    shapes, places, sizes = (set(column) for column in zip(*stored, strict=True))
    assert {shape[0] for shape in shapes} == {1} and {shape[2] for shape in shapes} == {sum(LENGTHS), len(LENGTHS)}
    assert len(places) == len(sizes) == 1
    # Prompts are token ids: there is nowhere to put an image.
    assert next(iter(inspect.signature(model.generate_batch).parameters)) == "inputs"
    assert not any("pixel" in name for name in inspect.signature(model.generate_batch).parameters)
