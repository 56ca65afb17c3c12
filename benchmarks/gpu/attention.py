"""One layer's attention of one decode step: packed, dense in every way that runs, and decompressed first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from attnpack_fx.step_cost import attention_arguments
from benchmarks.gpu import contenders, layers
from benchmarks.gpu.layers import MODELS, TOKENS, Layout, PackedLayer
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.part import Failure, Part, Result, Run, WrongResultError, attempt, left_out, markdown, measured
from benchmarks.gpu.timing import Contender, compare
from benchmarks.gpu.unrotated_layers import UnrotatedLayer, unrotated
from tests.kernels.inputs import TOLERANCE, relative_error

LAYOUTS = (*MODELS.values(), Layout("MHA-40x128", 40, 40, 128))
BATCHES, RANKS = (1, 8, 64), (16, 64, 128)
#: The rank whose values, and whose keys' first half or all, are also attended to with keys before rotary embedding.
UNROTATED = 64
DTYPE = torch.bfloat16
#: Of the memory that is free, how much one contender's inputs may take.
_SHARE = 0.6
#: Input sets take turns until together they are so many times the cache; more sets than `_MOST_SETS` are not made.
_CACHES, _MOST_SETS = 4, 1024

#: Targets: speed over the dense cache as a part of the byte ratio for long caches, and for the shortest at batch 1.
LONG_TOKENS, LONG_SHARE, SHORT_RATIO = 2048, 0.8, 1.0


@dataclass(frozen=True)
class Case:
    layout: Layout
    batch: int
    tokens: int
    ranks: tuple[int, ...] = RANKS
    unrotated: int = UNROTATED

    @property
    def name(self) -> str:
        return f"{self.layout.name} B={self.batch} T={self.tokens}"


def cases(run: Run) -> Mapping[str, Callable[[], Result]]:
    """A case is a dense cache; all ranks are measured with it, in turn with the same dense contenders."""
    if run.machine.dry:
        grouped, plain = Layout("GQA-4/2x16", 4, 2, 16, axes=3), Layout("MHA-2x16", 2, 2, 16)
        grid = [Case(grouped, 2, 96, (4, 8), 8), Case(plain, 1, 48, (4,), 4)]
    else:
        grid = [Case(layout, batch, tokens) for tokens, batch, layout in product(TOKENS, BATCHES, LAYOUTS)]
    return {case.name: partial(measure_case, run, case) for case in grid}


@torch.no_grad()
def measure_case(run: Run, case: Case) -> Result:
    """Time all contenders on one shape. Raises WrongResultError when ours is not close to float64."""
    machine = run.machine
    # Compiled contenders of earlier shapes go.
    torch._dynamo.reset()
    random = torch.Generator(machine.device).manual_seed(0)
    whole = layers.dense_bytes(case.layout, case.batch, case.tokens, DTYPE)
    packed = {rank: _packed_sets(machine, case, rank, random) for rank in case.ranks}
    held = {rank: sets for rank, sets in packed.items() if not isinstance(sets, Failure)}
    too_large = {str(rank): sets.reason for rank, sets in packed.items() if isinstance(sets, Failure)}
    if not held:
        return {"skipped": "; ".join(f"rank {rank}: {reason}" for rank, reason in too_large.items())}
    errors: dict[Any, float] = {rank: _error(case, sets[0]) for rank, sets in held.items()}
    before = {
        f"un-rotated {rank}": [unrotated(layer, case.layout, rank) for layer in held.get(case.unrotated, [])]
        for rank in (case.unrotated // 2, case.unrotated)
        if case.unrotated in held
    }
    errors |= {name: _error(case, sets[0]) for name, sets in before.items()}

    # Of the highest rank's contents: the time depends on no contents, the check on them.
    dense = dense_sets(machine, case, held[max(held)], whole)
    peers = contenders.dense(dense, case.layout, machine.dry) if not isinstance(dense, Failure) else dense
    turns = {f"packed {rank}": _packed(sets) for rank, sets in held.items()}
    turns |= {name: _packed(sets) for name, sets in before.items()}
    failed: dict[str, Failure] = {}
    if isinstance(peers, Failure):
        failed["dense"] = peers
    else:
        running, left, differences = checked_peers(case, peers, held[max(held)][0])
        turns |= running
        failed |= left
        errors |= differences
    room = machine.free_bytes()
    if whole > _SHARE * room:
        failed["decompressed"] = does_not_fit("rebuilt keys and values", whole, room)
    else:
        # What they write and read again is as large as a dense cache, so that few sets exceed the cache.
        few = {rank: sets[: input_sets(machine, whole)] for rank, sets in held.items()}
        rebuilding = contenders.decompressed(few, case.tokens)
        turns |= {f"decompressed {rank}": contender for rank, contender in rebuilding.items()}
    times = compare(machine.clock, turns)
    return {
        "layout": case.layout.name,
        "batch": case.batch,
        "tokens": case.tokens,
        "dense_bytes": whole,
        "dense": _dense_rows(times, errors, peers, whole, run.ceilings["copy"]),
        "does_not_run": {name: failure.reason for name, failure in failed.items()},
        "ranks": {
            str(rank): _rank_row(times, f"packed {rank}", sets, errors[rank], peers, whole, run)
            | _over_decompressed(times, rank)
            for rank, sets in held.items()
        },
        "unrotated": {
            name.removeprefix("un-rotated "): _rank_row(times, name, sets, errors[name], peers, whole, run)
            for name, sets in before.items()
        },
        "ranks_skipped": too_large,
    }


def checked_peers(
    case: Case, peers: Mapping[str, Contender], layer: PackedLayer
) -> tuple[dict[str, Contender], dict[str, Failure], dict[str, float]]:
    """The dense contenders that run and are right on this layer's contents, why others are not, and all errors."""
    rows, running, failed, errors = checked_rows(case), {}, {}, {}
    expected = layer.expected(rows)
    for name, contender in peers.items():
        outcome = attempt(partial(_first, contender))
        if isinstance(outcome, Failure):
            failed[name] = outcome
            continue
        errors[name] = difference(outcome, expected, rows)
        if errors[name] <= TOLERANCE[DTYPE]:
            running[name] = contender
        else:
            failed[name] = Failure(f"differs from float64 by {errors[name]:.1e}")
    return running, failed, errors


