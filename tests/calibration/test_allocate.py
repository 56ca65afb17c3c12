import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.calibration import allocate as module
from attnpack_fx.calibration.allocate import ERROR, Allocation, Matrix, allocate, allocate_for_error
from attnpack_fx.kernels.aten.quantize import dequantize_basis, dequantize_coefficient, quantize


@st.composite
def matrices(draw: st.DrawFn, falling: bool = False, largest: int = 3, optional: bool | None = None) -> list[Matrix]:
    drawn = []
    for index in range(draw(st.integers(1, 2))):
        effect = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=largest))
        drawn.append(
            Matrix(
                f"layer {index}",
                torch.tensor(sorted(effect, reverse=True) if falling else effect, dtype=torch.float64),
                draw(st.integers(8, 800)) / 8,
                dtype_bits=draw(st.sampled_from([16, 32])),
                overhead_bytes=draw(st.sampled_from([0.0, 8.0, 100.0])),
                optional=draw(st.booleans()) if optional is None else optional,
            )
        )
    return drawn


def byte_cost(matrix: Matrix, bits: int) -> float:
    return matrix.column_bytes * bits + (matrix.overhead_bytes if 0 < bits < matrix.dtype_bits else 0)


def error_left(matrix: Matrix, bits: int) -> float:
    return 0.0 if bits == matrix.dtype_bits else {0: 1.0, **ERROR}[bits]


def whole(problem: list[Matrix]) -> float:
    return sum(len(matrix.effect) * byte_cost(matrix, matrix.dtype_bits) for matrix in problem)


def least(problem: list[Matrix]) -> float:
    """What keeping the first component of every matrix that must have one may cost."""
    return allocate_for_error(problem, math.inf).bytes


def every(problem: list[Matrix]) -> list[tuple[float, float]]:
    """(bytes, error) of every choice of non-increasing bits."""
    options = []
    for matrix in problem:
        rungs = (matrix.dtype_bits, 8, 4, 2, 0)
        own = []
        for bits in itertools.combinations_with_replacement(rungs, len(matrix.effect)):
            if bits[0] or matrix.optional:
                spent = sum(byte_cost(matrix, b) for b in bits)
                error = sum(e * error_left(matrix, b) for e, b in zip(matrix.effect.tolist(), bits, strict=True))
                own.append((spent, error))
        options.append(own)
    return [tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*options)]


def largest_step(problem: list[Matrix]) -> tuple[float, float]:
    """No single upgrade costs more bytes, and none saves more, than these."""
    costs, savings = [], []
    for matrix in problem:
        pooled = len(matrix.effect) if (matrix.effect.diff() > 0).any() else 1
        costs.append(pooled * byte_cost(matrix, matrix.dtype_bits))
        savings.append(matrix.effect.sum().item() if pooled > 1 else matrix.effect[0].item())
    return max(costs), max(savings)


def check(problem: list[Matrix], found: Allocation) -> None:
    """Blocks are what they have to be, and what is said of them is true."""
    spent = error = 0.0
    assert list(found.blocks) == [matrix.name for matrix in problem]
    for matrix in problem:
        blocks = found.blocks[matrix.name]
        bits = [b for _, b in blocks]
        assert bits == sorted(set(bits), reverse=True) and set(bits) <= {2, 4, 8, matrix.dtype_bits}
        assert all(columns > 0 for columns, _ in blocks) and (blocks or matrix.optional)
        each = [b for columns, b in blocks for _ in range(columns)]
        assert len(each) <= len(matrix.effect)
        each += [0] * (len(matrix.effect) - len(each))
        spent += sum(byte_cost(matrix, b) for b in each)
        error += sum(e * error_left(matrix, b) for e, b in zip(matrix.effect.tolist(), each, strict=True))
    assert found.bytes == pytest.approx(spent) and found.error == pytest.approx(error, abs=1e-9)


@given(problem=matrices(), share=st.floats(0, 1.1))
@settings(max_examples=80, deadline=None)
def test_error_is_within_one_step_of_the_best(problem, share):
    budget = least(problem) + share * (whole(problem) - least(problem))
    found = allocate(problem, budget)
    check(problem, found)
    assert found.bytes <= budget
    best = min(error for spent, error in every(problem) if spent <= budget)
    assert best - 1e-9 <= found.error <= best + largest_step(problem)[1]
    assert allocate(problem, budget) == found


@given(problem=matrices(), share=st.floats(0, 1.1))
@settings(max_examples=80, deadline=None)
def test_bytes_are_within_one_step_of_the_fewest(problem, share):
    max_error = share * sum(matrix.effect.sum().item() for matrix in problem)
    found = allocate_for_error(problem, max_error)
    check(problem, found)
    assert found.error <= max_error
    best = min(spent for spent, error in every(problem) if error <= max_error + 1e-9)
    assert best <= found.bytes + 1e-9 and found.bytes <= max(best, least(problem)) + largest_step(problem)[0]


