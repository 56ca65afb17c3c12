"""Axes found in the cos and sin of real models: few rows, and their sums bit for bit what was given."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels.parts import Angles
from attnpack_fx.kernels.rotary import per_slot
from attnpack_fx.kernels.rotary_axes import tabulate

from .multimodal import LAYOUTS, Media, cos_and_sin

IMAGE, VIDEO = Media("image", (1, 24, 20)), Media("video", (6, 12, 16))


def check(cos, sin, rows, axes):
    """`tabulate` finds this many axes and at most this many rows, which sum to what was given."""
    found = tabulate(cos, sin)
    assert found is not None
    assert found[2].shape[1] == axes and found[0].shape[1] <= rows
    rebuilt = per_slot(Angles(*found, False), 0, cos.shape[1])
    for actual, expected in zip(rebuilt, (cos, sin), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.view(torch.int16), expected.contiguous().view(torch.int16))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vision_tokens_of_real_models(layout, dtype):
    cos, sin = cos_and_sin(layout, [[IMAGE]], dtype)
    check(cos, sin, rows=44, axes=2)  # time stands still in an image: its rows are those of another axis
    cos, sin = cos_and_sin(layout, [[VIDEO]], dtype)
    if layout == "qwen3_vl":  # its frames are images with text between them: later ones lie further down and right
        check(cos, sin, rows=6 * 28, axes=2)
    else:
        check(cos, sin, rows=34, axes=3)
    cos, sin = cos_and_sin(layout, [[IMAGE, Media("image", (1, 30, 40))]], dtype)
    check(cos, sin, rows=44 + 70, axes=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_with_different_grids(layout, dtype):
    wide = [Media("image", (1, 12, 40))]
    cos, sin = cos_and_sin(layout, [[IMAGE], wide], dtype)
    _, _, axes = check(cos, sin, rows=52, axes=2)
    assert axes.shape == (2, 2, 480)
    assert axes[0].max() < 44


def test_fillers_hold_whatever_they_hold():
    cos, sin = cos_and_sin("qwen2_5_vl", [[IMAGE]], torch.float32)
    cos[0, -5:], sin[0, -5:] = 7.0, torch.tensor(-0.0)
    cos[0, -1] = float("nan")
    check(cos, sin, rows=50, axes=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_text_has_no_short_axes(dtype):
    angles = (torch.arange(3000)[:, None] / 1e4 ** (torch.arange(64) / 64))[None]
    assert tabulate(angles.cos().to(dtype), angles.sin().to(dtype)) is None
    assert tabulate(angles[:, :0], angles[:, :0]) is None


def test_a_dtype_without_bits_to_compare_is_refused():
    cos = torch.ones(1, 4, 2)
    with pytest.raises(ValueError, match="one dtype of 16 or 32 bits"):
        tabulate(cos.double(), cos.double())
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.bfloat16"):
        tabulate(cos, cos.bfloat16())


@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(4, 9), min_size=2, max_size=3),
    batch=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_any_assignment_of_pairs_to_axes(seed, sizes, batch):
    random = torch.Generator().manual_seed(seed)
    shape = SimpleNamespace(tokens=torch.Size(sizes).numel(), pairs=8)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij")).flatten(1)
    owner = torch.cat([torch.arange(len(sizes)), torch.randint(len(sizes), (8 - len(sizes),), generator=random)])
    angles = torch.rand((batch, max(sizes), shape.pairs), generator=random) * 6.28
    angles = angles[:, grid[owner], torch.arange(8)[:, None]].transpose(1, 2)
    order = torch.stack([torch.randperm(shape.tokens, generator=random) for _ in range(batch)])
    angles = angles.gather(1, order[:, :, None].expand_as(angles))
    found = tabulate(angles.cos(), angles.sin())
    if 2 * sum(sizes) > shape.tokens:
        assert found is None
    else:
        check(angles.cos(), angles.sin(), rows=sum(sizes), axes=len(sizes))
