"""One layer's attention of one decode step over codes: factors and rows in few bits against the dense cache."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from attnpack_fx.step_cost import attention_arguments
from benchmarks.gpu import attention, contenders, layers
from benchmarks.gpu.attention import DTYPE, Case
from benchmarks.gpu.coded_layers import CodedLayer, coded_factors, coded_rows, row_bytes
from benchmarks.gpu.layers import MODELS, SHAPES, Layout, PackedLayer
from benchmarks.gpu.part import Failure, Part, Result, Run, WrongResultError, left_out, markdown, measured
from benchmarks.gpu.timing import Contender, compare
from tests.kernels.inputs import TOLERANCE

RANK = 64
#: Beside those of all models: batches of 16.
_MORE = [(MODELS[name], 16, tokens) for tokens in (2048, 9216, 32768) for name in ("LLaVA-1.5-7B", "Qwen3-VL-8B")]
#: Bits of factors, and of rows.
FACTORS, ROWS = (8, 4), (4, 2)

Layer = PackedLayer | CodedLayer


def cases(run: Run) -> Mapping[str, Callable[[], Result]]:
    if run.machine.dry:
        grid = [Case(Layout("GQA-4/2x32", 4, 2, 32), 2, 96, (8,)), Case(Layout("MHA-2x32", 2, 2, 32), 1, 48, (4,))]
    else:
        grid = [Case(*shape, (RANK,)) for shape in [*SHAPES, *_MORE]]
    return {case.name: partial(measure_case, run, case) for case in grid}


@torch.no_grad()
def measure_case(run: Run, case: Case) -> Result:
    """Time all ways to store one cache. Raises WrongResultError when one is not close to float64."""
    machine = run.machine
    torch._dynamo.reset()
    random = torch.Generator(machine.device).manual_seed(0)
    whole = layers.dense_bytes(case.layout, case.batch, case.tokens, DTYPE)
    (rank,) = case.ranks
    room = machine.free_bytes()
    if whole > room / 2:
        return {"skipped": attention.does_not_fit("dense cache", whole, room).reason}
    stored = _stored(run, case, rank, random)
    errors = {name: _error(case, name, sets[0]) for name, sets in stored.items()}
    plain = [layer for layer in stored["factors"] if isinstance(layer, PackedLayer)]
    dense = attention.dense_sets(machine, case, plain, whole)
    peers: Mapping[str, Contender] = {}
    failed: dict[str, Failure] = {}
    if isinstance(dense, Failure):
        failed["dense"] = dense
    else:
        everybody = contenders.dense(dense, case.layout, machine.dry)
        peers, failed, _ = attention.checked_peers(case, everybody, plain[0])
    times = compare(machine.clock, {name: _contender(sets) for name, sets in stored.items()} | dict(peers))
    best = min(peers, key=lambda name: times[name]["seconds"], default=None)
    return {
        "layout": case.layout.name,
        "batch": case.batch,
        "tokens": case.tokens,
        "rank": rank,
        "dense_bytes": whole,
        "dense": {name: times[name] for name in peers},
        "best_dense": best,
        "does_not_run": {name: failure.reason for name, failure in failed.items()},
        "stored": {
            name: {
                **times[name],
                "bytes": sets[0].nbytes,
                "error": errors[name],
                "byte_ratio": whole / sets[0].nbytes,
                "ratio": times[best]["seconds"] / times[name]["seconds"] if best else None,
                "of_copy": sets[0].nbytes / times[name]["seconds"] / run.ceilings["copy"],
            }
            for name, sets in stored.items()
        },
    }


def _stored(run: Run, case: Case, rank: int, random: torch.Generator) -> dict[str, list[Layer]]:
    """Input sets of every way to store the cache; those of factors hold the same."""
    size = layers.packed_bytes(case.layout, case.batch, case.tokens, rank, DTYPE)
    shape = case.layout, case.batch, case.tokens
    plain = [layers.packed_layer(*shape, rank, DTYPE, random) for _ in range(attention.input_sets(run.machine, size))]
    stored: dict[str, list[Layer]] = {"factors": list(plain)}
    for bits in FACTORS:
        stored[f"factors, {bits} bits"] = [coded_factors(layer, bits) for layer in plain]
    for bits in ROWS:
        count = attention.input_sets(run.machine, row_bytes(*shape, bits, DTYPE))
        stored[f"rows, {bits} bits"] = [coded_rows(*shape, bits, DTYPE, random) for _ in range(count)]
    return stored


def _contender(sets: list[Layer]) -> Contender:
    return Contender(
        [partial(torch.ops.attnpack.attention, *attention_arguments(each.query, *each.parts)) for each in sets]
    )


def _error(case: Case, name: str, layer: Layer) -> float:
    rows = attention.checked_rows(case)
    out = torch.ops.attnpack.attention(*attention_arguments(layer.query, *layer.parts))
    error = attention.difference(out, layer.expected(rows), rows)
    if not error <= TOLERANCE[DTYPE]:
        raise WrongResultError(f"{name}: differs from float64 by {error:.1e}, expected at most {TOLERANCE[DTYPE]}")
    return error


def table(cases: Mapping[str, Result]) -> list[str]:
    header = ("shape", "stored as", "time", "best dense", "which", "ratio", "bytes", "copy", "error")
    rows = [
        (
            name,
            how,
            attention.microseconds(row),
            attention.microseconds(case["dense"][case["best_dense"]]) if case["best_dense"] else "-",
            case["best_dense"] or "-",
            f"{row['ratio']:.2f}x" if row["ratio"] else "-",
            f"1/{row['byte_ratio']:.1f}",
            f"{row['of_copy']:.0%}",
            f"{row['error']:.1e}",
        )
        for name, case in measured(cases).items()
        for how, row in case["stored"].items()
    ]
    return [*markdown(header, rows), "", *left_out(cases)]


PART = Part(
    "codes",
    "Attention over codes",
    "As above, with the cache in few bits: *factors* of rank 64 with coefficients and bases as they are, and in codes "
    "with a scale per component; *rows* as KIVI stores them, keys with a scale and zero point per channel of 32 "
    "tokens, values per 32 channels of a token. Codes become numbers in registers: *bytes* is what is read. Where no "
    "results stand here, these kernels were run in Triton's interpreter and compiled for compute capabilities 8.0, 9.0 "
    "and 10.0 (`python -m benchmarks.ahead`), no more.",
    cases,
    table,
)
