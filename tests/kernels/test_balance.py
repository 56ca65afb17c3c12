"""Keys that half precision holds, and rows of them that it does not: a coefficient is as long as a row of all heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnpack_fx import Energy, MiniCache, PackedTensor, PackPolicy, Quantize, pack
from attnpack_fx.folding import fold
from attnpack_fx.kernels import ops
from attnpack_fx.kernels.balance import balanced, lengths
from attnpack_fx.maintenance import maintain
from attnpack_fx.packing import fresh_layer
from attnpack_fx.passes.storage import Columns, Stored
from tests.kernels.inputs import SEEDS
from tests.kernels.triton.interpreted import factorize as kernels

#: The norm of a row, beyond the 65,504 that half precision reaches.
NORM = 1e5


def large(tokens: int = 24, batch: int = 2, seed: int = 0, norm: float = NORM) -> Tensor:
    """Fp16 `[B, 4, T, 16]`; with heads concatenated, every row has this norm, but for the first, which is small."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, 4, tokens, 16), generator=random)
    x *= norm / torch.linalg.vector_norm(x, dim=(1, 3), keepdim=True)
    x[:, :, 0] *= 1e-3
    x = x.half()
    assert x.isfinite().all()
    return x


def near(actual: Tensor, expected: Tensor, tolerance: float = 2e-3) -> None:
    assert actual.dtype == expected.dtype and actual.isfinite().all()
    actual, expected = actual.double(), expected.double()
    assert (actual - expected).norm() <= tolerance * expected.norm()


@given(seed=SEEDS, size=st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(1, 6)), exponent=st.integers(-8, 6))
@settings(max_examples=50, deadline=None)
def test_balancing_changes_no_product_and_no_order(seed, size, exponent):
    random = torch.Generator().manual_seed(seed)
    batch, _, rank = size
    coefficient = torch.randn(size, generator=random) * 30_000 * 2.0**exponent
    basis = torch.nn.functional.normalize(torch.randn((batch, rank, 8), generator=random), dim=2)
    for shared in (basis, basis[:1]):
        made = balanced(coefficient, shared, torch.float16)
        assert all(part.isfinite().all() for part in made)
        expected = coefficient.double() @ shared.double()
        assert ((made[0].double() @ made[1].double()) - expected).norm() <= 1e-3 * (expected.norm() + 1)
        of_rows = lengths(made[1].unflatten(2, (2, 4)).transpose(1, 2))
        assert torch.equal(of_rows.log2(), of_rows.log2().round())
        times = made[0].double() * of_rows[:, None, None]
        assert (times - coefficient.double()).norm() <= 1e-3 * (coefficient.double().norm() + 1)
    for dtype in (torch.float32, torch.bfloat16):
        kept = balanced(coefficient, basis, dtype)
        assert torch.equal(kept[0], coefficient.to(dtype)) and torch.equal(kept[1], basis.to(dtype))


@pytest.mark.parametrize("rank", ["full", 16])
@pytest.mark.parametrize("bases", ["sample", "batch"])
def test_packed_keys_are_what_they_stand_for(rank, bases):
    key, value = large(), large(seed=1)
    policy = PackPolicy(text_rank=rank, bases=bases, basis_tolerance=0.5 if rank == 16 else 0.0)
    for packed, dense in zip(pack(key, value, policy), (key, value), strict=True):
        assert isinstance(packed, PackedTensor)
        near(packed.dense(), dense, 2e-3 if rank == "full" else 0.8)


def test_a_basis_of_the_model_is_left_as_it_is():
    """Samples that it fits but for their size get a basis of their own."""
    key = large()
    index = torch.arange(24).expand(2, -1)
    given_basis = torch.linalg.svd(key[:1].transpose(1, 2).flatten(2).float()).Vh
    given_basis = given_basis.unflatten(2, (4, 16)).transpose(1, 2).half().contiguous()
    coefficient, bases, owner = ops.compress_shared(key, index, 64, 0.9, given_basis)
    assert coefficient.isfinite().all() and owner.tolist() == [1, 2]
    bases = torch.cat([given_basis[:, :, : bases.shape[2]], bases])
    made = coefficient.double() @ bases[owner].double().transpose(1, 2).flatten(2)
    near(made, key.transpose(1, 2).flatten(2).double())


