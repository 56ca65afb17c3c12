"""Samples that share a basis: from the graph's compression to bytes, answers and forks of the cache."""

import dataclasses

import pytest
import torch

import attnpack_fx
from attnpack_fx import PackPolicy, cache_bytes
from attnpack_fx.kernels import ops
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import PackedParts, Segment
from attnpack_fx.storing import store

from .zoo import ZOO

TOKENS = 6

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]


@pytest.fixture(scope="module")
def model():
    return ZOO["llava-mha"].build("sdpa")


@pytest.fixture(scope="module")
def inputs():
    return ZOO["llava-mha"].inputs(2, 0)


def answered(model, inputs, policy=None):
    model._compiled_call_impl = None
    torch.compiler.reset()
    if policy is not None:
        attnpack_fx.compile(model, policy=dataclasses.replace(policy, strict=True))
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )


def bases(out):
    return [tuple(layer.values.held.blocks[0].basis.shape) for layer in out.past_key_values.layers]


def assert_same_answers(out, dense):
    assert torch.equal(out.sequences, dense.sequences)
    for actual, expected in zip(out.logits, dense.logits, strict=True):
        assert torch.allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("tolerance", [1.0, 0.0])
def test_a_batch_shares_bases_or_has_its_own(model, inputs, tolerance):
    dense = answered(model, inputs)
    # Two samples have 32 vision tokens together: at that rank a common basis loses nothing.
    out = answered(model, inputs, PackPolicy(vision_rank="full", bases="batch", basis_tolerance=tolerance))
    assert bases(out)[0][0] == (1 if tolerance else 2)
    assert_same_answers(out, dense)


def test_sharing_halves_the_bases(model, inputs, without_inductor):
    own, shared = (
        answered(model, inputs, PackPolicy(vision_rank=8, bases=kind, basis_tolerance=1.0))
        for kind in ("sample", "batch")
    )
    saved = cache_bytes(own.past_key_values) - cache_bytes(shared.past_key_values)
    layers, heads, dim = len(bases(own)), *bases(own)[0][1::2]
    assert saved == layers * 2 * 8 * heads * dim * 4


@pytest.mark.parametrize("key_space", ["rotated", "unrotated"])
def test_bases_of_the_model_serve_every_request(model, inputs, key_space, tmp_path, request):
    """Through Inductor for one of them."""
    if key_space == "rotated":
        request.getfixturevalue("without_inductor")
    dense = answered(model, inputs)
    model._compiled_call_impl = None
    policy = attnpack_fx.calibrate_bases(model, [inputs], tmp_path / "bases.safetensors", rank=32, key_space=key_space)
    assert policy == PackPolicy.from_dict(policy.to_dict())
    lossless = dataclasses.replace(policy, basis_tolerance=1.0)
    out, again = (answered(model, inputs, lossless) for _ in range(2))
    assert bases(out)[0][0] == 1
    held = [each.past_key_values.layers[0].values.held.blocks[0] for each in (out, again)]
    # All values of the two samples, seen before, lie in the 32 components kept; of the keys, if they are not rotated.
    assert held[0].basis.shape[2] == 32
    if key_space == "unrotated":
        assert_same_answers(out, dense)
    exact = answered(model, inputs, dataclasses.replace(policy, basis_tolerance=0.0))
    assert_same_answers(exact, dense)
    # Of fewer columns something is left out, so that samples have bases of their own.
    cut = answered(model, inputs, dataclasses.replace(policy, vision_rank=8, basis_tolerance=0.0))
    assert bases(cut)[0][0] > 1


def test_a_fork_keeps_the_shared_basis(model, inputs, without_inductor):
    out = answered(model, inputs, PackPolicy(vision_rank=8, bases="batch", basis_tolerance=1.0))
    value = out.past_key_values.layers[0].values
    one = value.samples(torch.tensor([1, 1, 0]))
    assert one.held.blocks[0].basis.data_ptr() == value.held.blocks[0].basis.data_ptr()
    assert torch.equal(one.dense(), value.dense()[[1, 1, 0]])


def test_folded_text_has_bases_of_its_own(model, inputs, without_inductor):
    shared = PackPolicy(vision_rank="full", text_rank="full", bases="batch", basis_tolerance=1.0)
    folded = dataclasses.replace(shared, fold_every=2, recent=2)
    dense = answered(model, inputs)
    for policy, samples in ((shared, [1, 1]), (folded, [1, 2])):
        out = answered(model, inputs, policy)
        value = out.past_key_values.layers[0].values
        assert [block.basis.shape[0] for block in value.held.blocks] == samples
        assert_same_answers(out, dense)


def test_bases_that_are_not_there(model, inputs, tmp_path, without_inductor):
    missing = PackPolicy(vision_rank=8, bases=str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match=r"bases: cannot read .*none\.safetensors"):
        answered(model, inputs, missing)
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"bases: cannot read .*bad\.safetensors"):
        answered(model, inputs, dataclasses.replace(missing, bases=str(tmp_path / "bad.safetensors")))


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_bits_of_bases_that_some_samples_share(bits):
    coefficient, basis = torch.randn(3, 9, 4), torch.linalg.qr(torch.randn(2, 16, 4)).Q.mT.unflatten(2, (2, 8))
    basis, owner = basis.transpose(1, 2).contiguous(), torch.tensor([0, 1, 0])
    columns = attnpack_fx.Columns(((4, bits),))
    segment, _ = store(coefficient, basis, columns, owner=owner)
    alone, _ = store(coefficient, basis[owner].contiguous(), columns)
    pair = [_dense(each.blocks[0]) for each in (segment, alone)]
    assert segment.blocks[0].basis.shape[0] == 2
    assert torch.allclose(*pair, atol=1e-6)


def _dense(block):
    index = torch.arange(9).expand(3, -1).contiguous()
    tensors, (layout,) = flatten(PackedParts((Segment((block,)),), torch.zeros(0, 3, 2, 8), 0, index, index))
    return ops.decompress(tensors, layout, 0)


def test_nothing_to_calibrate_on(model, tmp_path, without_inductor):
    text = {"input_ids": torch.tensor([[11, 12, 13]])}
    with pytest.raises(ValueError, match="got 1 samples in which nothing was packed"):
        attnpack_fx.calibrate_bases(model, [text], tmp_path / "bases.safetensors")
