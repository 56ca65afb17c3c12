"""Pruned prefill as Inductor compiles it."""

import pytest
import torch

from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.state import SiteReport
from tests.decoder import Decoder, close, next_ids, prompt
from tests.passes.test_prune_tokens import compiled, of_tokens, run_by_hand


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_by_inductor():
    """How many rows stay is not known before the call, and no other number of them compiles anything anew."""
    decoder, (ids, features) = Decoder(layers=3), prompt(batch=2)
    reports: list[SiteReport] = []
    with torch.no_grad():
        model = compiled(decoder, FastV(1, 0.5), reports)
        for text in (0, 4):
            given, own = ids.clone(), features.view(2, 10, -1)
            given[1, 2 : 2 + text] = next_ids(4)[:, :text]
            alone = [
                run_by_hand(decoder, given[:1], own[0], 1, 0.5),
                run_by_hand(decoder, given[1:], own[1, text:], 1, 0.5),
            ]
            logits, cache = model(given, torch.cat([own[0], own[1, text:], own[1, :text]]))
            close(logits, torch.cat([logits for logits, _ in alone]), 1e-5)
            assert max(len(rows) for _, rows in alone) <= cache[1][0].slots < ids.shape[1]
    assert of_tokens(reports) == [("pruned", "FastV")]
