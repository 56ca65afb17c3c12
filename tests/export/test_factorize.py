import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from attnpack_fx.export.factorize import orthonormal, starting_basis, truncated_svd
from tests.kernels.inputs import SEEDS, relative_error

#: What fp32 leaves of a matrix besides the truncation, as a share of its norm.
ROUNDING = 2e-5
#: Where most columns have nothing to span: the median is 1e-6, the worst of some thousand matrices 4e-5.
ROUNDING_OF_LOWER_RANK = 1e-4


def with_spectrum(rows: int, columns: int, singular: Tensor, seed: int = 0) -> Tensor:
    """A matrix of the given singular values with random singular vectors, fp32 `[1, rows, columns]`."""
    random = torch.Generator().manual_seed(seed)
    size = len(singular)
    left = torch.linalg.qr(torch.randn(rows, size, generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, size, generator=random, dtype=torch.float64)).Q
    return ((left * singular) @ right.T).float()[None]


def power_law(size: int, decay: float) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64) ** -decay


def factored(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return truncated_svd(a, rank, starting_basis(a.shape[2], rank))


def check(a: Tensor, rank: int, rounding: float = ROUNDING) -> None:
    """Within 1 % of the best there is, and what is promised of either factor."""
    coefficient, basis = factored(a, rank)
    assert coefficient.shape == (*a.shape[:2], rank) and basis.shape == (a.shape[0], rank, a.shape[2])
    singular = torch.linalg.svdvals(a.double())
    total = singular.norm(dim=1)
    error = (a.double() - coefficient.double() @ basis.double()).norm(dim=(1, 2))
    assert (error <= 1.01 * singular[:, rank:].norm(dim=1) + rounding * total).all()
    unit = coefficient.double() / total.clamp(min=1e-300)[:, None, None]
    lengths = unit.norm(dim=1)
    assert (lengths.diff(dim=1) <= 2e-6).all()
    products = unit.mT @ unit
    assert (products - torch.diag_embed(lengths.square())).abs().amax() < 5e-6 if unit.numel() else True
    # Rows behind those of a matrix of lower rank may be anything.
    rows = basis.double() @ basis.double().mT
    meant = torch.eye(rank, dtype=torch.float64).expand_as(rows)
    counts = lengths > 1e-5
    both = counts[:, :, None] & counts[:, None]
    assert (rows - meant).abs().masked_fill(~both, 0).amax() < 5e-4


@given(
    seed=SEEDS,
    decay=st.floats(0.5, 2.0),
    rows=st.integers(1, 120),
    columns=st.integers(1, 100),
    rank=st.integers(1, 40),
    scale=st.sampled_from([1e-15, 1e-6, 1.0, 1e6, 1e15]),
)
@example(seed=0, decay=2.0, rows=150, columns=130, rank=64, scale=1.0)
@example(seed=0, decay=0.5, rows=150, columns=130, rank=64, scale=1.0)
@example(seed=0, decay=1.0, rows=40, columns=33, rank=33, scale=1.0)
@settings(max_examples=40, deadline=None)
def test_error_is_within_one_percent_of_the_optimum(seed, decay, rows, columns, rank, scale):
    a = with_spectrum(rows, columns, power_law(min(rows, columns), decay), seed)
    check(a * scale, min(rank, columns), ROUNDING_OF_LOWER_RANK if rows <= min(rank, columns - 1) else ROUNDING)


@pytest.mark.parametrize(("decay", "rank"), [(0.5, 64), (1.0, 32), (2.0, 64)])
def test_a_typical_size(decay, rank):
    check(with_spectrum(576, 512, power_law(512, decay)), rank)


@pytest.mark.parametrize("width", [1, 2, 15, 16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
def test_fewer_tokens_than_columns_are_kept_without_a_loss(tokens, width):
    """As in a sample that is shorter than its neighbours."""
    a = torch.randn((3, tokens, width), generator=torch.Generator().manual_seed(tokens))
    rounding = ROUNDING_OF_LOWER_RANK if tokens < width else ROUNDING
    check(a, width, rounding)
    padded = nn.functional.pad(a, (0, 0, 0, 30))
    check(padded, width, rounding)
    coefficient, _ = factored(padded, width)
    assert coefficient[:, tokens:].abs().amax() < 1e-6 * max(float(a.abs().sum()), 1e-6)


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize(("tokens", "width"), [(60, 48), (600, 1024)])
def test_matrices_of_lower_rank_than_asked_for(rank, tokens, width):
    check(with_spectrum(tokens, width, torch.ones(rank, dtype=torch.float64)), 24)


@pytest.mark.parametrize("size", [10.0, 1e3, 1e5])
def test_tokens_that_are_nearly_the_same(size):
    """One direction far above all others, as the mean of keys is."""
    random = torch.Generator().manual_seed(0)
    mean = torch.randn((1, 1, 1024), generator=random)
    check(size * mean + torch.randn((2, 300, 1024), generator=random), 32)
    check(size * mean.expand(2, 300, -1), 32)


def test_the_zero_matrix():
    coefficient, basis = factored(torch.zeros(2, 9, 12), 4)
    assert coefficient.eq(0).all() and basis.isfinite().all()


def test_every_matrix_is_factored_as_if_alone():
    a = torch.randn((4, 50, 40), generator=torch.Generator().manual_seed(0))
    a = a * torch.tensor([1.0, 1e-12, 1e12, 0.0])[:, None, None]
    check(a, 8)
    coefficient, basis = factored(a, 8)
    for number in range(4):
        alone = factored(a[number : number + 1], 8)
        assert relative_error((coefficient @ basis)[number : number + 1], alone[0] @ alone[1]) < 1e-4


def test_a_start_for_a_higher_rank_serves_too():
    a = with_spectrum(90, 64, power_law(64, 1.0))
    coefficient, basis = truncated_svd(a, 6, starting_basis(64, 20))
    exact = torch.linalg.svdvals(a.double())[0, 6:].norm()
    assert coefficient.shape == (1, 90, 6) and (a - coefficient @ basis).norm() <= 1.01 * exact


@pytest.mark.parametrize(("width", "rank"), [(1, 1), (7, 3), (64, 8), (64, 64)])
def test_the_start_is_the_same_each_time_and_has_an_even_number_of_columns(width, rank):
    state = torch.get_rng_state()
    start = starting_basis(width, rank)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(start, starting_basis(width, rank))
    assert start.shape[0] == width and start.shape[1] % 2 == 0 and start.shape[1] >= rank
    real = start[:, : min(start.shape[1], width)]
    assert (real.mT @ real - torch.eye(real.shape[1])).abs().amax() < 1e-5


@pytest.mark.parametrize("conditioning", [0, 2, 4])
def test_orthonormal(conditioning):
    z = with_spectrum(100, 20, 10 ** -torch.linspace(0, conditioning, 20, dtype=torch.float64))
    once = orthonormal(z)
    assert (once.mT @ once - torch.eye(20)).abs().amax() < (1e-4 if conditioning < 4 else 0.1)
    # The same columns span the same spaces: what is left of z outside is rounding.
    inside = once.double() @ torch.linalg.lstsq(once.double(), z.double()).solution
    assert relative_error(inside, z) < 1e-5
    z[..., 3] = 0
    assert orthonormal(z)[..., 3].eq(0).all()


class Factors(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("start", starting_basis(width, rank))

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return truncated_svd(a, self.rank, self.start)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    """For 3 matrices of 16 columns, any number of tokens, and rank 5."""
    dynamic = ({1: Dim("tokens", min=0, max=4096)},)
    return export(Factors(16, 5), (torch.randn(3, 9, 16),), dynamic_shapes=dynamic, strict=False)


def matrices(tokens: int) -> Tensor:
    """Of a batch where one sample has no tokens."""
    a = torch.randn((3, tokens, 16), generator=torch.Generator().manual_seed(tokens))
    a[1] = 0
    return a


@pytest.mark.slow
def test_the_exported_program_gives_the_same(program):
    """A loop for every root and every eigenproblem, for any number of tokens."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("while_loop") == 2 * (3 * 2 + 1) + 2
    assert not any(word in name for name in names for word in ("linalg", "svd", "aten.qr"))
    for tokens in (0, 1, 9, 40):
        a = matrices(tokens)
        for made, expected in zip(program.module()(a), factored(a, 5), strict=True):
            torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_onnx_runtime_gives_the_same(program, tmp_path):
    """Of zero matrices too: of samples without tokens of a kind, and where there are none at all."""
    onnxruntime = pytest.importorskip("onnxruntime")
    made = torch.onnx.export(program, dynamo=True, opset_version=23, input_names=["a"], verbose=False)
    made.save(tmp_path / "factors.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "factors.onnx", providers=["CPUExecutionProvider"])
    for tokens in (0, 1, 9, 40):
        a = matrices(tokens)
        coefficient, basis = (torch.from_numpy(each) for each in session.run(None, {"a": a.numpy()}))
        assert coefficient.isfinite().all() and basis.isfinite().all()
        expected = factored(a, 5)
        torch.testing.assert_close(coefficient @ basis, expected[0] @ expected[1], atol=1e-4, rtol=1e-4)
