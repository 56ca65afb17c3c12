"""Every operator on the device against the float64 reference: fresh random inputs, poisoned memory.

Generators and tolerances are those of the tests. Before each call freed device memory is filled with NaN, so that what
an operator does not write, or reads without having written it, shows.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.kernels import ops, ops_prune, reference
from attnpack_fx.kernels.flat import flatten
from benchmarks.gpu.judging import attended, judge, same, seeded
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.newest import check_attention_each, check_observe_newest
from benchmarks.gpu.part import Part, Result, Run, WrongResultError, left_out, markdown, measured
from benchmarks.gpu.problems import attention_problems, attention_shapes, on, poison, prompts
from tests.kernels.inputs import TOLERANCE, Shapes, decompress_arguments, operands, relative_error

DTYPES = tuple(TOLERANCE)
#: Compress may miss the optimum by this factor, beside rounding its factors.
_NEAR_BEST = 1.01
Check = Callable[[Machine, torch.dtype, int], dict[str, float]]


def cases(run: Run) -> Mapping[str, Callable[[], Result]]:
    """Every operator of the namespace in every dtype; one without a check here fails."""
    functions: dict[str, Callable[[], Result]] = {}
    for name in sorted({*registered(), *CHECKS}):
        for dtype in DTYPES:
            functions[f"{name} {short(dtype)}"] = partial(measure_case, run.machine, name, dtype, run.seed)
    return functions


def registered() -> set[str]:
    """Names of the operators in `torch.ops.attnpack`."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("attnpack::").partition(".")[0] for name in names if name.startswith("attnpack::")}


@torch.no_grad()
def measure_case(machine: Machine, name: str, dtype: torch.dtype, seed: int | None = None) -> Result:
    """Worst error of one operator over its inputs. Raises WrongResultError, with the seed, for the first too large."""
    if name not in CHECKS:
        raise WrongResultError(f"operator attnpack::{name} has no check in benchmarks/gpu/correctness.py")
    if name not in registered():
        raise WrongResultError(f"attnpack::{name} has a check in benchmarks/gpu/correctness.py and is no operator")
    seed = secrets.randbits(31) if seed is None else seed
    try:
        errors = CHECKS[name](machine, dtype, seed)
    except WrongResultError as error:
        alone = f"--part correctness --only '{name} {short(dtype)}' --fresh --seed {seed}"
        raise WrongResultError(f"{error}; alone: {alone}") from None
    machine.synchronize()
    return {"seed": seed, "inputs": len(errors), "worst": max(errors.values()), "limit": TOLERANCE[dtype]}


# ---- one check for each operator: worst errors by input ----------------------------------------------------


def check_attention(machine: Machine, dtype: torch.dtype, seed: int, shapes: Sequence[Shapes] = ()) -> dict[str, float]:
    """shapes: if given, these alone."""
    errors: dict[str, float] = {}
    for number, arguments, here, what in attention_problems(machine, dtype, seed, shapes):
        poison(machine)
        out = ops.attention(*operands(here))
        attended(errors, f"attention {what}", out, reference.attention(**arguments), dtype, seed + number)
    return errors


