"""Which tokens are vision tokens: stated by the caller, read from the graph, or carried between graphs of one call."""

import threading
import warnings

import pytest
import torch

import attnpack_fx
from attnpack_fx import AttnpackWarning, PackedTensor, attnpack_backend, modality
from attnpack_fx.call import Call, opened
from attnpack_fx.modality import fit, said, stated
from tests.acceptance.families import FAMILIES
from tests.decoder import IMAGE, Decoder, close, next_ids, prompt
from tests.packing_inputs import vision_mask

STRICT = {"vision_rank": "full", "text_rank": None, "strict": True}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        ([[True, False]], "list"),
        (torch.ones(1, 4), "torch.float32"),
        (torch.ones(4, dtype=torch.bool), r"\(4,\)"),
        (torch.ones(1, 4, 1, dtype=torch.bool), r"\(1, 4, 1\)"),
    ],
)
def test_what_is_no_mask_is_refused(mask, got):
    with pytest.raises(ValueError, match=f"got .*{got}.*expected a bool tensor"), modality(mask):
        pass
    assert stated() is None


def test_the_innermost_mask_counts_and_leaves_with_its_block():
    outer, inner = vision_mask(4, 0, 1), vision_mask(4, 1, 1)
    with modality(outer):
        with modality(inner):
            assert stated() is inner
        assert stated() is outer
    assert stated() is None


def test_an_exception_takes_the_mask_with_it():
    with pytest.raises(KeyError), modality(vision_mask(4, 0, 1)):
        raise KeyError
    assert stated() is None


def test_another_thread_does_not_see_the_mask():
    seen = []
    with modality(vision_mask(4, 0, 1)):
        thread = threading.Thread(target=lambda: seen.append(stated()))
        thread.start()
        thread.join()
    assert seen == [None]


# ---- fitting a mask to a batch of tokens -------------------------------------------------------------------


def test_a_mask_covers_the_first_tokens_or_the_newest():
    mask = torch.tensor([[True, False, True]])
    assert fit(mask, 1, 5, CPU, newest=False).tolist() == [[True, False, True, False, False]]
    assert fit(mask, 1, 5, CPU, newest=True).tolist() == [[False, False, True, False, True]]


def test_each_sample_is_repeated_for_its_beams():
    mask = torch.tensor([[True, False], [False, True]])
    assert fit(mask, 4, 2, CPU, newest=False).tolist() == [[True, False], [True, False], [False, True], [False, True]]


@pytest.mark.parametrize(("batch", "tokens"), [(2, 2), (3, 4)])
def test_a_mask_that_does_not_fit_is_refused(batch, tokens):
    with pytest.raises(ValueError, match=r"got \[2, 3\], expected at most"):
        fit(torch.ones(2, 3, dtype=torch.bool), batch, tokens, CPU, newest=False)


def test_what_is_stated_wins_and_says_something_of_every_token():
    known = torch.tensor([[False, True]])
    assert said(None, 1, 3, CPU).tolist() == [[0, 0, 0]]
    assert said(known, 2, 3, CPU).tolist() == [[0, 0, 1], [0, 0, 1]]
    assert said(torch.ones(1, 4, dtype=torch.bool), 1, 3, CPU).tolist() == [[0, 0, 0]]  # of another call
    with modality(torch.tensor([[True, False]])):
        assert said(known, 1, 3, CPU).tolist() == [[1, -1, -1]]


def test_a_call_travels_on_hidden_states_and_nothing_that_outlives_it():
    hidden, keys, ids = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 1, dtype=torch.int64)
    call = Call.of([hidden, 3])
    call.travel([hidden, keys, ids, 4])
    assert Call.of([3, torch.zeros(1), hidden]) is call
    assert all(Call.of([each]) is not call for each in (keys, ids, torch.zeros(1, 2, 3)))


def test_masks_of_several_graphs_are_united():
    call, image, video = Call(), vision_mask(8, 1, 2), vision_mask(8, 5, 2)
    call.saw(image)
    call.saw(video)
    assert torch.equal(call.vision(), image | video)


def test_an_opened_call_is_that_of_all_its_graphs():
    hidden = torch.zeros(1, 2, 3)
    Call().travel([hidden])
    with opened() as outer:
        assert Call.of([hidden]) is Call.of([]) is outer
        with opened() as inner:
            assert Call.of([]) is inner is not outer
        assert Call.of([]) is outer
    assert Call.of([]) is not outer


# ---- through the backend -----------------------------------------------------------------------------------


def compiled(model, **options):
    return torch.compile(model, backend=attnpack_backend, options={**STRICT, **options})


def held(cache) -> list[dict[str, int]]:
    """Tokens of each layer by where they are; nothing for a dense layer."""
    return [key.tokens if isinstance(key, PackedTensor) else {} for key, _ in cache]


def test_the_mask_in_the_graph_is_used(without_inductor):
    model, (ids, features) = Decoder(), prompt()
    logits, cache = compiled(model)(ids, features)
    assert held(cache) == [{"vision": 10, "dense": 6}] * 2
    expected, dense = model(ids, features)
    close(logits, expected)
    for (key, value), (dense_key, dense_value) in zip(cache, dense, strict=True):
        close(key.dense(), dense_key)
        close(value.dense(), dense_value)


