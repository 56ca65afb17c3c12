import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from attnpack_fx.export.runtime.sampling import Sampling, most_likely
from tests.kernels.inputs import SEEDS


def warped(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities as transformers have them, in its order."""
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)


def probabilities(sampling: Sampling, logits: Tensor) -> Tensor:
    """What is drawn from."""
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        draw = torch.multinomial
        patch.setattr(
            torch, "multinomial", lambda weights, *rest, **how: seen.append(weights) or draw(weights, *rest, **how)
        )
        sampling.draw(logits, torch.Generator().manual_seed(0))
    return seen[0]


def logits_of(seed: int, batch: int = 3, vocabulary: int = 50) -> Tensor:
    return 3 * torch.randn((batch, vocabulary), generator=torch.Generator().manual_seed(seed))


@given(
    seed=SEEDS,
    vocabulary=st.integers(1, 60),
    temperature=st.floats(0.05, 20),
    top_k=st.one_of(st.none(), st.integers(1, 80)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
)
@settings(max_examples=150, deadline=None)
def test_the_same_tokens_count_as_in_transformers(seed, vocabulary, temperature, top_k, top_p):
    logits = logits_of(seed, vocabulary=vocabulary)
    found = probabilities(Sampling(temperature, top_k, top_p), logits)
    expected = warped(logits, temperature, top_k, top_p)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)


def test_tokens_that_are_equally_likely_all_count():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert probabilities(Sampling(top_k=1), logits).tolist() == [[0, 0.5, 0.5, 0]]


def test_draws_follow_the_probabilities():
    logits = logits_of(1, batch=1, vocabulary=6)
    expected = warped(logits, 1.5, 4, 0.9)[0]
    drawn = Sampling(1.5, 4, 0.9).draw(logits.expand(20_000, -1), torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=6) / len(drawn)
    assert (share[expected == 0] == 0).all() and (share - expected).abs().amax() < 0.015


def test_a_seed_decides_the_draw():
    logits, sampling = logits_of(0, batch=20), Sampling(2.0)
    first, again, other = (sampling.draw(logits, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert first.shape == (20,) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    sampling.draw(logits, torch.Generator().manual_seed(7))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    assert torch.equal(sampling.draw(logits, None), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_drawn_in_fp32(dtype):
    logits = logits_of(0).to(dtype)
    found = probabilities(Sampling(0.01, None, 0.9), logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, warped(logits.float(), 0.01, None, 0.9))


def test_tokens_that_are_ruled_out_stay_so():
    logits = logits_of(0)
    logits[:, ::2] = -torch.inf
    assert (Sampling(5.0, 40, 0.99).draw(logits, torch.Generator().manual_seed(0)) % 2 == 1).all()


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-5}])
def test_the_least_freedom_is_the_most_likely_token(options):
    logits = logits_of(0)
    drawn = Sampling(**options).draw(logits, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, most_likely(logits)) and torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": 0}, "temperature: got 0, expected a number > 0; do_sample=False is greedy"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0, expected a number of tokens >= 1, or None"),
        ({"top_p": 0}, r"top_p: got 0, expected a share in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p: got 1.01"),
        ({"top_p": float("nan")}, "top_p: got nan"),
    ],
)
def test_options_that_make_no_sense(options, reason):
    with pytest.raises(ValueError, match=reason):
        Sampling(**options)