def test_the_rank_that_an_energy_asks_for_and_the_loss_of_it():
    """Both are sums of squares of coefficients, which are those of the tokens where rows of the basis have length 1."""
    key = large()
    policy = PackPolicy(text_rank=Energy(0.9), fold_every=64)
    ranks = [pack(x, x, policy)[0] for x in (key, (key.float() / 1024).half())]
    assert ranks[0].ranks == ranks[1].ranks
    losses = [dict(packed.held.losses)["text"].relative for packed in ranks]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2) and 0.1 < losses[0] < 0.33


def test_coefficients_in_few_bits():
    key, value = large(), large(seed=1)
    for packed, dense in zip(
        pack(key, value, PackPolicy(text_rank=64, passes=(Quantize(8),))), (key, value), strict=True
    ):
        near(packed.dense(), dense, 0.03)


def test_folds():
    key, value = large(), large(seed=1)
    layer = fresh_layer(key, value, PackPolicy(text_rank=64, fold_every=4), modality=None, real=None, layer=0)
    more = large(8, seed=2)
    pair = (layer.key.append(more), layer.value.append(more))
    how = Stored(Columns(((64, 0),)), Columns(((64, 0),)))
    for packed, dense in zip(fold(*pair, 8, how, None), (key, value), strict=True):
        assert packed.tokens == {"text": 32, "dense": 0}
        near(packed.dense(), torch.cat([dense, more], 2))


def test_layers_that_share_directions():
    """One head's norm may be beyond half precision as well."""
    pairs = [tuple(large(seed=seed + more).sign() * 20_000 for more in (0, 9)) for seed in (0, 1)]
    assert all(torch.linalg.vector_norm(key.float(), dim=3).min() > 65_504 for key, _ in pairs)
    policy = PackPolicy(vision_rank=None, layer_count=2, passes=(MiniCache(first=0.0, gamma=0.0),))
    layers = [fresh_layer(*pair, policy, modality=None, real=None, layer=number) for number, pair in enumerate(pairs)]
    maintain(layers, policy)
    for layer, pair in zip(layers, pairs, strict=True):
        for packed, dense in zip((layer.key, layer.value), pair, strict=True):
            made = packed.dense()
            assert made.isfinite().all()
            norms = [torch.linalg.vector_norm(x.float(), dim=3) for x in (made, dense)]
            torch.testing.assert_close(*norms, rtol=2e-2, atol=1)


def test_to_half_precision():
    key = large().float()
    packed, _ = pack(key, key, PackPolicy(text_rank="full"))
    near(packed.to(torch.float16), key.half())
    small, _ = pack(key / 16, key / 16, PackPolicy(text_rank="full"))
    assert isinstance(small.to(torch.float16), PackedTensor)


@pytest.mark.parametrize("rank", [16, 64])
def test_kernels_that_factor(rank, monkeypatch):
    """In Triton's interpreter, LAPACK in the place of the Jacobi kernel."""

    def left_singular_vectors(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        left, singular, _ = torch.linalg.svd(x)
        return singular, left.mT[:, :count].contiguous()

    monkeypatch.setattr(kernels, "left_singular_vectors", left_singular_vectors)
    key = large(40)
    index = torch.arange(40).expand(2, -1)
    coefficient, basis = kernels.compress(key, index, rank)
    made = coefficient.double() @ basis.double().transpose(1, 2).flatten(2)
    near(made, key.transpose(1, 2).flatten(2).double(), 2e-3 if rank == 64 else 0.8)
