"""attnpack::linear against its float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels import ops, reference


@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    inner=st.integers(1, 70),
    outer=st.integers(1, 70),
    bias=st.booleans(),
    strided=st.booleans(),
)
def test_equals_the_reference(leading, inner, outer, bias, strided):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((*leading, inner), generator=generator)
    if strided:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    weight = torch.randn((outer, inner), generator=generator)
    offset = torch.randn((outer,), generator=generator) if bias else None
    result = ops.linear(x, weight, offset)
    assert result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result.double(), reference.linear(x, weight, offset), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weight = torch.randn(3, 2, 8).to(dtype), torch.randn(5, 8).to(dtype)
    torch.library.opcheck(torch.ops.attnpack.linear.default, (x, weight, torch.randn(5).to(dtype)))
