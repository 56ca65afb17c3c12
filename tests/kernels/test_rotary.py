import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.rotary import rotate

from .inputs import SEEDS, assert_close


@given(seed=SEEDS, dim=st.sampled_from([8, 16, 64]), pairs=st.sampled_from([1, 2, 4]), interleaved=st.booleans())
@settings(max_examples=60, deadline=None)
def test_matches_the_reference(seed, dim, pairs, interleaved):
    torch.manual_seed(seed)
    x, cos, sin = torch.randn(2, 3, 5, dim), torch.randn(2, 5, pairs), torch.randn(2, 5, pairs)
    out = rotate(x, cos[:, None], sin[:, None], interleaved)
    assert_close(out, reference.rotate(x.double(), cos.double(), sin.double(), interleaved))


def test_keeps_the_dtype():
    x, angle = torch.randn(1, 1, 3, 8).bfloat16(), torch.randn(1, 1, 3, 4)
    assert rotate(x, angle.cos(), angle.sin(), False).dtype == torch.bfloat16
