"""What methods do between calls changes sizes, never graphs: nothing is compiled per step, and once per policy."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

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
    RandomEviction,
    Scissorhands,
    StreamingLLM,
    attnpack_backend,
)
from attnpack_fx.passes.state import SiteReport
from tests.decoder import Decoder, next_ids, prompt

pytestmark = pytest.mark.usefixtures("without_inductor")

POLICIES = {
    "H2O": PackPolicy(vision_rank=None, passes=(H2O(12, every=1),)),
    "H2O on factors": PackPolicy(vision_rank=4, passes=(H2O(0.5, every=2),)),
    "Scissorhands": PackPolicy(vision_rank=None, passes=(Scissorhands(12, recent=2),)),
    "StreamingLLM": PackPolicy(vision_rank=None, passes=(StreamingLLM(2, 8, every=2),)),
    "StreamingLLM on factors": PackPolicy(vision_rank=4, passes=(StreamingLLM(2, 8, every=2),)),
    "AVL": PackPolicy(vision_rank=None, passes=(AVL(0.8, 0.4, every=2, text_rate=0.4, text_least=4),)),
    "AVL on factors": PackPolicy(vision_rank=4, passes=(AVL(0.8, 0.4, every=3),)),
    "KIVI": PackPolicy(vision_rank=None, passes=(KIVI(4, group=2, residual=4),)),
    "KIVI of a later text": PackPolicy(vision_rank=4, passes=(KIVI(4, group=2, residual=16),)),
    "GEAR": PackPolicy(vision_rank=None, passes=(GEAR(4, group=2, residual=4),)),
    "KVQuant": PackPolicy(vision_rank=None, passes=(KVQuant(4, residual=4),)),
    "MiniCache": PackPolicy(vision_rank=None, passes=(MiniCache(first=0.0, residual=4),)),
    "all at once": PackPolicy(
        vision_rank=4, passes=(FastV(1), H2O(0.7, every=2), Quantize(8, 4, ("coefficients", "tail"), recent=4))
    ),
}

#: Graphs that come later, once: with the first codes after a prompt without any, of keys and of values, and with the
#: last vision token gone.
NEW = {"KIVI of a later text": 2, "StreamingLLM on factors": 1}


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def steps(step, cache, count: int, batch: int):
    for number in range(count):
        _, cache = step(next_ids(batch=batch, seed=number), None, cache)
    return cache


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_no_recompile_per_step(name, batch):
    step = torch.compile(Decoder(), backend=attnpack_backend, options={"policy": POLICIES[name]})
    with torch.no_grad():
        _, cache = step(*prompt(batch=batch))
        cache = steps(step, cache, 2, batch)
        warm = graphs()
        steps(step, cache, 24, batch)
    assert graphs() - warm == NEW.get(name, 0)


def test_a_policy_change_recompiles_once():
    model = Decoder()
    for policy in (PackPolicy(vision_rank=None, passes=(H2O(12),)), PackPolicy(vision_rank=None, passes=(H2O(9),))):
        before = graphs()
        step = torch.compile(model, backend=attnpack_backend, options={"policy": policy})
        with torch.no_grad():
            for seed in range(2):
                _, cache = step(*prompt(seed=seed))
                steps(step, cache, 6, 1)
        assert graphs() - before == 2  # a prefill and a step


def test_a_policy_whose_heads_differ_is_not_decompressed():
    """Sizes that vary from call to call become symbolic; heads must not, whatever ran before."""
    reports: list[SiteReport] = []
    model = Decoder()
    for policy in (
        PackPolicy(vision_rank=4),
        PackPolicy(vision_rank=None, passes=(H2O(12),)),
        PackPolicy(vision_rank=4),
    ):
        backend = partial(attnpack_backend, options={"policy": policy}, observer=reports.extend)
        step = torch.compile(model, backend=backend)
        with torch.no_grad():
            for batch in (1, 2):
                _, cache = step(*prompt(batch=batch))
                steps(step, cache, 3, batch)
    assert {report.action for report in reports} == {"compressed", "packed"}


def test_what_is_evicted_makes_no_graph():
    """Layers keep as many vision tokens as others at one prompt, and fewer or more at the next."""
    method = RandomEviction(0.5)
    step = torch.compile(Decoder(layers=4), backend=attnpack_backend, options={"vision_rank": 4, "passes": (method,)})
    splits, made = set(), []
    for seed in range(10):
        with torch.no_grad():
            ids, features = prompt(text=30, vision=40, batch=2, seed=seed)
            _, cache = step(ids.roll(seed % 5, dims=1), features)
            for number in range(3):
                _, cache = step(next_ids(batch=2, seed=number), None, cache)
        splits.add(tuple(key.tokens.get("vision", 0) for key, _ in cache))
        made.append(graphs())
    assert any(len(set(each)) > 1 for each in splits) and len(splits) > 3
    assert made[1] == made[-1]