def _first(contender: Contender) -> Any:
    with contender.context():
        return contender.calls[0]()


def _packed(sets: Sequence[PackedLayer | UnrotatedLayer]) -> Contender:
    arguments = [attention_arguments(one.query, *one.parts) for one in sets]
    return Contender([partial(torch.ops.attnpack.attention, *each) for each in arguments])


def _packed_sets(machine: Machine, case: Case, rank: int, random: torch.Generator) -> list[PackedLayer] | Failure:
    size = layers.packed_bytes(case.layout, case.batch, case.tokens, rank, DTYPE)
    room = machine.free_bytes()
    if size > _SHARE * room:
        return does_not_fit("packed cache", size, room)
    count = input_sets(machine, size)
    return [layers.packed_layer(case.layout, case.batch, case.tokens, rank, DTYPE, random) for _ in range(count)]


def dense_sets(
    machine: Machine, case: Case, sets: list[PackedLayer], size: int
) -> list[contenders.DenseLayer] | Failure:
    room = machine.free_bytes()
    if size > _SHARE * room:
        return does_not_fit("dense cache", size, room)
    count = min(len(sets), input_sets(machine, size))
    shape = case.batch, case.layout.kv_heads, case.tokens, case.layout.head_dim
    dense = []
    for one in sets[:count]:
        keys, values = (torch.empty(shape, dtype=DTYPE, device=machine.device) for _ in range(2))
        one.fill_dense(keys, values)
        dense.append(contenders.DenseLayer(one.query, keys, values))
    return dense


