"""The methods: their fields, and what they do to a prompt, against the formulas on the hidden states by hand."""

import pytest
import torch
from torch import Tensor

from attnpack_fx.kernels import reference_prune
from attnpack_fx.passes.asap import ASAP
from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.method import Stage, conflict
from attnpack_fx.passes.pool import Pool
from attnpack_fx.passes.random_prune import RandomPrune
from tests.decoder import IMAGE, Decoder, close, prompt
from tests.passes.test_prune_tokens import compiled, of_tokens

pytestmark = pytest.mark.usefixtures("without_inductor")

WRONG = [
    (FastV, {"layer": 0}, "layer: got 0"),
    (FastV, {"layer": True}, "layer: got True"),
    (FastV, {"ratio": 1.5}, "ratio: got 1.5"),
    (RandomPrune, {"seed": -1}, "seed: got -1"),
    (RandomPrune, {"ratio": "half"}, "ratio: got 'half'"),
    (Pool, {"window": 0}, "window: got 0"),
    (ASAP, {"keep": -1}, "keep: got -1"),
    (ASAP, {"lambda_max": 0.0}, "lambda_max: got 0.0"),
    (ASAP, {"threshold": 2}, "threshold: got 2"),
]


@pytest.mark.parametrize(("method", "fields", "message"), WRONG)
def test_a_wrong_field_is_refused(method, fields, message):
    with pytest.raises(ValueError, match=f"{method.__name__}.{message}.*expected"):
        method(**fields)


def test_one_method_decides_which_tokens_flow():
    assert FastV().stages == {Stage.TOKENS}
    assert "which tokens flow" in (conflict(FastV(), ASAP()) or "")


def test_the_defaults_are_the_papers():
    assert (FastV().layer, FastV().ratio) == (2, 0.5)
    assert (ASAP().layer, ASAP().keep) == (2, 192)


def behind(decoder: Decoder, ids: Tensor, features: Tensor, layers: int) -> Tensor:
    hidden = decoder.embed(ids)
    hidden = hidden.masked_scatter((ids == IMAGE)[..., None].expand_as(hidden), features)
    for layer in decoder.layers[:layers]:
        hidden = layer(hidden, None)[0]
    return hidden


def finished(decoder: Decoder, hidden: Tensor, rows: list[int], part: Tensor, number: int) -> Tensor:
    """Logits when layers from `number` on see `part` `[1, T', C]` at `rows`."""
    for layer in decoder.layers[number:]:
        part = layer(part, None)[0]
    hidden = hidden.clone()
    hidden[:, rows] = part
    return decoder.head(hidden)


@pytest.mark.parametrize("window", [2, 3, 20])
def test_pool(window):
    decoder, (ids, features) = Decoder(layers=3), prompt(vision=11)
    reports: list = []
    with torch.no_grad():
        hidden = behind(decoder, ids, features, 1)
        (groups,) = reference_prune.pooled_groups(ids == IMAGE, None, window)
        part = torch.stack([hidden[0, members].mean(0) for members in groups])[None]
        expected = finished(decoder, hidden, [members[0] for members in groups], part, 1)
        logits, cache = compiled(decoder, Pool(1, window), reports)(ids, features)
    close(logits, expected, 1e-5)
    assert cache[1][0].slots == len(groups) == 6 + -(-11 // window)
    assert of_tokens(reports) == [("pruned", "Pool")]


def test_random_prune():
    decoder, (ids, features) = Decoder(layers=3), prompt(batch=2)
    results = []
    with torch.no_grad():
        for seed in (0, 0, 1):
            logits, cache = compiled(decoder, RandomPrune(2, 0.7, seed), [])(ids, features)
            assert cache[2][0].slots == 6 + 3
            results.append(logits)
        scores = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
        hidden = behind(decoder, ids, features, 2)
        rows = reference_prune.kept_rows(scores, ids == IMAGE, None, 0.3)
        samples = [
            finished(decoder, hidden[number : number + 1], row, hidden[number : number + 1, row], 2)
            for number, row in enumerate(rows)
        ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    close(results[2], torch.cat(samples), 1e-5)


@pytest.mark.parametrize(("keep", "threshold", "lambda_max"), [(6, 0.3, 1.0), (9, 0.6, 0.4), (4, 1.0, 0.1)])
def test_asap(keep, threshold, lambda_max):
    decoder, (ids, features) = Decoder(layers=3), prompt(vision=12)
    features[5:8] = features[4] + 0.1 * features[5:8]  # some that look alike
    vision = ids == IMAGE
    with torch.no_grad():
        before, hidden = behind(decoder, ids, features, 0), behind(decoder, ids, features, 1)
        query, key = (
            linear(before).view(1, 18, -1, 8).transpose(1, 2)
            for linear in (decoder.layers[0].query, decoder.layers[0].key)
        )
        scores = reference_prune.bidirectional_scores(query, key, vision, None, 8**-0.5, lambda_max)
        ((rows, owner),) = reference_prune.merged_rows(hidden, *scores, vision, None, keep, threshold)
        strengths = reference_prune.normalised(scores[1][0].tolist(), [t for t in range(18) if vision[0, t]])
        part = []
        for row in rows:
            members = [t for t, into in owner.items() if into == row]
            weights = torch.tensor([strengths.get(t, 0.0) for t in members])
            alone = len(members) == 1 or not weights.sum()
            part.append(hidden[0, row] if alone else (weights[:, None] * hidden[0, members]).sum(0) / weights.sum())
        expected = finished(decoder, hidden, rows, torch.stack(part)[None], 1)
        logits, cache = compiled(decoder, ASAP(1, keep, lambda_max, threshold), [])(ids, features)
    assert (len(owner) > len(rows)) == (threshold < 1)
    close(logits, expected, 1e-5)
    assert cache[1][0].slots == len(rows) == 6 + keep
