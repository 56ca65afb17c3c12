"""Attention over heads that each keep tokens of their own, under masks of every shape SDPA takes."""

import pytest
import torch
import torch.nn.functional as F

from attnpack_fx import H2O, PackedTensor, PackPolicy, attnpack_backend

pytestmark = pytest.mark.usefixtures("without_inductor")

BATCH, HEADS, GROUP, DIM, PROMPT = 2, 2, 3, 8, 7


def step(query, key, value, mask, past_key, past_value):
    key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return out, key, value


@pytest.mark.parametrize("own_heads", [False, True])
@pytest.mark.parametrize("own_samples", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_masks(own_heads, own_samples, additive):
    random = torch.Generator().manual_seed(0)
    policy = PackPolicy(vision_rank=None, passes=(H2O(1.0, heads="apart"),), strict=True)
    compiled = torch.compile(step, backend=attnpack_backend, options={"policy": policy})
    caches = [(torch.tensor([]), torch.tensor([]))] * 2
    for count in (PROMPT, 1, 1):
        tokens = PROMPT if count == PROMPT else caches[0][0].shape[2] + count
        query = torch.randn((BATCH, HEADS * GROUP, count, DIM), generator=random)
        key, value = (torch.randn((BATCH, HEADS, count, DIM), generator=random) for _ in range(2))
        shape = BATCH if own_samples else 1, HEADS * GROUP if own_heads else 1, count, tokens
        mask = torch.randn(shape, generator=random)
        mask = mask if additive else (mask > -1).index_fill(3, torch.tensor([0]), True)
        outs = []
        with torch.no_grad():
            for number, function in enumerate((step, compiled)):
                out, *caches[number] = function(query, key, value, mask, *caches[number])
                outs.append(out)
        torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    assert isinstance(caches[1][0], PackedTensor) and caches[1][0].held.heads == HEADS