@given(problem=matrices(largest=12), shares=st.lists(st.floats(0, 1), min_size=2, max_size=6))
@settings(max_examples=80, deadline=None)
def test_more_bytes_never_leave_more_error_nor_a_larger_error_more_bytes(problem, shares):
    low, high = least(problem), whole(problem)
    found = [allocate(problem, low + share * (high - low)) for share in sorted(shares)]
    assert all(after.error <= before.error + 1e-9 for before, after in itertools.pairwise(found))
    total = sum(matrix.effect.sum().item() for matrix in problem)
    found = [allocate_for_error(problem, share * total) for share in sorted(shares)]
    assert all(after.bytes <= before.bytes + 1e-9 for before, after in itertools.pairwise(found))


@given(problem=matrices(falling=True, largest=12, optional=True), place=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_budget_on_the_curve_gives_the_lagrangian_optimum(problem, place):
    """Where the budget ends with an upgrade, every component has the bits that minimise error + lambda * bytes."""
    slopes = [matrix.effect[0].item() / matrix.column_bytes for matrix in problem]
    price = max(slopes) * 10 ** (-6 * place) + 1e-12
    spent = error = 0.0
    for matrix in problem:
        for effect in matrix.effect.tolist():
            rungs = (0, 2, 4, 8, matrix.dtype_bits)
            bits = min(rungs, key=lambda b: effect * error_left(matrix, b) + price * byte_cost(matrix, b))
            spent, error = spent + byte_cost(matrix, bits), error + effect * error_left(matrix, bits)
    assert allocate(problem, spent).error <= error + 1e-9
    assert allocate_for_error(problem, error + 1e-9).bytes <= spent + 1e-9


@pytest.mark.parametrize("water", [1e-6, 3e-4, 0.02, 0.3])
def test_is_reverse_water_filling_on_gaussian_spectra(monkeypatch, water):
    """With distortion 4^-bits at every whole bit, component i gets log2(sigma_i / sqrt(theta)) bits, rounded down."""
    monkeypatch.setattr(module, "ERROR", {bits: 4.0**-bits for bits in range(1, 32)})
    spectra = [torch.arange(1, 65, dtype=torch.float64) ** -2.0, 0.9 ** torch.arange(100, dtype=torch.float64)]
    problem = [Matrix(str(i), s, 100.0, 32, 0.0, optional=True) for i, s in enumerate(spectra)]
    bits = [(0.5 * torch.log2(s / water)).floor().clamp(0, 32) for s in spectra]
    found = allocate(problem, 100.0 * sum(float(b.sum()) for b in bits))
    for matrix, wanted in zip(problem, bits, strict=True):
        got = [b for columns, b in found.blocks[matrix.name] for _ in range(columns)]
        assert got == [b for b in wanted.int().tolist() if b]
    # Components with bits are left with a distortion in [theta, 4 theta), the rest with all of their variance.
    distortion = torch.cat([s * 4.0**-b for s, b in zip(spectra, bits, strict=True)])
    assert found.error == pytest.approx(float(distortion.sum()))
    kept = distortion[torch.cat(bits) > 0]
    assert ((kept >= water) & (kept < 4 * water)).all()


def test_blocks_of_a_spectrum():
    matrix = Matrix("layers.0.key", torch.arange(1, 201, dtype=torch.float64) ** -3.0, (576 + 4096) / 8)
    found = allocate(matrices := [matrix], 60_000)
    check(matrices, found)
    assert [bits for _, bits in found.blocks["layers.0.key"]] == [8, 4, 2]
    assert 59_000 < found.bytes <= 60_000


def test_bytes_go_where_the_effect_is():
    spectrum = torch.arange(1, 65, dtype=torch.float64) ** -2.0
    problem = [Matrix("mild", spectrum, 100.0), Matrix("grave", 50 * spectrum, 100.0), Matrix("wide", spectrum, 400.0)]
    kept = {name: sum(columns for columns, _ in own) for name, own in allocate(problem, 20_000).blocks.items()}
    assert kept["grave"] > kept["mild"] > kept["wide"] >= 1


def test_effects_that_rise_are_pooled_and_a_pool_may_be_split_by_the_last_bytes():
    effect = torch.tensor([9.0, 0.0, 8.0, 1.0], dtype=torch.float64)
    matrix = Matrix("a", effect, 1.0, overhead_bytes=0.0, optional=True)
    # The third component is worth keeping, and the second has to come with it.
    assert allocate([matrix], 6).blocks["a"] == ((3, 2),)
    assert allocate([matrix], 5).blocks["a"] == ((1, 4),)
    rising = Matrix("a", torch.arange(1, 101, dtype=torch.float64), 1.0, overhead_bytes=0.0)
    assert allocate([rising], 100).blocks["a"] == ((50, 2),)
    assert allocate_for_error([rising], 5000).blocks["a"] == ((11, 2),)


def test_room_that_the_next_upgrade_leaves_is_filled():
    large = Matrix("large", torch.tensor([100.0, 90.0]), 100.0, overhead_bytes=0.0, optional=True)
    small = Matrix("small", torch.tensor([0.5, 0.4, 0.3]), 1.0, overhead_bytes=0.0, optional=True)
    found = allocate([large, small], 205)
    assert found.blocks == {"large": ((1, 2),), "small": ((2, 2),)} and found.bytes == 204


def test_a_matrix_keeps_a_component_unless_optional():
    nothing, much = torch.zeros(4), torch.ones(4)
    problem = [Matrix("needed", nothing, 10.0), Matrix("optional", nothing, 10.0, optional=True)]
    assert allocate([*problem, Matrix("much", much, 10.0)], 10_000).blocks == {
        "needed": ((1, 2),),
        "optional": (),
        "much": ((4, 16),),
    }
    assert allocate([*problem, Matrix("none", torch.zeros(0), 10.0, optional=True)], 28).bytes == 28
    assert allocate([], 0) == Allocation({}, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"got 27 bytes, expected at least 28, .* or mark matrices as optional"):
        allocate(problem, 27)


def test_everything_is_kept_as_it_is_where_there_is_room_or_no_error_allowed():
    problem = [Matrix("a", torch.tensor([3.0, 2.0, 5.0, 0.1]), 10.0), Matrix("b", torch.ones(7), 20.0, dtype_bits=32)]
    wanted = {"a": ((4, 16),), "b": ((7, 32),)}
    assert allocate(problem, whole(problem)).blocks == wanted
    found = allocate_for_error(problem, 0.0)
    assert found.blocks == wanted and found.error == 0 and found.bytes == whole(problem)


def test_overhead_makes_few_bits_not_worth_it():
    """Where scales cost more than the numbers, quantised components lie above the hull."""
    matrix = Matrix("a", torch.ones(3, dtype=torch.float64), 1.0, overhead_bytes=1000.0)
    assert allocate([matrix], 50).blocks["a"] == ((3, 16),)


def test_many_components_take_little_time():
    spectrum = torch.arange(1, 1001, dtype=torch.float64) ** -1.5
    noise = torch.rand(100, 1000, generator=torch.Generator().manual_seed(0)) + 0.1
    problem = [Matrix(str(i), spectrum * noise[i], 584.0) for i in range(100)]
    start = time.process_time()
    found = allocate(problem, 0.05 * whole(problem))
    assert time.process_time() - start < 5
    assert 0.0499 * whole(problem) < found.bytes <= 0.05 * whole(problem)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_errors_are_the_quantisers(bits):
    random = torch.Generator().manual_seed(0)
    c, b = torch.randn(1, 576, 32, generator=random), torch.randn(1, 32, 32, 128, generator=random)
    codes, rows, scale = quantize(c, b, bits)
    there = dequantize_coefficient(codes, scale, 32, bits, torch.float32)[0]
    back = dequantize_basis(rows, scale, 128, bits, torch.float32)[0].transpose(0, 1).flatten(1)
    c, b = c[0], b[0].transpose(0, 1).flatten(1)
    square = c.square().sum(0) * b.square().sum(1)
    inner = (c * there).sum(0) * (b * back).sum(1)
    error = (square - 2 * inner + there.square().sum(0) * back.square().sum(1)) / square
    assert error.double().mean().item() == pytest.approx(ERROR[bits], rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"effect": torch.ones(2, 2)}, r"effects of shape \[2, 2\], expected \[R\]"),
        ({"effect": torch.ones(0)}, r"R >= 1; .* optional=True"),
        ({"effect": torch.tensor([1.0, -1.0])}, "negative, NaN or infinite"),
        ({"effect": torch.tensor([1.0, math.nan])}, "negative, NaN or infinite"),
        ({"effect": torch.tensor([math.inf])}, "negative, NaN or infinite"),
        ({"column_bytes": 0.0}, "column_bytes=0.0"),
        ({"overhead_bytes": -1.0}, "overhead_bytes=-1.0"),
        ({"dtype_bits": 8}, "dtype_bits=8, expected 16 or 32"),
    ],
)
def test_refuses_what_no_matrix_can_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Matrix(**{"name": "a", "effect": torch.ones(2), "column_bytes": 1.0, **fields})


def test_refuses_two_of_one_name_and_negative_errors():
    with pytest.raises(ValueError, match="no name twice"):
        allocate([Matrix("a", torch.ones(2), 1.0)] * 2, 1000)
    with pytest.raises(ValueError, match="max_error: got -1, expected a number >= 0"):
        allocate_for_error([Matrix("a", torch.ones(2), 1.0)], -1)
    with pytest.raises(ValueError, match="budget: got nan"):
        allocate([Matrix("a", torch.ones(2), 1.0)], math.nan)