def test_the_mask_in_the_graph_beats_nothing_stated_and_needs_no_warning(without_inductor):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttnpackWarning)
        compiled(Decoder())(*prompt())


def test_a_stated_mask_makes_a_text_model_pack_vision_tokens(without_inductor):
    model, (ids, _) = Decoder(), prompt()
    with modality(ids == IMAGE):
        logits, cache = compiled(model)(ids)
    assert held(cache) == [{"vision": 10, "dense": 6}] * 2
    close(logits, model(ids)[0])


def test_a_graph_compiled_without_a_stated_mask_packs_when_one_is_stated(without_inductor):
    model, (ids, _) = Decoder(), prompt()
    step = compiled(model)
    with pytest.warns(AttnpackWarning, match="no vision tokens are known"):
        _, cache = step(ids)
    assert held(cache) == [{}, {}]
    with modality(ids == IMAGE):
        logits, cache = step(ids)
    assert held(cache) == [{"vision": 10, "dense": 6}] * 2
    close(logits, model(ids)[0])


def test_a_graph_compiled_with_a_stated_mask_works_without(without_inductor):
    model, (ids, _) = Decoder(), prompt()
    step = compiled(model)
    with modality(ids == IMAGE):
        step(ids)
    logits, cache = step(ids)
    expected, dense = model(ids)
    close(logits, expected)
    for (key, _), (dense_key, _) in zip(cache, dense, strict=True):
        assert not isinstance(key, PackedTensor) or "vision" not in key.tokens
        close(key.dense() if isinstance(key, PackedTensor) else key, dense_key)


def test_a_stated_mask_that_does_not_fit_is_refused_by_the_call(without_inductor):
    model, (ids, _) = Decoder(), prompt()
    with modality(vision_mask(40, 2, 6)), pytest.raises(ValueError, match="expected at most"):
        compiled(model)(ids)


def test_decoding_inside_the_block_keeps_what_was_packed(without_inductor):
    model, (ids, _) = Decoder(), prompt()
    step = compiled(model)
    with modality(ids == IMAGE):
        _, cache = step(ids)
        logits, cache = step(next_ids(), cache=cache)
    assert held(cache) == [{"vision": 10, "dense": 7}] * 2
    _, dense = model(ids)
    close(logits, model(next_ids(), cache=dense)[0])


# ---- across a graph break ----------------------------------------------------------------------------------


def test_the_mask_is_carried_across_a_graph_break(without_inductor):
    model, (ids, features) = Decoder(broken=True), prompt()
    step = compiled(model)
    logits, cache = step(ids, features)
    assert held(cache) == [{"vision": 10, "dense": 6}] * 2
    expected, dense = model(ids, features)
    close(logits, expected)
    logits, cache = step(next_ids(), cache=cache)
    assert held(cache) == [{"vision": 10, "dense": 7}] * 2
    close(logits, model(next_ids(), cache=dense)[0])


def test_interleaved_calls_do_not_mix_their_masks(without_inductor):
    """Two prompts of the same shape with images in different places, then one without any."""
    model = Decoder(broken=True)
    step = compiled(model)
    ids, features = prompt()
    shifted = ids.roll(3, dims=1)
    for given in (ids, shifted, ids):
        _, cache = step(given, features)
        (key, _), *_ = cache
        assert key.tokens == {"vision": 10, "dense": 6}
        places = key.index[0, :10].sort().values
        assert torch.equal(places, (given[0] == IMAGE).nonzero()[:, 0])
    text = torch.where(ids == IMAGE, 5, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnpackWarning)
        _, cache = step(text)
    assert all("vision" not in tokens for tokens in held(cache))


def test_a_call_within_a_call_does_not_mix_the_masks(without_inductor):
    """The second request runs entirely between two graphs of the first."""
    first, second = Decoder(), Decoder(broken=True, seed=1)
    ids, features = prompt()
    shifted = ids.roll(3, dims=1)
    inner = compiled(second)
    inner(shifted, features)
    results = []
    first.between = torch._dynamo.disable(lambda: results.append(inner(shifted, features)[1]))
    _, cache = compiled(first)(ids, features)
    for found, given in ((cache, ids), (results[0], shifted)):
        places = found[0][0].index[0, :10].sort().values
        assert torch.equal(places, (given[0] == IMAGE).nonzero()[:, 0])


@pytest.mark.slow
def test_layers_behind_the_last_deepstack_one_know_their_vision_tokens(without_inductor):
    """Qwen3-VL breaks in its loop over layers, each of which is then a graph that returns hidden states."""
    family = FAMILIES["qwen3-vl"]
    model = attnpack_fx.compile(family.build(), vision_rank=8, strict=True)
    out = model.generate(**family.inputs(0), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert len(out.past_key_values.layers) > len(model.config.vision_config.deepstack_visual_indexes) + 1
    for layer in out.past_key_values.layers:
        assert layer.keys.tokens["vision"] == layer.values.tokens["vision"] == family.vision
