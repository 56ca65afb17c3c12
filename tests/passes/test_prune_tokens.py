"""Prefill with fewer tokens behind a layer, against the same layers run by hand on the rows that stay."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx import PackPolicy, attnpack_backend, modality
from attnpack_fx.passes.asap import ASAP
from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.find_attention import find_attention
from attnpack_fx.passes.find_modality import find_modality
from attnpack_fx.passes.pool import Pool
from attnpack_fx.passes.prune_tokens import decide, prune_tokens
from attnpack_fx.passes.random_prune import RandomPrune
from attnpack_fx.passes.state import SiteReport
from attnpack_fx.passes.token_pruning import TokenPruning
from tests.decoder import IMAGE, Decoder, close, next_ids, prompt
from tests.passes.capture import capture, operations

pytestmark = pytest.mark.usefixtures("without_inductor")


def compiled(model: Any, method: TokenPruning, reports: list[SiteReport]) -> Any:
    policy = PackPolicy(vision_rank="full", text_rank="full", strict=True, passes=(method,))
    torch._dynamo.reset()
    return torch.compile(
        model, backend=partial(attnpack_backend, options={"policy": policy}, observer=reports.extend), dynamic=None
    )


def of_tokens(reports: list[SiteReport]) -> list[tuple[str, str]]:
    return [(report.action, report.reason) for report in reports if report.kind == "tokens"]


# ---- a decoder written by hand


def attention_row(layer: Any, hidden: Tensor) -> Tensor:
    """The last token's attention in one layer, averaged over heads: float64 `[T]`. hidden: `[1, T, C]`."""
    tokens = hidden.shape[1]
    query, key = (linear(hidden)[0].double().view(tokens, -1, layer.dim) for linear in (layer.query, layer.key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return torch.softmax(torch.einsum("hd,thd->ht", query[-1], key) * layer.dim**-0.5, -1).mean(0)


def fastv_rows(scores: Tensor, vision: Tensor, ratio: float) -> Tensor:
    seen = vision.nonzero()[:, 0]
    best = scores[seen].argsort(descending=True)[: round((1 - ratio) * len(seen))]
    return torch.cat([(~vision).nonzero()[:, 0], seen[best]]).sort().values


def run_by_hand(decoder: Decoder, ids: Tensor, features: Tensor, number: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Logits `[1, T, V]` and rows of one prompt, pruned in front of layer `number`."""
    hidden = decoder.embed(ids)
    hidden = hidden.masked_scatter((ids == IMAGE)[..., None].expand_as(hidden), features)
    for layer in decoder.layers[: number - 1]:
        hidden = layer(hidden, None)[0]
    scores = attention_row(decoder.layers[number - 1], hidden)
    hidden = decoder.layers[number - 1](hidden, None)[0]
    rows = fastv_rows(scores, ids[0] == IMAGE, ratio)
    part = hidden[:, rows]
    for layer in decoder.layers[number:]:
        part = layer(part, None)[0]
    hidden = hidden.clone()
    hidden[:, rows] = part
    return decoder.head(hidden), rows


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    text=st.integers(3, 9),
    vision=st.integers(1, 21),
    number=st.integers(1, 3),
    ratio=st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]),
    seed=st.integers(0, 99),
)
def test_fastv_is_the_later_layers_on_fewer_rows(text, vision, number, ratio, seed):
    decoder = Decoder(layers=4, seed=seed)
    ids, features = prompt(text, vision, seed=seed)
    reports: list[SiteReport] = []
    with torch.no_grad():
        expected, rows = run_by_hand(decoder, ids, features, number, ratio)
        logits, cache = compiled(decoder, FastV(number, ratio), reports)(ids, features)
    close(logits, expected, 1e-5)
    assert of_tokens(reports) == [("pruned", "FastV")]
    assert [key.slots for key, _ in cache[number:]] == [len(rows)] * (4 - number)
    assert [key.shape[2] for key, _ in cache[:number]] == [ids.shape[1]] * number


@pytest.mark.parametrize("tokens", [4, 8, 24, 32, 48])
def test_a_number_of_tokens_that_equals_another_size(tokens):
    """4 heads, head dim 8, width 24, 32 columns of queries: sizes in the graph that are not the number of tokens."""
    decoder = Decoder(layers=3)
    ids, features = prompt(3, tokens - 3)
    with torch.no_grad():
        expected, _ = run_by_hand(decoder, ids, features, 1, 0.5)
        logits, _ = compiled(decoder, FastV(1, 0.5), [])(ids, features)
    close(logits, expected, 1e-5)


def test_samples_keep_different_numbers_of_tokens():
    decoder = Decoder(layers=3)
    ids, features = prompt(4, 12, batch=2)
    ids[1, 6:12] = next_ids(6)  # six of the second sample's vision tokens become text
    features = features[:18]
    reports: list[SiteReport] = []
    with torch.no_grad():
        alone = [
            run_by_hand(decoder, ids[:1], features[:12], 1, 0.75),
            run_by_hand(decoder, ids[1:], features[12:], 1, 0.75),
        ]
        logits, cache = compiled(decoder, FastV(1, 0.75), reports)(ids, features)
    close(logits, torch.cat([logits for logits, _ in alone]), 1e-5)
    assert [len(rows) for _, rows in alone] == [7, 12]
    assert cache[1][0].slots == 3 + 10  # of vision most in one sample, of text in another


def test_a_longer_prompt_of_the_same_graph():
    """The second length makes sizes symbolic."""
    decoder = Decoder(layers=3)
    reports: list[SiteReport] = []
    model = compiled(decoder, FastV(2, 0.5), reports)
    with torch.no_grad():
        for vision in (10, 13, 17):
            ids, features = prompt(5, vision, seed=vision)
            close(model(ids, features)[0], run_by_hand(decoder, ids, features, 2, 0.5)[0], 1e-5)
    assert of_tokens(reports) == [("pruned", "FastV")] * 2  # one graph of fixed sizes, one of any


KEEPS_ALL = [FastV(1, 0.0), RandomPrune(1, 0.0), Pool(1, window=1), ASAP(1, keep=None, threshold=1.0)]


@pytest.mark.parametrize("method", KEEPS_ALL, ids=lambda method: method.name)
def test_keeping_everything_changes_nothing(method):
    decoder = Decoder(layers=3)
    ids, features = prompt(batch=2)
    reports: list[SiteReport] = []
    with torch.no_grad():
        expected, _ = decoder(ids, features)
        logits, _ = compiled(decoder, method, reports)(ids, features)
    close(logits, expected, 1e-6)
    assert of_tokens(reports) == [("pruned", method.name)]


def test_operations_of_the_rewritten_graph():
    decoder, (ids, features) = Decoder(layers=4), prompt()
    state = capture(decoder, ids, features, policy=PackPolicy(passes=(FastV(2, 0.5),)))
    find_attention(state)
    find_modality(state)
    before = operations(state)
    assert prune_tokens(state) == 1
    added = [name for name in operations(state) if operations(state).count(name) != before.count(name)]
    assert [name.split(".")[0] for name in added if "." in name] == [
        "last_row_scores",
        "kept_rows",
        "gather_tokens",
        "gather_mask",
        "gather_mask",
        "scatter_tokens",
    ]
    (pruned,) = state.pruned
    assert pruned.first_layer == 2
    state.graph.lint()


# ---- what is left alone, and why


class First(Decoder):
    """The last layers look at the first token by its number."""

    def forward(self, ids, features=None, cache=None):  # type: ignore[override]
        hidden = self.embed(ids)
        if features is not None:
            hidden = hidden.masked_scatter((ids == IMAGE)[..., None].expand_as(hidden), features)
        pairs = []
        for number, layer in enumerate(self.layers):
            if number == 2:
                hidden = hidden + hidden[:, 5:6]
            hidden, pair = layer(hidden, None)
            pairs.append(pair)
        return self.head(hidden), pairs


class Kept(Decoder):
    """The hidden states of the last layers are kept in a buffer of the model's."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.register_buffer("kept", torch.zeros(1, 16, 24))

    def forward(self, ids, features=None, cache=None):  # type: ignore[override]
        hidden = self.embed(ids)
        hidden = hidden.masked_scatter((ids == IMAGE)[..., None].expand_as(hidden), features)
        pairs = []
        for layer in self.layers:
            torch.mul(hidden, 2.0, out=self.kept)
            hidden, pair = layer(hidden, None)
            pairs.append(pair)
        return self.head(hidden), pairs


REASONS = {
    "kept": (Kept(layers=3), FastV(1), True, "writes tokens to a tensor that lives outside"),
    "no vision": (Decoder(layers=3), FastV(1), False, "no vision tokens are known"),
    "too deep": (Decoder(layers=3), FastV(3), True, "the decoder has 3 layers"),
    "one layer": (Decoder(layers=1), FastV(1), True, "the decoder has 1 layers"),
    "by number": (First(layers=3), FastV(1), True, "takes some of the tokens by number"),
    "window before": (Decoder(windows=(4, None, None)), FastV(1), True, "layer 0 keeps other keys than it attends to"),
    "window": (Decoder(windows=(None, None, 4)), FastV(1), True, "takes some of the tokens by number"),
}


@pytest.mark.parametrize(("decoder", "method", "image", "reason"), REASONS.values(), ids=REASONS.keys())
def test_what_cannot_be_pruned_is_left_alone(decoder, method, image, reason):
    ids, features = prompt()
    reports: list[SiteReport] = []
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = (ids, features) if image else (ids,)
        expected = decoder(*given)[0]
        close(compiled(decoder, method, reports)(*given)[0], expected, 1e-6)
    ((action, found),) = of_tokens(reports)
    assert action == "unpruned"
    assert reason in found
    assert any("no tokens are pruned" in str(warning.message) and reason in str(warning.message) for warning in caught)


class Broken(Decoder):
    """Dynamo breaks the graph behind the first layer."""

    def forward(self, ids, features=None, cache=None):  # type: ignore[override]
        hidden = self.embed(ids)
        hidden = hidden.masked_scatter((ids == IMAGE)[..., None].expand_as(hidden), features)
        hidden, pair = self.layers[0](hidden, None)
        pairs = [pair]
        torch._dynamo.graph_break()
        for layer in self.layers[1:]:
            hidden, pair = layer(hidden, None)
            pairs.append(pair)
        return self.head(hidden), pairs


def test_layers_of_several_graphs_are_left_alone():
    decoder, (ids, features) = Broken(layers=3), prompt()
    reports: list[SiteReport] = []
    with torch.no_grad():
        expected, _ = decoder(ids, features)
        close(compiled(decoder, FastV(1), reports)(ids, features)[0], expected, 1e-6)
    assert [action for action, _ in of_tokens(reports)] == ["unpruned", "unpruned"]
    assert "several graphs" in of_tokens(reports)[0][1]


def test_a_graph_that_holds_all_later_layers_is_enough():
    """The mask of vision tokens comes from the graph before."""
    decoder, (ids, features) = Decoder(layers=3, broken=True), prompt()
    reports: list[SiteReport] = []
    with torch.no_grad():
        expected, _ = run_by_hand(decoder, ids, features, 1, 0.5)
        close(compiled(decoder, FastV(1, 0.5), reports)(ids, features)[0], expected, 1e-5)
    assert of_tokens(reports) == [("pruned", "FastV")]


def test_deciding_changes_nothing():
    for decoder, method in ((Decoder(layers=3), FastV(1)), (First(layers=3), FastV(1))):
        state = capture(decoder, *prompt(), policy=PackPolicy(passes=(method,)))
        find_attention(state)
        find_modality(state)
        before = str(state.graph)
        decide(state, method)
        assert str(state.graph) == before


def test_a_stated_modality_is_enough():
    decoder = Decoder(layers=3)
    ids = next_ids(14)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 3:11] = True
    reports: list[SiteReport] = []
    with torch.no_grad(), modality(mask):
        _, cache = compiled(decoder, RandomPrune(1, 0.5, seed=2**70), reports)(ids)
    assert of_tokens(reports) == [("pruned", "RandomPrune")]
    assert cache[1][0].slots == 10


def test_a_decode_step_is_not_pruned():
    decoder = Decoder(layers=3)
    reports: list[SiteReport] = []
    with torch.no_grad():
        model = compiled(decoder, FastV(1, 0.5), reports)
        _, cache = model(*prompt())
        reports.clear()
        model(next_ids(), None, cache)
    assert not of_tokens(reports)