def check_attention_weights(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    for number, arguments, here, what in attention_problems(machine, dtype, seed):
        poison(machine)
        out, weights = ops.attention_weights(*operands(here))
        expected, expected_weights = reference.attention_weights(**arguments)
        attended(errors, f"attention_weights {what}", out, expected, dtype, seed + number)
        if weights.dtype != torch.float32:
            raise WrongResultError(f"attention_weights returns weights in {weights.dtype}, expected torch.float32")
        error = relative_error(weights.cpu(), expected_weights)
        judge(errors, f"attention_weights, weights {what}", error, TOLERANCE[dtype], seed + number)
    return errors


def check_decompress(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    for number, shape in enumerate(attention_shapes(machine.dry)):
        shape = replace(shape, dtype=dtype, seed=seed + number, mask="none")
        parts = decompress_arguments(shape)["parts"]
        expected = reference.decompress(parts)
        tensors, (layout,) = flatten(on(machine, parts))
        poison(machine)
        error = relative_error(ops.decompress(tensors, layout, parts.length).cpu(), expected)
        judge(errors, f"decompress {shape}", error, TOLERANCE[dtype], seed + number)
    return errors


def check_append_(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    random = seeded(seed)
    sizes = ((1, 0, 3, 8), (1, 4, 32, 128), (3, 2, 5, 80), (0, 1, 2, 16), (7, 0, 1, 256), (1, 9, 8, 24))
    tails, new, positions = [], [], []
    for count, position, heads, dim in sizes:
        tails.append(torch.randn((position + count + 2, 2, heads, dim), generator=random).to(dtype))
        new.append(torch.randn((2, count, heads, dim), generator=random).to(dtype).transpose(1, 2))
        positions.append(position)
    # All together, a pair as of one layer's keys and values, and one alone.
    for chosen in (slice(None), slice(0, 2), slice(2, 3)):
        expected = [tail.clone() for tail in tails[chosen]]
        reference.append_(expected, new[chosen], positions[chosen])
        here, here_new = on(machine, (tails[chosen], new[chosen]))
        poison(machine)
        ops.append_(here, here_new, positions[chosen])
        for number, (tail, wanted) in enumerate(zip(here, expected, strict=True)):
            same(errors, f"append_ to {len(here)}, tail {number}", tail, wanted, seed)
    return errors


def check_take_rows(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    random = seeded(seed)
    for tokens, chosen, spare, heads, dim in (
        (50, 9, 3, 4, 16),
        (600, 577, 18, 8, 128),
        (5, 0, 2, 2, 24),
        (9, 9, 0, 1, 256),
    ):
        x = torch.randn((2, heads, tokens, dim), generator=random).to(dtype)
        index = torch.randint(-1, tokens, (2, chosen), generator=random)
        here = on(machine, (x, index))
        poison(machine)
        same(errors, f"take_rows of {chosen}", ops.take_rows(*here, spare), reference.take_rows(x, index, spare), seed)
    return errors


def check_plan(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    random = seeded(seed)
    saves, never, wide = [4, 4, 32, 32, 0], [4, 4, 32, 32, 60], [64, 64, 8, 8, 0]
    gains: list[tuple[list[int], list[int]]] = [([], []), (saves, never), (wide, [])]
    for rows in (None, 1, 3):
        for text in (False, True):
            for number, (vision_gain, text_gain) in enumerate(gains):
                seen, real = (
                    None if rows is None else torch.rand((rows, 70), generator=random) < share for share in (0.6, 0.8)
                )
                arguments = (seen, real, torch.empty((3, 2, 70, 4), dtype=dtype), text, vision_gain, text_gain)
                here = on(machine, arguments)
                poison(machine)
                for actual, expected in zip(ops.plan(*here), reference.plan(*arguments), strict=True):
                    same(errors, f"plan of {rows} rows, text {text}, gains {number}", actual, expected, seed)
    return errors


def check_compress(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    random = seeded(seed)
    sizes = ((2, 4, 60, 16, 40, 9), (1, 8, 300, 64, 300, 33), (2, 8, 577, 128, 576, 64), (3, 2, 30, 8, 0, 4))
    for batch, heads, tokens, dim, chosen, rank in sizes[:2] if machine.dry else sizes:
        x = _decaying((batch, heads, tokens, dim), random).to(dtype)
        # Each token once, and some filler; tokens that are not chosen must not matter.
        index = torch.stack([torch.randperm(tokens, generator=random)[:chosen] for _ in range(batch)])
        index[:, chosen - chosen // 8 :] = -1
        for sample in range(batch):
            x[sample, :, sorted(set(range(tokens)) - set(index[sample].tolist()))] = torch.nan
        here = on(machine, (x, index))
        poison(machine)
        coefficient, basis = (factor.cpu() for factor in ops.compress(*here, rank))
        a = reference.take_rows(x.double(), index, 0).transpose(0, 1).flatten(2)
        best = _product(*reference.compress(x, index, rank)) - a
        what = f"compress {(batch, heads, tokens, dim)} to rank {rank}"
        _factors(errors, what, coefficient, basis, a, float(_NEAR_BEST * best.norm()), seed)
        same(errors, f"{what}, filler", coefficient[index < 0], torch.zeros_like(coefficient[index < 0]), seed)
    return errors


def check_compress_shared(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    random = seeded(seed)
    sizes = ((3, 4, 60, 16, 40, 9), (2, 8, 577, 128, 576, 64))
    for batch, heads, tokens, dim, chosen, rank in sizes[:1] if machine.dry else sizes:
        x = _decaying((batch, heads, tokens, dim), random).to(dtype)
        index = torch.stack([torch.randperm(tokens, generator=random)[:chosen] for _ in range(batch)])
        a = reference.take_rows(x.double(), index, 0).transpose(0, 1).flatten(2)
        given = reference.compress(x[:1], index[:1], rank)[1].to(dtype)
        for tolerance, common in ((2.0, None), (0.0, None), (2.0, given)):
            here = on(machine, (x, index))
            poison(machine)
            known = None if common is None else common.to(machine.device)
            coefficient, bases, owner = (part.cpu() for part in ops.compress_shared(*here, rank, tolerance, known))
            every = bases if common is None else torch.cat([common, bases])
            expected, *rest = reference.compress_shared(x, index, rank, tolerance, common)
            bound = _NEAR_BEST * (_product(expected, _chosen(*rest, common)) - a).norm()
            what = f"compress_shared {(batch, heads, tokens, dim)} to rank {rank}, tolerance {tolerance}"
            left = float((_product(coefficient.double(), every[owner].double()) - a).norm())
            judge(errors, what, max(0.0, left - float(bound)) / float(a.norm()), TOLERANCE[dtype], seed)
    return errors


def _chosen(bases: Tensor, owner: Tensor, common: Tensor | None) -> Tensor:
    """Every sample's basis."""
    return (bases if common is None else torch.cat([common.double(), bases]))[owner]


def check_sketch(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    random = seeded(seed)
    sizes = ((2, 4, 60, 16, 40, 9), (1, 8, 300, 64, 300, 33), (2, 8, 577, 128, 576, 64))
    for batch, heads, tokens, dim, chosen, rank in sizes[:2] if machine.dry else sizes:
        x = [_decaying((batch, heads, tokens, dim), random).to(dtype) for _ in range(3)]
        index = torch.stack([torch.randperm(tokens, generator=random)[:chosen] for _ in range(batch)])
        here = on(machine, (x, index))
        poison(machine)
        coefficient, spanned = (part.cpu() for part in ops.sketch(*here, rank))
        for number, item in enumerate(x):
            a = reference.take_rows(item.double(), index, 0).transpose(0, 1).flatten(2)
            q = spanned[number].double().flatten(1, 2)
            what = f"sketch of {(batch, heads, tokens, dim)} for rank {rank}, tensor {number}"
            projected = relative_error(coefficient[number], a @ q)
            judge(errors, f"{what}, projection", projected, _storage(dtype), seed)
            missed = float((a - a @ q @ torch.linalg.pinv(q)).norm())
            best = _NEAR_BEST * float((_product(*reference.compress(item, index, rank)) - a).norm())
            judge(errors, what, max(0.0, missed - best) / float(a.norm()), _storage(dtype), seed)
    return errors


def check_align(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    random = seeded(seed)
    # Sketches of several widths, which share an eigenproblem or not; two tensors in each.
    sizes = ((2, 4, 60, 16, 24), (2, 4, 60, 16, 17), (2, 8, 577, 128, 96))
    coefficients, bases, ranks = [], [], []
    for batch, heads, tokens, dim, size in sizes[:2] if machine.dry else sizes:
        weights = torch.arange(1, size + 1) ** -0.7
        coefficients.append(torch.randn((2, batch, tokens, size), generator=random) * weights)
        flat = torch.linalg.qr(torch.randn((2, batch, heads * dim, size), generator=random)).Q
        bases.append(flat.unflatten(2, (heads, dim)).to(dtype))
        ranks += [size // 2, size]
    here = on(machine, (coefficients, bases))
    poison(machine)
    factors = [factor.cpu() for factor in ops.align(*here, ranks)]
    expected = reference.align(coefficients, bases, ranks)
    for number in range(0, len(factors), 2):
        c, q = coefficients[number // 4][number // 2 % 2], bases[number // 4][number // 2 % 2]
        a = c.double() @ torch.linalg.pinv(q.double().flatten(1, 2))
        best = float((_product(expected[number], expected[number + 1]) - a).norm())
        what = f"align {tuple(q.shape)} to rank {ranks[number // 2]}"
        _factors(errors, what, factors[number], factors[number + 1], a, best, seed)
    return errors


def check_fold(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    random = seeded(seed)
    sizes = (
        (2, 2, 50, 16, 12, 20, 12),
        (1, 8, 300, 64, 33, 16, 33),
        (2, 8, 577, 128, 64, 64, 64),
        (1, 4, 0, 16, 0, 30, 8),
    )
    for batch, heads, tokens, dim, old, added, rank in sizes[:2] if machine.dry else sizes:
        coefficient = torch.randn((batch, tokens, old), generator=random).to(dtype)
        flat = torch.linalg.qr(torch.randn((batch, heads * dim, old), generator=random)).Q.mT
        basis = flat.unflatten(-1, (heads, dim)).transpose(1, 2).to(dtype).contiguous()
        rows = torch.randn((added, batch, heads, dim), generator=random).to(dtype)
        here = on(machine, (coefficient, basis, rows))
        poison(machine)
        new_coefficient, new_basis, dropped = (part.cpu() for part in ops.fold(*here, rank))
        expected = reference.fold(coefficient, basis, rows, rank)
        stacked = torch.cat([_product(coefficient, basis), rows.double().transpose(0, 1).flatten(2)], 1)
        what = f"fold of {added} rows into {(batch, heads, tokens, dim)}"
        best = float((_product(*expected[:2]) - stacked).norm())
        _factors(errors, what, new_coefficient, new_basis, stacked, best, seed)
        difference = float((dropped - expected[2]).abs().max() / stacked.norm())
        judge(errors, f"{what}, dropped", difference, _storage(dtype), seed)
    return errors


def _decaying(shape: tuple[int, int, int, int], random: torch.Generator) -> Tensor:
    """Random `[B, H, T, D]` whose `[T, H * D]` matrices have singular values that fall as slowly as k^-0.6."""
    batch, heads, tokens, dim = shape
    columns = min(tokens, heads * dim)
    weights = torch.arange(1, columns + 1) ** -0.6
    left = torch.randn((batch, tokens, columns), generator=random) * weights
    right = torch.randn((batch, columns, heads * dim), generator=random)
    return (left @ right).unflatten(-1, (heads, dim)).transpose(1, 2).contiguous()


def _product(coefficient: Tensor, basis: Tensor) -> Tensor:
    """`[B, N, H * D]` in float64."""
    return coefficient.double() @ basis.double().transpose(1, 2).flatten(2)


def _storage(dtype: torch.dtype) -> float:
    """What rounding two factors may add to the relative error of their product."""
    return max(TOLERANCE[torch.float32], 1.03 * torch.finfo(dtype).eps)


def _factors(
    errors: dict[str, float], what: str, coefficient: Tensor, basis: Tensor, a: Tensor, best: float, seed: int
) -> None:
    """Factors are unique up to signs and rotations: their product is compared, and that the basis is orthonormal."""
    dtype, size = coefficient.dtype, float(a.norm())
    if a.numel():
        distance = float((_product(coefficient, basis) - a).norm())
        judge(errors, what, max(0.0, distance - best) / size, _storage(dtype), seed)
        flat = basis.double().transpose(1, 2).flatten(2)
        identity = torch.eye(flat.shape[1], dtype=torch.float64)
        judge(errors, f"{what}, basis", float((flat @ flat.mT - identity).abs().max()), 10 * _storage(dtype), seed)
    elif coefficient.numel():
        raise WrongResultError(f"{what}: coefficients for no tokens")


def check_linear(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    random = seeded(seed)
    for rows, inner, outer, bias in ((1, 64, 33, True), (3, 128, 256, False), (8, 4096, 512, True), (1, 1, 1, False)):
        # Results of unit scale, as behind a normalisation.
        x = torch.randn((2, rows, inner), generator=random).to(dtype)
        weight = (torch.randn((outer, inner), generator=random) / inner**0.5).to(dtype)
        offset = torch.randn((outer,), generator=random).to(dtype) if bias else None
        here = on(machine, (x, weight, offset))
        poison(machine)
        error = relative_error(ops.linear(*here).cpu(), reference.linear(x, weight, offset))
        judge(errors, f"linear {rows} x {inner} x {outer}", error, TOLERANCE[dtype], seed)
    return errors


def check_no_gradient(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    """It has no result: it says that there is none."""
    grad = torch.randn((2, 3), generator=seeded(seed)).to(machine.device, dtype)
    try:
        torch.ops.attnpack.no_gradient(grad, [2, 3])
    except RuntimeError as error:
        if "not differentiable" in str(error):
            return {"no_gradient": 0.0}
        raise
    raise WrongResultError("no_gradient returned instead of raising RuntimeError")


def check_observe(machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    errors: dict[str, float] = {}
    for which, real, given in prompts(machine, dtype, seed):
        query = given[0]
        query.masked_fill_(~real[:, None, -query.shape[2] :, None], torch.nan)
        weights, sight = reference.observed(*given, real)
        odds = weights * sight[..., None]
        here, here_real = on(machine, (given, real))
        for window in (0, 30):
            what = f"observe {which}, window {window}"
            for statistic in ("sum", "last"):
                poison(machine)
                out = ops.observe(*here, statistic, window, here_real).cpu()
                error = relative_error(out, reference.observe(*given, statistic, window, real))
                judge(errors, f"{what}, {statistic}", error, TOLERANCE[torch.float32], seed)
            poison(machine)
            counts = ops.observe(*here, "pivotal", window, here_real).cpu()
            # Weights of 1 / t within rounding may count or not; queries that do not count stand first.
            least, most = ((odds[:, :, -window:] >= 1 + margin).sum(2) for margin in (1e-4, -1e-4))
            outside = ((counts < least) | (counts > most)).sum()
            judge(errors, f"{what}, pivotal", float(outside), 0.0, seed)
    return errors


def _pruning(dtype: torch.dtype, seed: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of the operators that leave out tokens, by name: two prompts of 60 tokens, the second padded."""
    random = seeded(seed)
    tokens = 60
    query, key, hidden = (
        torch.randn(shape, generator=random).to(dtype)
        for shape in ((2, 4, tokens, 16), (2, 2, tokens, 16), (2, tokens, 32))
    )
    real = torch.arange(tokens) >= torch.tensor([0, 7])[:, None]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & real[:, None, None]
    vision = torch.rand((2, tokens), generator=random) < 0.7
    scores, raw = torch.rand((2, 2, tokens), generator=random)
    rows = ops_prune.kept_rows(scores, vision, mask, 0.4)
    pooled, group = ops_prune.pooled_rows(vision, mask, 3)
    return {
        "bidirectional_scores": (query, key, vision, mask, 0.25, 1.0),
        "gather_mask": (mask, rows),
        "gather_tokens": (query, rows, 2),
        "kept_rows": (scores, vision, mask, 0.4),
        "last_row_scores": (query, key, mask, 0.25),
        "merge_tokens": (hidden, pooled, group, scores),
        "merged_rows": (hidden, scores, raw, vision, mask, 20, 0.3),
        "pooled_rows": (vision, mask, 3),
        "random_scores": (scores, 5),
        "scatter_tokens": (hidden, rows, ops_prune.gather_tokens(hidden, rows, 1)),
    }


def check_pruning(name: str, machine: Machine, dtype: torch.dtype, seed: int) -> dict[str, float]:
    """One of them on the device, against itself on a CPU, which `tests/kernels/test_prune.py` holds to float64."""
    errors: dict[str, float] = {}
    for number in range(3):
        arguments = _pruning(dtype, seed + number)[name]
        expected = getattr(ops_prune, name)(*arguments)
        here = on(machine, arguments)
        poison(machine)
        actual = getattr(ops_prune, name)(*here)
        pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
        for item, (one, other) in enumerate(pairs):
            what = f"{name}, result {item} of prompt {number}"
            if other.is_floating_point() and one.shape == other.shape:
                judge(errors, what, relative_error(one.cpu(), other.double()), TOLERANCE[dtype], seed + number)
            else:
                same(errors, what, one, other, seed + number)
    return errors


CHECKS: Mapping[str, Check] = {
    "align": check_align,
    "append_": check_append_,
    "attention": check_attention,
    "attention_each": check_attention_each,
    "attention_weights": check_attention_weights,
    "compress": check_compress,
    "compress_shared": check_compress_shared,
    "decompress": check_decompress,
    "fold": check_fold,
    "linear": check_linear,
    "no_gradient": check_no_gradient,
    "observe": check_observe,
    "observe_newest": check_observe_newest,
    "plan": check_plan,
    "sketch": check_sketch,
    "take_rows": check_take_rows,
    **{name: partial(check_pruning, name) for name in _pruning(torch.float32, 0)},
}


def short(dtype: torch.dtype) -> str:
    """Its name without the module's."""
    return str(dtype).removeprefix("torch.")


def table(results: Mapping[str, Result]) -> list[str]:
    rows = [
        (name, f"{case['inputs']}", f"{case['worst']:.1e}", f"{case['limit']:.1e}")
        for name, case in measured(results).items()
    ]
    return [*markdown(("operator", "inputs", "worst error", "tolerance"), rows), "", *left_out(results)]


PART = Part(
    "correctness",
    "Correctness",
    "Every operator of `torch.ops.attnpack` on the device, on fresh random inputs, against the float64 reference on a "
    "CPU from the same rounded numbers; freed device memory and spare cache rows hold NaN. Errors are relative, over "
    "all of a result; those of moved rows and indices must be 0. An operator without a check fails.",
    cases,
    table,
)
