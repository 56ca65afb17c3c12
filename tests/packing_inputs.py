"""Dense caches and packed ones made from them, for tests."""

import torch
from torch import Tensor

from attnpack_fx import PackedTensor, PackPolicy, pack

FULL = PackPolicy(vision_rank="full", text_rank="full")
VISION_ONLY = PackPolicy(vision_rank="full", text_rank=None)


def dense_pair(
    batch: int = 2, heads: int = 2, tokens: int = 12, dim: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random keys and values `[B, H, T, D]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dim)
    return torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype)


def vision_mask(tokens: int, start: int, count: int, batch: int = 1) -> Tensor:
    mask = torch.zeros((batch, tokens), dtype=torch.bool)
    mask[:, start : start + count] = True
    return mask


def packed_pair(policy: PackPolicy = VISION_ONLY, **shape) -> tuple[PackedTensor, PackedTensor, Tensor, Tensor]:
    """Packed keys and values with vision tokens 2..7, and the dense ones they stand for."""
    key, value = dense_pair(**shape)
    packed = pack(key, value, policy, modality=vision_mask(key.shape[2], 2, 6))
    return *packed, key, value


def assert_stands_for(packed: Tensor, dense: Tensor, tolerance: float = 2e-5) -> None:
    """That a tensor is packed, and means the dense one."""
    assert isinstance(packed, PackedTensor)
    assert packed.shape == dense.shape
    torch.testing.assert_close(packed.dense(), dense, atol=tolerance, rtol=tolerance)
