"""Options of the method on whole models: where keys are stored, schedules of ranks, folds, all at once."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters

from attnpack_fx import Energy, Linear, PackedTensor, Partial, PerLayer, PolicyError, cache_bytes
from tests.decoder import IMAGE, Cache, Decoder, prompt
from tests.zoo import HIDDEN, ZOO

pytestmark = pytest.mark.usefixtures("without_inductor")

FULL = {"vision_rank": "full", "text_rank": "full", "strict": True}
TOLERANCE = 1e-4

Model = transformers.PreTrainedModel


def compiled(name: str, **options: Any) -> Model:
    model = ZOO[name].build("sdpa")
    model.compile(backend="attnpack", options=FULL | options)
    return model


def generate(model: Model, inputs: dict[str, Tensor], tokens: int, **settings: Any) -> Any:
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | settings
    return model.generate(**inputs, max_new_tokens=tokens, **settings)


def assert_same(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    dense, packed = torch.stack(expected.logits), torch.stack(actual.logits)
    assert (packed - dense).abs().max() <= tolerance * dense.abs().max()


# Un-rotated keys of every model, the default: tests/test_exactness.py. Three more models below, with folds.
@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("llava-mha", "rotated"),
        ("phi3", "rotated"),
        ("gpt-neox", "unrotated"),
    ],
)
def test_where_keys_are_stored_changes_nothing_at_full_rank(name, space):
    inputs = ZOO[name].inputs(2, 2)
    expected = generate(ZOO[name].build("sdpa"), inputs, 3)
    actual = generate(compiled(name, key_space=space), inputs, 3)
    assert_same(actual, expected)
    for layer in actual.past_key_values.layers:
        assert isinstance(layer.keys, PackedTensor)
        assert (layer.keys.held.angles is not None) == (space == "unrotated")
        assert layer.values.held.angles is None


def ranks(model: Model, name: str, modality: str = "text") -> list[tuple[int, int] | None]:
    """`(key rank, value rank)` of every layer after the prefill, None where it is dense."""
    with torch.no_grad():
        layers = model(**ZOO[name].inputs(1, 0), use_cache=True).past_key_values.layers
    pairs = [(layer.keys, layer.values) for layer in layers]
    return [
        (key.ranks[modality], value.ranks[modality]) if isinstance(key, PackedTensor) else None for key, value in pairs
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"text_rank": Linear(4, 12)}, [(4, 4), (12, 12)]),
        ({"text_rank": (PerLayer((5, "full")), 3)}, [(5, 3), (24, 3)]),
        ({"text_rank": 6, "skip_layers": (0,)}, [None, (6, 6)]),
        ({"text_rank": Linear(4, 12), "skip_layers": (-1,)}, [(4, 4), None]),
    ],
)
def test_schedules_over_the_layers(options, expected):
    # Of so few tokens, cos and sin of un-rotated keys would be more than what packing saves.
    assert ranks(compiled("llama", key_space="rotated", **options), "llama") == expected


def test_schedules_over_the_layers_of_a_hand_written_model():
    step = torch.compile(Decoder(layers=4), backend="attnpack", options={"vision_rank": Linear(2, 8)})
    _, cache = step(*prompt(vision=40))
    assert [(key.ranks, value.ranks) for key, value in cache] == [({"vision": r}, {"vision": r}) for r in (2, 4, 6, 8)]


def test_energy_finds_the_rank_of_every_layer():
    name, threshold = "llama", 0.7
    with torch.no_grad():
        dense = ZOO[name].build("sdpa")(**ZOO[name].inputs(1, 0), use_cache=True).past_key_values.layers
    found = ranks(compiled(name, text_rank=Energy(threshold, at_most=13), key_space="rotated"), name)
    expected = []
    for layer in dense:
        both = []
        for x in (layer.keys, layer.values):
            share = torch.linalg.svdvals(x.double()[0].transpose(0, 1).flatten(1)).square().cumsum(0)
            both.append(int((share < threshold * share[-1]).sum()) + 1)
        expected.append(tuple(both))
    assert found == expected and all(1 < rank < 13 for pair in found for rank in pair)


class BrokenBetween(Decoder):
    """Dynamo breaks the graph between any two layers."""

    def forward(self, ids: Tensor, features: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        hidden = self.embed(ids).masked_scatter((ids == IMAGE)[..., None].expand(*ids.shape, 24), features)
        hidden, first = self.layers[0](hidden, None)
        torch._dynamo.graph_break()
        hidden, second = self.layers[1](hidden, None)
        return self.head(hidden), [first, second]


def test_a_schedule_needs_the_number_of_layers_where_graphs_break_between_them():
    options = {"vision_rank": Linear(2, 3)}
    inputs = prompt(vision=40)
    with pytest.raises(PolicyError, match=r"needs the number of decoder layers.*pass layer_count"):
        torch.compile(BrokenBetween(), backend="attnpack", options=options)(*inputs)
    torch._dynamo.reset()
    step = torch.compile(BrokenBetween(), backend="attnpack", options=options | {"layer_count": 2})
    _, cache = step(*inputs)
    assert [key.ranks for key, _ in cache] == [{"vision": 2}, {"vision": 3}]


def test_a_schedule_is_refused_where_graphs_break_within_every_layer():
    """Such a graph holds one attention, and does not say of which layer."""
    inputs = ZOO["qwen3-vl"].inputs(1, 0)
    with pytest.raises(PolicyError, match=r"vision_rank=Linear.* this graph does not show which layers it has"):
        generate(compiled("qwen3-vl", vision_rank=Linear(2, 3), text_rank=None), inputs, 2)


def test_a_model_in_double_precision():
    inputs = ZOO["llama"].inputs(1, 0)
    expected = generate(ZOO["llama"].build("sdpa").double(), inputs, 4)
    model = ZOO["llama"].build("sdpa").double()
    model.compile(backend="attnpack", options=FULL)
    actual = generate(model, inputs, 4)
    assert_same(actual, expected)
    assert actual.past_key_values.layers[0].keys.held.angles is not None


# ---- folds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch", "padding", "tokens", "space"),
    [("llama", 1, 0, 130, "rotated"), ("llava-mha", 2, 3, 70, "unrotated"), ("qwen2-vl", 2, 2, 70, "unrotated")],
)
def test_folds_at_full_rank_generate_what_the_dense_cache_does(name, batch, padding, tokens, space):
    inputs = ZOO[name].inputs(batch, padding)
    expected = generate(ZOO[name].build("sdpa"), inputs, tokens)
    counters.clear()
    model, history = compiled(name, fold_every=16, recent=32, key_space=space), []

    class Count(transformers.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            history.append(counters["stats"]["unique_graphs"])
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    actual = generate(model, inputs, tokens, stopping_criteria=transformers.StoppingCriteriaList([Count()]))
    assert_same(actual, expected, 1e-3)
    assert history[4] == history[-1]  # folds make no graphs
    for layer in actual.past_key_values.layers:
        assert layer.keys.lease.length == layer.values.lease.length < 48
        assert layer.keys.shape[2] == actual.sequences.shape[1] - 1
        loss = dict(layer.keys.held.losses)["text"]
        assert loss.relative < 1e-2


def test_beams_fold_each_their_own():
    inputs = ZOO["llava-gqa"].inputs(1, 0)
    settings = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    expected = generate(ZOO["llava-gqa"].build("sdpa"), inputs, 24, **settings)
    actual = generate(compiled("llava-gqa", fold_every=4, recent=4), inputs, 24, **settings)
    assert_same(actual, expected, 1e-3)
    assert len(actual.sequences.unique(dim=0)) == 3
    assert all(layer.keys.lease.length < 8 for layer in actual.past_key_values.layers)


def test_a_turn_on_an_eager_model_ends_folds_of_keys_whose_angles_it_does_not_know():
    model, plain = compiled("llava-gqa", fold_every=4, recent=2), ZOO["llava-gqa"].build("sdpa")
    inputs = ZOO["llava-gqa"].inputs(1, 0)
    caches = []
    for first in (model, plain):
        cache = generate(first, inputs, 3).past_key_values
        ids = torch.arange(20, 23)[None]
        with torch.no_grad():
            plain(input_ids=ids, past_key_values=cache, use_cache=True)
            steps = [
                first(input_ids=ids[:, :1] + number, past_key_values=cache, use_cache=True).logits
                for number in range(9)
            ]
        caches.append((cache, torch.stack(steps)))
    (cache, logits), (_, expected) = caches
    assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert all(layer.keys.held.closed for layer in cache.layers)


def test_everything_at_once_takes_less_memory():
    name, tokens = "llava-mha", 70
    inputs = ZOO[name].inputs(2, 2)
    options = {
        "vision_rank": 6,
        "text_rank": 8,
        "fold_every": 8,
        "recent": 4,
        "max_fold_error": 10.0,
        "key_space": "rotated",
    }
    partial = Partial(regroup_every=5, keys=True, store=True)
    actual = generate(compiled(name, **options, partial=partial), inputs, tokens).past_key_values
    dense = generate(ZOO[name].build("sdpa"), inputs, tokens).past_key_values
    # Much of it are indices and spare rows of the tail.
    assert cache_bytes(actual) < 0.6 * cache_bytes(dense)
    for layer in actual.layers:
        assert layer.keys.lease.length < 12 and layer.keys.importance is not None
        assert [block.coefficient.shape[1] for block in layer.values.segments[0].blocks] == [16, 4]
        assert layer.keys.ranks == {"vision": 6, "text": 8}
        out = layer.keys.dense()
        assert out.isfinite().all() and out.shape == (2, 4, inputs["input_ids"].shape[1] + tokens - 1, HIDDEN // 4)
