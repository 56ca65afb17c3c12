import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.aten.plan import plan, saves_memory

from ..inputs import SEEDS

GAINS = st.one_of(
    st.just([]), st.tuples(*[st.integers(1, 8)] * 2, *[st.integers(1, 12)] * 2, st.integers(0, 6)).map(list)
)


@given(
    seed=SEEDS,
    batch=st.integers(1, 4),
    tokens=st.integers(0, 20),
    modality=st.sampled_from([None, 1, "batch"]),
    real=st.sampled_from([None, 1, "batch"]),
    text=st.booleans(),
    gains=st.tuples(GAINS, GAINS),
)
@settings(max_examples=300, deadline=None)
def test_matches_the_reference(seed, batch, tokens, modality, real, text, gains):
    random = torch.Generator().manual_seed(seed)

    def flags(rows, share):
        if rows is None:
            return None
        return torch.rand((batch if rows == "batch" else 1, tokens), generator=random) < share

    arguments = (flags(modality, 0.6), flags(real, 0.8), torch.empty(batch, 2, tokens, 4), text, *gains)
    names = ("vision", "text", "dense", "slot")
    for name, actual, expected in zip(names, plan(*arguments), reference.plan(*arguments), strict=True):
        assert actual.dtype == torch.int64 and actual.is_contiguous(), name
        assert torch.equal(actual, expected), name


def test_every_real_token_has_exactly_one_slot():
    real, modality = torch.rand(3, 30) < 0.8, torch.rand(3, 30) < 0.5
    vision, text, dense, slot = plan(modality, real, torch.empty(3, 2, 30, 4), True, [], [])
    assert dense.shape == (3, 0) and torch.equal(slot >= 0, real)
    index = torch.cat([vision, text, dense], 1)
    positions = torch.arange(30).expand(3, 30)
    assert torch.equal(index.gather(1, slot.clamp(min=0))[real], positions[real])


@pytest.mark.parametrize(
    ("tokens", "gain", "expected"),
    [
        (0, [], False),
        (1, [], True),
        (576, [64, 64, 4096, 4096, 0], True),
        (64, [64, 64, 4096, 4096, 0], False),
        (66, [64, 64, 4096, 4096, 0], True),  # 64 * (66 + 4096) < 66 * 4096
        (65, [64, 64, 4096, 4096, 0], False),
        (8, [64, 1, 16, 64, 0], True),  # the value's saving pays for the key's loss
        (200, [16, 16, 32, 32, 11], True),  # a layer of three, of half the rank, with cos and sin
        (200, [16, 16, 32, 32, 32], False),  # all of cos and sin are this layer's
    ],
)
def test_worth_packing(tokens, gain, expected):
    assert saves_memory(tokens, gain) is expected
