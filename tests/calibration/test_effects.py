"""Effects against what really happens: a component is dropped and attention computed anew in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx.calibration.capture import Angles, Observed, Read, _question
from attnpack_fx.calibration.effects import attended, factors, key_effects, value_effects
from attnpack_fx.kernels.rotary import rotate

SCALE = 0.3


@st.composite
def layers(draw: st.DrawFn) -> Observed:
    """A layer with two samples, padding masked, keys and values of falling singular values."""
    heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 3)]))
    dim, prompt, steps = 8, draw(st.sampled_from([5, 20])), 3
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def matrix(tokens: int) -> Tensor:
        x = torch.randn((2, tokens, heads * dim), generator=generator)
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        return (u * 3 * 0.6 ** torch.arange(u.shape[2]) @ v).unflatten(2, (heads, dim)).transpose(1, 2)

    mask = torch.zeros((2, 1, 1, prompt + steps))
    mask[0, ..., 0] = torch.finfo(torch.float32).min
    boolean = draw(st.booleans())
    reads = []
    for step in range(steps):
        query = torch.randn((2, heads * group, 1, dim), generator=generator)
        own = mask[..., : prompt + step + 1]
        reads.append(Read(query, prompt + step + 1, own == 0 if boolean else own))
    width = draw(st.sampled_from([4, 8]))
    phase = torch.randn((1, prompt, width // 2), generator=generator)
    angles = Angles(1.1 * phase.cos(), 1.1 * phase.sin(), False)
    out = torch.randn((heads * group * dim, 6), generator=generator) if draw(st.booleans()) else None
    key, value = matrix(prompt + steps), matrix(prompt + steps)
    question = None
    if draw(st.booleans()):
        query = torch.randn((2, heads * group, 2, dim), generator=generator)
        seen = torch.ones((1, 1, prompt, prompt), dtype=torch.bool).tril()[:, :, -2:]
        question = Read(query, prompt, seen)
    return Observed(key, value, prompt, None, None, angles, out, SCALE, reads, question)


def outputs(layer: Observed, sample: int, key: Tensor, value: Tensor) -> Tensor:
    """Projected attention outputs `[Q, C]` of a sample, with these keys and values, in float64."""
    group = layer.reads[0].query.shape[1] // key.shape[0]
    found = []
    for read in [layer.question, *layer.reads] if layer.question else layer.reads:
        keys, values = (each[:, : read.tokens].repeat_interleave(group, 0) for each in (key, value))
        scores = SCALE * read.query[sample].double() @ keys.mT
        mask = read.mask[sample if read.mask.shape[0] > 1 else 0]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
        found.append((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
    each = torch.cat(found)
    return each if layer.out is None else each @ layer.out.double()


@settings(max_examples=8, deadline=None)
@given(layers(), st.integers(0, 1))
def test_effects_are_the_change_of_the_output_when_a_component_is_dropped(layer, sample):
    index = torch.arange(1, layer.prompt)
    seen = attended(layer, sample, [True] * len(layer.reads))
    key, value = layer.key[sample].double(), layer.value[sample].double()
    exact = outputs(layer, sample, key, value)
    assert seen.total == pytest.approx(float(exact.square().sum()), rel=1e-4)

    coefficient, basis = factors(layer.value[sample][:, index])
    found = value_effects(seen, index, coefficient, basis)
    for component in range(len(found)):
        changed = value.clone()
        changed[:, index] -= coefficient[:, component, None].double() * basis[:, component, None].double()
        change = (outputs(layer, sample, key, changed) - exact).square().sum()
        assert float(found[component]) == pytest.approx(float(change), rel=1e-3, abs=1e-10)

    prompt = layer.key[sample, :, : layer.prompt]
    for angles, keys in ((None, prompt), (layer.angles, layer.angles.unrotated(prompt[None])[0])):
        coefficient, basis = factors(keys[:, index])
        found = key_effects(seen, layer.value[sample, :, : layer.prompt], index, coefficient, basis, angles)
        cos, sin = (each[0, index].double() for each in (layer.angles.cos, layer.angles.sin))
        for component in range(len(found)):
            # To first order: a small part of the component is dropped instead of a small component.
            part = 1e-4
            dropped = part * coefficient[:, component, None].double() * basis[:, component, None].double()
            changed = key.clone()
            changed[:, index] -= dropped if angles is None else rotate(dropped, cos, sin, False)
            change = (outputs(layer, sample, changed, value) - exact).square().sum() / part**2
            assert float(found[component]) == pytest.approx(float(change), rel=1e-2, abs=1e-8)
        # Small components really dropped.
        small = len(found) - 1
        dropped = coefficient[:, small, None].double() * basis[:, small, None].double()
        changed = key.clone()
        changed[:, index] -= dropped if angles is None else rotate(dropped, cos, sin, False)
        change = (outputs(layer, sample, changed, value) - exact).square().sum()
        if float(dropped.abs().max()) < 0.02:
            assert float(found[small]) == pytest.approx(float(change), rel=5e-2, abs=1e-10)


def test_decode_steps_after_the_end_do_not_count():
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn((1, 2, 6, 4), generator=generator) for _ in range(2))
    reads = [Read(torch.randn((1, 2, 1, 4), generator=generator), tokens, None) for tokens in (5, 6)]
    both = Observed(key, value, 4, None, None, None, None, 1.0, reads)
    first = Observed(key, value, 4, None, None, None, None, 1.0, reads[:1])
    assert attended(both, 0, [True, False]).total == attended(first, 0, [True]).total


def test_turning_back_is_the_inverse_of_rotary_embedding():
    generator = torch.Generator().manual_seed(0)
    key, phase = torch.randn((2, 3, 5, 8), generator=generator), torch.randn((1, 5, 2), generator=generator)
    for interleaved in (False, True):
        angles = Angles(0.7 * phase.cos(), 0.7 * phase.sin(), interleaved)
        rotated = rotate(key, angles.cos[:, None], angles.sin[:, None], interleaved)
        torch.testing.assert_close(angles.unrotated(rotated), key)


def test_the_question_is_what_comes_behind_the_last_vision_token():
    """Of every sample, with the mask of the prompt, and no more than the newest."""
    query = torch.arange(2 * 40, dtype=torch.float32).view(2, 1, 40, 1)
    vision = torch.zeros((2, 40), dtype=torch.bool)
    vision[0, 3:35], vision[1, 2:37] = True, True
    read = _question(query, None, vision)
    assert read.tokens == 40 and read.query[:, 0, :, 0].tolist() == [[37, 38, 39], [77, 78, 79]]
    assert read.mask.shape == (1, 1, 3, 40) and read.mask.sum(-1).tolist() == [[[38, 39, 40]]]
    own = torch.randn(2, 1, 40, 40)
    assert torch.equal(_question(query, own, vision).mask, own[:, :, 37:])
    early = torch.zeros((1, 40), dtype=torch.bool)
    early[:, 0] = True
    assert _question(query, None, early).query.shape[2] == 32
    assert _question(query, None, None) is None and _question(query, None, torch.zeros_like(vision)) is None
    assert _question(query, None, torch.ones_like(vision)) is None
