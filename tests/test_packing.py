"""`pack` outside a compiled graph does what the compiled graph does at prefill."""

import pytest
import torch

from attnpack_fx import PackPolicy, Quantize, cache_bytes, pack
from tests.decoder import close
from tests.packing_inputs import FULL, VISION_ONLY, dense_pair, vision_mask


def low_rank(batch: int, heads: int, tokens: int, dim: int, rank: int) -> torch.Tensor:
    """Random `[B, H, T, D]` whose `[T, H * D]` matrices have rank `rank`."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(batch, tokens, rank, generator=generator)
    matrix = left @ torch.randn(batch, rank, heads * dim, generator=generator)
    return matrix.view(batch, tokens, heads, dim).transpose(1, 2)


def test_vision_and_text_are_packed_apart():
    key, value = low_rank(2, 2, 80, 16, 3), low_rank(2, 2, 80, 16, 2)
    policy = PackPolicy(vision_rank=(4, 5), text_rank=(6, 3))
    packed_key, packed_value = pack(key, value, policy, modality=vision_mask(80, 10, 40))
    assert packed_key.tokens == packed_value.tokens == {"vision": 40, "text": 40, "dense": 0}
    assert packed_key.ranks == {"vision": 4, "text": 6}
    assert packed_value.ranks == {"vision": 5, "text": 3}
    close(packed_key.dense(), key, 1e-4)
    close(packed_value.dense(), value, 1e-4)
    assert packed_key.placement is packed_value.placement
    assert cache_bytes([packed_key, packed_value]) < cache_bytes([key, value]) / 2


def test_too_low_a_rank_is_the_best_approximation_of_that_rank():
    key, _ = dense_pair(batch=1, tokens=64, dim=16)
    packed, _ = pack(key, key, PackPolicy(text_rank=8))
    matrix = key.transpose(1, 2).reshape(64, 32)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :8] * values[:8]) @ right[:8]
    error = (packed.dense().transpose(1, 2).reshape(64, 32) - matrix).norm()
    assert error <= 1.01 * (best - matrix).norm()


def test_one_mask_for_every_sample_or_one_each():
    key, value = dense_pair(tokens=12)
    both = torch.cat([vision_mask(12, 1, 5), vision_mask(12, 6, 5)])
    for mask in (both[:1], both):
        packed, _ = pack(key, value, VISION_ONLY, modality=mask)
        assert packed.tokens == {"vision": 5, "dense": 7}
        close(packed.dense(), key)


def test_samples_with_different_counts():
    key, value = dense_pair(tokens=12)
    mask = torch.cat([vision_mask(12, 0, 3), vision_mask(12, 2, 9)])
    packed, _ = pack(key, value, VISION_ONLY, modality=mask)
    assert packed.placement.ragged
    close(packed.dense(), key)


def test_without_a_modality_every_token_is_text():
    key, value = dense_pair(tokens=12)
    assert pack(key, value, FULL)[0].tokens == {"text": 12, "dense": 0}
    assert pack(key, value, VISION_ONLY)[0].tokens == {"dense": 12}
    close(pack(key, value, VISION_ONLY)[0].dense(), key)


def test_a_modality_without_vision_tokens():
    key, value = dense_pair(tokens=12)
    packed, _ = pack(key, value, VISION_ONLY, modality=vision_mask(12, 0, 0))
    assert packed.tokens.get("vision", 0) == 0
    close(packed.dense(), key)


def test_padding_inside_the_vision_tokens_is_left_out():
    key, value = dense_pair(tokens=12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, :4] = False
    packed, _ = pack(key, value, VISION_ONLY, modality=vision_mask(12, 2, 6), real=real)
    expected = key.clone()
    expected[0, :, :4] = 0
    close(packed.dense(), expected)


def test_head_dims_of_keys_and_values_may_differ():
    key, _ = dense_pair(tokens=12, dim=8)
    value, _ = dense_pair(tokens=12, dim=4)
    packed_key, packed_value = pack(key, value, FULL)
    close(packed_key.dense(), key)
    close(packed_value.dense(), value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_factored_in_float32_and_stored_as_given(dtype):
    key, value = dense_pair(tokens=12, dtype=dtype)
    packed, _ = pack(key, value, FULL)
    assert packed.dtype == packed.held.blocks[0].basis.dtype == dtype
    close(packed.dense().float(), key.float(), 4 * torch.finfo(dtype).eps)


def test_the_dense_originals_are_not_kept():
    key, value = dense_pair(batch=1, tokens=64, dim=16)
    packed = pack(key, value, PackPolicy(vision_rank=4), modality=vision_mask(64, 0, 60))
    assert cache_bytes(packed) < cache_bytes([key, value]) / 3


@pytest.mark.parametrize("policy", [PackPolicy(text_rank=17), PackPolicy(text_rank=(4, 17))])
def test_a_rank_above_what_the_heads_have_is_refused(policy):
    key, value = dense_pair()
    with pytest.raises(ValueError, match=r"text_rank=17 exceeds H \* D = 16"):
        pack(key, value, policy)


def test_gradients_are_not_followed():
    key, value = dense_pair()
    packed, _ = pack(key.requires_grad_(), value, FULL)
    assert not packed.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"key": torch.zeros(1, 2, 9, 8, dtype=torch.int64)},
            r"key: got torch.int64 \[1, 2, 9, 8\], expected",
        ),
        ({"value": torch.zeros(2, 9, 8)}, r"value: got torch.float32 \[2, 9, 8\], expected a floating"),
        ({"value": torch.zeros(1, 2, 8, 8)}, "expected the same batch, heads, tokens, dtype and device"),
        ({"value": torch.zeros(2, 2, 9, 8)}, "expected the same batch"),
        ({"value": torch.zeros(1, 2, 9, 8).double()}, "expected the same batch"),
        ({"policy": None}, "policy: got NoneType, expected a PackPolicy"),
        ({"modality": torch.ones(1, 9)}, r"modality: got torch.float32 \[1, 9\], expected a bool tensor \[1, 9\]"),
        ({"real": torch.ones(1, 8, dtype=torch.bool)}, r"real: got torch.bool \[1, 8\]"),
        ({"layer": "a"}, "layer: got 'a', expected the layer's number"),
    ],
)
def test_what_is_no_layer_of_a_cache_is_refused(change, message):
    given = {"key": torch.zeros(1, 2, 9, 8), "value": torch.zeros(1, 2, 9, 8), "policy": FULL} | change
    with pytest.raises(ValueError, match=message):
        pack(**given)


@pytest.mark.parametrize("bits", [8, 4, 2, "e4m3", "e5m2"])
@pytest.mark.parametrize("target", ["coefficients", "tail"])
def test_codes_of_float64(bits, target):
    """Scales are fp32, which holds less than the model's dtype."""
    key, value = (x.double() for x in dense_pair(2, 2, 40, 16))
    rank = "full" if target == "coefficients" else None
    policy = PackPolicy(vision_rank=None, text_rank=rank, passes=(Quantize(bits, target=target, recent=0),))
    found = pack(key, value, policy)[0].dense()
    assert found.dtype == torch.float64
    assert (found - key).norm() < {2: 0.7}.get(bits, 0.15) * key.norm()
