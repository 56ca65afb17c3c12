import pytest
import torch

from attnpack_fx.export.portable import attention
from attnpack_fx.export.steps import _bias, _selected
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import PackedParts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("score", [-1000.0, 0.0, 1000.0])
def test_a_query_of_padding_that_sees_nothing_gives_numbers(dtype, score):
    """NaN there would spread, through what later layers make of it, to all that has it in sight at weight 0."""
    sees = torch.tensor([[[False, False, False], [True, False, False], [True, True, True]]])
    mask = _bias(sees, dtype)
    assert mask.shape == (1, 1, 3, 3) and mask.dtype == dtype
    size = abs(score) ** 0.5
    query, key = torch.full((1, 1, 3, 1), size, dtype=dtype), torch.full((1, 1, 3, 1), size, dtype=dtype)
    key = -key if score < 0 else key
    value = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)[None, None, :, None]
    none = torch.zeros((1, 0), dtype=torch.int64)
    tensors, layouts = flatten(*(PackedParts((), each.permute(2, 0, 1, 3), 3, none) for each in (key, value)))
    decoded = attention(query, tensors, *layouts, 3, mask, 1.0)
    prefilled = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
    for out in (decoded, prefilled):
        assert out.isfinite().all()
        torch.testing.assert_close(out[0, 0, 1:, 0].float(), torch.tensor([1.0, 7 / 3]), atol=0.02, rtol=0)


def test_selected_tokens_and_filler():
    x = torch.randn((2, 3, 5, 4), generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[4, 0, 2], [1, -1, -1]])
    found = _selected(x, index)
    for sample in range(2):
        for number, place in enumerate(index[sample].tolist()):
            expected = x[sample, :, place] if place >= 0 else torch.zeros(3, 4)
            assert torch.equal(found[sample, :, number], expected)
    assert _selected(x, index[:, :0]).shape == (2, 3, 0, 4)
