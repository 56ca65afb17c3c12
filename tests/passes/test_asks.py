"""What methods ask of the graph, all together."""

import pytest

from attnpack_fx import AVL, H2O, KIVI, FastV, KVQuant, MiniCache, PackPolicy, Quantize, Scissorhands
from attnpack_fx.passes import asks
from attnpack_fx.passes.method import Stage

POLICIES = {
    "none": PackPolicy(vision_rank=4),
    "folds": PackPolicy(vision_rank=4, text_rank=4, fold_every=8),
    "factors": PackPolicy(vision_rank=4, passes=(Quantize(8),)),
    "tokens": PackPolicy(vision_rank=None, passes=(FastV(),)),
    "h2o, kivi": PackPolicy(vision_rank=None, passes=(H2O(), KIVI())),
    "avl": PackPolicy(vision_rank=None, passes=(AVL(),)),
    "kvquant": PackPolicy(vision_rank=None, passes=(KVQuant(),)),
    "minicache": PackPolicy(vision_rank=None, passes=(MiniCache(),)),
}


@pytest.mark.parametrize(
    ("question", "names"),
    [
        (asks.acts_on_cache, {"h2o, kivi", "avl", "kvquant", "minicache"}),
        (asks.asks_for_modality, {"h2o, kivi", "avl"}),
        (asks.codes_unrotated, {"kvquant"}),
        (asks.keeps_angles, {"kvquant", "folds"}),
        (lambda policy: asks.observation(policy) is not None, {"h2o, kivi", "avl"}),
    ],
)
def test_questions(question, names):
    assert {name for name, policy in POLICIES.items() if question(policy)} == names


def test_methods_act_at_their_stages():
    policy = PackPolicy(vision_rank=4, passes=(Quantize(8), KIVI(), AVL(), FastV()))
    found = {stage: [method.name for method in asks.acting(policy.passes, stage)] for stage in Stage}
    assert found == {
        Stage.TOKENS: ["FastV"],
        Stage.FACTORS: ["Quantize"],
        Stage.EVICT: ["AVL"],
        Stage.SELECT: ["AVL"],
        Stage.MERGE: [],
        Stage.ROWS: ["KIVI"],
    }


def test_what_is_observed_is_the_methods_own():
    policy = PackPolicy(vision_rank=None, passes=(KIVI(), Scissorhands(window=7)))
    assert asks.observation(policy) == Scissorhands(window=7).observes
    assert asks.observation(policy).window == 7


@pytest.mark.parametrize(
    ("heads", "dense", "low_rank"), [("auto", True, False), ("together", False, False), ("apart", True, None)]
)
def test_heads(heads, dense, low_rank):
    policy = PackPolicy(vision_rank=None, passes=(KIVI(), H2O(heads=heads)))
    assert asks.heads_apart(policy, False) == dense
    if low_rank is None:
        with pytest.raises(NotImplementedError, match=r"H2O: got heads='apart'.*use heads='together'"):
            asks.heads_apart(policy, True)
    else:
        assert asks.heads_apart(policy, True) == low_rank
    assert not asks.heads_apart(POLICIES["kvquant"], False)
