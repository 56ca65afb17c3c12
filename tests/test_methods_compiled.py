"""What methods leave between calls, compiled by Inductor: the same numbers as op by op."""

import pytest
import torch

from attnpack_fx import (
    AVL,
    GEAR,
    H2O,
    KIVI,
    FastV,
    KVQuant,
    MiniCache,
    PackPolicy,
    Quantize,
    attnpack_backend,
    backend,
)
from tests.decoder import Decoder, close, next_ids, prompt

POLICIES = {
    "pruned, evicted per head, coded": PackPolicy(
        vision_rank=None, passes=(FastV(1), H2O(0.6, every=2), KIVI(8, group=2, residual=4)), strict=True
    ),
    "factors in codes, read in part": PackPolicy(
        vision_rank=4,
        passes=(AVL(0.8, 0.4, every=2), Quantize(8, 8, ("coefficients", "bases", "tail"), recent=4)),
        strict=True,
    ),
    "merged, residuals": PackPolicy(
        vision_rank=None, passes=(MiniCache(first=0.0, residual=4), GEAR(4, group=4, residual=4)), strict=True
    ),
    "codebooks and outliers": PackPolicy(vision_rank=None, passes=(KVQuant(4, residual=4),), strict=True),
}


def logits(policy: PackPolicy) -> torch.Tensor:
    torch._dynamo.reset()
    step = torch.compile(Decoder(), backend=attnpack_backend, options={"policy": policy})
    with torch.no_grad():
        out, cache = step(*prompt(batch=2))
        outs = [out[:, -1]]
        for number in range(8):
            out, cache = step(next_ids(batch=2, seed=number), None, cache)
            outs.append(out[:, -1])
    return torch.stack(outs)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_compiled_and_op_by_op_are_the_same(policy, monkeypatch):
    compiled = logits(policy)
    monkeypatch.setattr(backend, "_inductor", lambda module, examples, patches: module)
    close(compiled, logits(policy), 1e-4)