def input_sets(machine: Machine, size: int) -> int:
    """How many input sets of `size` bytes take turns."""
    return min(_MOST_SETS, max(1, -(-_CACHES * machine.cache_bytes // size)))


def does_not_fit(what: str, size: int, room: int) -> Failure:
    return Failure(f"{what} of {size / 1e9:.1f} GB is more than {_SHARE:.0%} of the {room / 1e9:.1f} GB that are free")


def checked_rows(case: Case) -> list[tuple[int, int]]:
    """Samples and query heads whose results are compared with float64: the first, the last, and between."""
    heads = sorted({0, case.layout.heads // 3, 2 * case.layout.heads // 3, case.layout.heads - 1})
    return [(sample, head) for sample in sorted({0, case.batch - 1}) for head in heads]


def _error(case: Case, layer: PackedLayer | UnrotatedLayer) -> float:
    out = torch.ops.attnpack.attention(*attention_arguments(layer.query, *layer.parts))
    rows = checked_rows(case)
    error = difference(out, layer.expected(rows), rows)
    if not error <= TOLERANCE[DTYPE]:
        raise WrongResultError(
            f"packed attention differs from float64 by {error:.1e}, expected at most {TOLERANCE[DTYPE]}"
        )
    return error


def difference(out: torch.Tensor, expected: torch.Tensor, rows: list[tuple[int, int]]) -> float:
    samples, heads = zip(*rows, strict=True)
    return relative_error(out[list(samples), list(heads), 0], expected)


def _dense_rows(
    times: Mapping[str, Result], errors: Mapping[Any, float], peers: Any, size: int, copy: float
) -> dict[str, Result]:
    if isinstance(peers, Failure):
        return {}
    return {
        name: {**times[name], "error": errors[name], "of_copy": size / times[name]["seconds"] / copy}
        for name in peers
        if name in times
    }


def _rank_row(
    times: Mapping[str, Result],
    name: str,
    sets: Sequence[PackedLayer | UnrotatedLayer],
    error: float,
    peers: Any,
    whole: int,
    run: Run,
) -> Result:
    ours = times[name]
    size = sets[0].nbytes
    row: Result = {
        "bytes": size,
        "byte_ratio": whole / size,
        "packed": ours,
        "error": error,
        "of_copy": size / ours["seconds"] / run.ceilings["copy"],
        "cold": len(sets) * size >= _CACHES * run.machine.cache_bytes,
    }
    running = [name for name in peers if name in times] if not isinstance(peers, Failure) else []
    if running:
        best = min(running, key=lambda name: times[name]["seconds"])
        ratio = times[best]["seconds"] / ours["seconds"]
        row |= {"best_dense": best, "ratio": ratio, "ratio_over_byte_ratio": ratio / row["byte_ratio"]}
    return row


def _over_decompressed(times: Mapping[str, Result], rank: int) -> Result:
    rebuilt = times.get(f"decompressed {rank}")
    if rebuilt is None:
        return {}
    return {"decompressed": rebuilt, "ratio_over_decompressed": rebuilt["seconds"] / times[f"packed {rank}"]["seconds"]}


def table(cases: Mapping[str, Result]) -> list[str]:
    header = ("shape", "rank", "packed", "best dense", "which", "decompressed", "ratio", "bytes", "ratio/bytes", "copy")
    rows = []
    for name, case in measured(cases).items():
        before = {f"{rank} un-rotated": row for rank, row in case["unrotated"].items()}
        for rank, row in {**case["ranks"], **before}.items():
            best = row.get("best_dense")
            rows.append(
                (
                    name,
                    rank,
                    microseconds(row["packed"]),
                    microseconds(case["dense"][best]) if best else "-",
                    best or "-",
                    microseconds(row["decompressed"]) if "decompressed" in row else "-",
                    f"{row['ratio']:.2f}x" if best else "-",
                    f"1/{row['byte_ratio']:.1f}",
                    f"{row['ratio_over_byte_ratio']:.2f}" if best else "-",
                    f"{row['of_copy']:.0%}" + ("" if row["cold"] else " (cached)"),
                )
            )
    absent: dict[str, list[str]] = {}
    for name, case in measured(cases).items():
        ranks = {f"packed {rank}": reason for rank, reason in case["ranks_skipped"].items()}
        for contender, reason in {**case["does_not_run"], **ranks}.items():
            absent.setdefault(f"{contender}: {reason}", []).append(name)
    lines = [f"- {reason} ({', '.join(names)})" for reason, names in absent.items()]
    notes = ["", "Without a time:", "", *lines] if lines else []
    return [*markdown(header, rows), *notes, "", *left_out(cases)]


def microseconds(times: Result) -> str:
    return f"{times['seconds'] * 1e6:.1f} us" + ("" if "graph" in times else " (eager)")


def verdict(cases: Mapping[str, Result]) -> list[str]:
    rows = [
        (f"{name} R={rank}", case, row)
        for name, case in measured(cases).items()
        for rank, row in case["ranks"].items()
        if "ratio" in row
    ]
    if not rows:
        return []
    worst = sorted(rows, key=lambda item: item[2]["ratio"])[:3]
    lines = ["Worst ratios: " + "; ".join(f"{name}: {row['ratio']:.2f}x" for name, _, row in worst) + "."]
    long = [(name, row) for name, case, row in rows if case["tokens"] >= LONG_TOKENS]
    if long:
        held = sum(row["ratio_over_byte_ratio"] >= LONG_SHARE for _, row in long)
        name, row = min(long, key=lambda item: item[1]["ratio_over_byte_ratio"])
        lines.append(
            f"At least {LONG_SHARE} x the byte ratio for T >= {LONG_TOKENS}: {_holds(held == len(long))} "
            f"({held} of {len(long)}; the worst is {row['ratio_over_byte_ratio']:.2f} at {name})."
        )
    short = [(name, row) for name, case, row in rows if case["batch"] == 1 and case["tokens"] == TOKENS[0]]
    if short:
        name, row = min(short, key=lambda item: item[1]["ratio"])
        lines.append(
            f"Never below {SHORT_RATIO:.1f} at batch 1, T = {TOKENS[0]}: {_holds(row['ratio'] >= SHORT_RATIO)} "
            f"(the worst is {row['ratio']:.2f} at {name})."
        )
    return lines


def _holds(held: bool) -> str:
    return "holds" if held else "does not hold"


PART = Part(
    "attention",
    "Attention of one layer",
    "One token's attention in bf16, on a cache of T tokens, the last few of them dense rows. Dense contenders: "
    "`scaled_dot_product_attention` with each backend that runs, and FlexAttention compiled; with grouped heads the "
    "queries of a group are given as queries of their KV head, which every backend runs without copying keys. "
    "*decompressed* rebuilds keys and values by matrix products, then attends, as AttentionPack does; *un-rotated* "
    "keys are stored before rotary embedding, at that rank beside values of rank 64, and rotated in it. Times are "
    "medians of CUDA graph replays over inputs that together exceed the cache, contenders in turn; *bytes* is what the "
    "packed cache takes of the dense one, *ratio/bytes* the speed-up as a part of what its bytes promise, *copy* the "
    "bytes read per second as a part of the copy bandwidth. Errors are held against float64.",
    cases,
    table,
    verdict,
)
