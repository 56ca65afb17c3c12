"""The specification itself, against what is known independently of it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attnpack_fx.kernels import reference
from attnpack_fx.kernels.parts import Block, PackedParts, RowForm, Rows, Segment

from .inputs import Shapes, attention_arguments, decompress_arguments, map_blocks, relative_error


def test_attention_over_lossless_parts_is_attention_over_the_dense_cache():
    key, value = (torch.randn(2, 3, 20, 8, dtype=torch.float64) for _ in range(2))
    query = torch.randn(2, 6, 4, 8, dtype=torch.float64)
    mask = torch.rand(2, 1, 4, 20) < 0.7
    modality = torch.arange(17)[None] % 3 > 0
    vision, text, dense, slot = reference.plan(modality, None, key[:, :, :17], False, [], [])
    index = torch.cat([vision, text, dense], 1)
    packed = []
    for x in (key, value):
        tail = torch.cat([reference.take_rows(x, dense, 0), x[:, :, 17:].permute(2, 0, 1, 3)])
        segment = Segment((Block(*reference.compress(x, vision, 1000)),))
        packed.append(PackedParts((segment,), tail, len(tail), index, slot))
    out = reference.attention(query, *packed, mask, 0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert relative_error(out, expected) < 1e-12
    assert relative_error(reference.decompress(packed[0]), key) < 1e-12


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_makes_scores_depend_on_distance_alone(interleaved):
    frequency = 10 ** -torch.linspace(0, 2, 4, dtype=torch.float64)
    angle = torch.arange(30)[None, :, None] * frequency
    query, key = torch.randn(2, 8, dtype=torch.float64)

    def rotated(x):
        return reference.rotate(x.expand(1, 1, 30, 8), angle.cos(), angle.sin(), interleaved)[0, 0]

    scores = rotated(query) @ rotated(key).T
    assert torch.allclose(scores[5:20, 5:20], scores[10:25, 10:25])
    assert torch.allclose(scores[0, 0], query @ key)


def test_compress_is_the_optimal_approximation():
    x = torch.randn(1, 2, 30, 8, dtype=torch.float64)
    coefficient, basis = reference.compress(x, torch.arange(30)[None], 5)
    a = x.transpose(1, 2).flatten(2)
    error = (a - coefficient @ basis.transpose(1, 2).flatten(2)).norm()
    assert torch.isclose(error, torch.linalg.svdvals(a)[0, 5:].norm())


def test_fold_after_compress_is_the_truncation_of_all_rows():
    x = torch.randn(2, 2, 30, 8, dtype=torch.float64)
    coefficient, basis = reference.compress(x, torch.arange(20).expand(2, -1), 16)
    folded = reference.fold(coefficient, basis, x[:, :, 20:].permute(2, 0, 1, 3), 6)
    direct = reference.compress(x, torch.arange(30).expand(2, -1), 6)

    def product(pair):
        return pair[0] @ pair[1].transpose(1, 2).flatten(2)

    assert relative_error(product(folded[:2]), product(direct)) < 1e-10
    dropped = (product(direct) - x.transpose(1, 2).flatten(2)).norm(dim=(1, 2))
    assert torch.allclose(folded[2].double(), dropped, rtol=1e-6)


def test_filler_is_left_out_of_attention():
    shape = Shapes(ragged=True, segments=(12,), kept=4, batch=2)
    arguments = attention_arguments(shape)
    out = reference.attention(**arguments)
    filler = (arguments["keys"].index < 0)[:, :12, None]
    arguments["values"] = map_blocks(
        arguments["values"], lambda each: replace(each, coefficient=torch.where(filler, 1e3, each.coefficient))
    )
    assert filler.any() and torch.equal(out, reference.attention(**arguments))


def test_blocks_add_up_over_the_tokens_they_cover():
    shape = Shapes(batch=2, segments=(10,), kept=0, appended=0)
    whole = decompress_arguments(shape)["parts"]
    dense = reference.decompress(whole)
    coefficient, basis = whole.blocks[0].coefficient, whole.blocks[0].basis
    first, later = whole.index[:, :6], whole.index[:, 6:]
    blocks = Block(coefficient[..., :3], basis[:, :, :3]), Block(coefficient[:, :6, 3:], basis[:, :, 3:])
    cut = reference.decompress(replace(whole, segments=(Segment(blocks),)))
    for sample in range(2):
        assert torch.allclose(cut[sample][:, first[sample]], dense[sample][:, first[sample]])
        lower = coefficient[sample, 6:, :3].double() @ basis[sample, :, :3].double()
        assert torch.allclose(cut[sample][:, later[sample]], lower)


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (4, 16), (2, 4)])
def test_every_code_is_a_level_of_its_own(bits, levels):
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    found = reference.decoded(codes, 8 // bits, bits)
    low, high = {8: (-128, 127), 4: (-8, 7), 2: (-1.5, 1.5)}[bits]
    assert found.shape == (256, 8 // bits) and (found.min(), found.max()) == (low, high)
    assert len(found.unique()) == levels + (bits == 8)


def test_rows_are_what_their_formula_says():
    """One token, two heads, four channels of 2 bits in groups of two; an outlier, then the residual on top."""
    fields = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 0]])
    codes = (fields << torch.tensor([0, 2, 4, 6])).sum(-1, keepdim=True).to(torch.uint8)[None, None]
    scale = torch.tensor([[1.0, 10], [2, 0.5]])[None, None]
    rows = Rows(
        RowForm(2, group=2, zero=True, outliers=True, rank=1, norm=True),
        codes,
        scale,
        zero=torch.tensor([[0.0, 1], [-1, 0]])[None, None],
        outliers=torch.tensor([[99.0, 7]]),
        places=torch.tensor([[-1, 4 + 3]], dtype=torch.int32),
        left=torch.tensor([2.0, 1])[None, None, :, None],
        right=torch.arange(8.0).view(1, 1, 2, 1, 4),
        part_of=torch.zeros(1, 1, dtype=torch.int32),
        norm=torch.tensor([1.0, 3])[None, None],
    )
    first = [0 + 0, 1 + 2, 21 + 4, 31 + 6]
    second = [3 * 5 + 4, 3 * 5 + 5, 0 + 6, 7 + 7]
    assert reference.coded(rows, 4)[0, 0].tolist() == [first, second]


@pytest.mark.parametrize("more", ["keys", "values"])
def test_keys_and_values_may_hold_different_numbers_of_slots_in_segments(more):
    form = ((4, RowForm(0)),)
    shape = Shapes(
        batch=2, kept=5, key_rows=form if more == "keys" else (), value_rows=form if more == "values" else ()
    )
    given = attention_arguments(shape)
    out = reference.attention(**given)
    # The rows as the first of the tail: segments of rows stand right before it.
    parts = given[more]
    tail = torch.cat([parts.blocks[-1].codes.transpose(0, 1), parts.tail])
    moved = replace(parts, segments=parts.segments[:-1], tail=tail, length=parts.length + 4)
    assert torch.equal(out, reference.attention(**given | {more: moved}))


def test_a_basis_of_the_batch_serves_every_sample():
    shape = Shapes(batch=3, shared=True)
    arguments = attention_arguments(shape)

    def apart(block):
        return replace(block, basis=block.basis.expand(3, -1, -1, -1))

    own = {name: map_blocks(arguments[name], apart) for name in ("keys", "values")}
    assert torch.equal(reference.attention(**arguments), reference.attention(**arguments | own))
