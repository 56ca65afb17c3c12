"""Attention of one layer that reads fewer tokens: decode steps under H2O and A-VL, upkeep between the steps included.

    python -m benchmarks.selective                              # T = 2k, 8k, 16k; H = 32, 8; fp32, bf16; rows, factors
    python -m benchmarks.selective --tokens 2048 --dtype fp32 --out selective.json

One layer's cache is packed and a prompt's attention is made up; then a method acts as it does in a compiled model, by
`maintenance.maintain` after prefill and after every step. A run is `STEPS` decode steps: append the new token, attend,
maintain; contenders take turns and medians over runs are given, in seconds a step. H2O evicts once in `STEPS` steps;
A-VL with K = 3 reads all that stays in every third step and ranks it anew. Bytes read are those of rows in the tail,
coefficients and bases, an average over steps; what upkeep moves is in its time alone. Dense is
`scaled_dot_product_attention` on a cache with room, whose new token is written in place.

The first steps' results are compared with attention over the stored tokens alone, before anything is timed.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx import PackedTensor, PackPolicy
from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.kernels.parts import Block
from attnpack_fx.maintenance import maintain
from attnpack_fx.packing import fresh_layer
from attnpack_fx.passes.avl import AVL
from attnpack_fx.passes.eviction import Eviction
from attnpack_fx.passes.h2o import H2O
from attnpack_fx.passes.random_eviction import RandomEviction
from attnpack_fx.step_cost import attention_arguments
from benchmarks import measure

STEPS = 16
#: Text tokens behind the image.
TEXT = 128
RANK = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHODS: dict[str, Eviction] = {
    **{f"H2O {budget}": H2O(budget) for budget in (0.5, 0.2)},
    **{
        f"A-VL core {core}, {f'K = {every}' if every else 'never'}": AVL(core=core, every=every)
        for every in (3, None)
        for core in (0.5, 0.4, 0.2, 0.1)
    },
}


@dataclass(frozen=True)
class Case:
    """One attention shape. rank: of vision tokens, whose contents have half of it; None: rows as they are."""

    tokens: int
    kv_heads: int
    dtype: torch.dtype
    rank: int | None
    heads: int = 32
    head_dim: int = 128


class Step(NamedTuple):
    """Seconds, and bytes of what attention read."""

    append: float
    attention: float
    upkeep: float
    bytes: float


class Inputs:
    """What all contenders of a case have in common: the prompt's keys and values, and those of later tokens."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        shape = 1, case.kv_heads, case.tokens, case.head_dim, (case.rank or RANK) // 2
        self.key, self.value = (measure.low_rank(*shape, case.dtype, generator) for _ in range(2))
        later = STEPS, 2, 1, case.kv_heads, 1, case.head_dim
        self.new = torch.randn(later, generator=generator).to(case.dtype)
        self.queries = torch.randn((STEPS, 1, case.heads, 1, case.head_dim), generator=generator).to(case.dtype)
        # Of a head or of all, for both kinds of tokens; few tokens get most of it.
        self.observed = torch.rand((2, case.kv_heads, case.tokens), generator=generator) ** 8
        self.modality = (torch.arange(case.tokens) < case.tokens - TEXT)[None]

    def start(self, method: Eviction) -> tuple[CachedLayer, PackPolicy]:
        """The layer as prefill leaves it."""
        case = self.case
        # A policy that asks for the same storage, and not for queries.
        like = RandomEviction(1.0, heads=method.heads)
        storage = PackPolicy(vision_rank=case.rank, key_space="rotated", passes=(like,))
        layer = fresh_layer(self.key, self.value, storage, modality=self.modality, real=None, layer=None)
        kinds = 2 if method.observes and method.observes.text else 1
        layer.observed = self.observed[:kinds] if layer.key.held.heads else self.observed[:kinds].mean(1, keepdim=True)
        policy = replace(storage, passes=(method,))
        maintain([layer], policy)
        return layer, policy


def steps(inputs: Inputs, start: CachedLayer, policy: PackPolicy, check: bool = False) -> Iterator[Step]:
    """Decode steps from a start, which stays as it is; check: raise RuntimeError where a result is wrong."""
    key, value = start.key, start.value
    for query, (new_key, new_value) in zip(inputs.queries, inputs.new, strict=True):
        began = time.perf_counter()
        key, value = key.append(new_key), value.append(new_value)
        appended = time.perf_counter()
        out, weights = _attended(query, key, value)
        attended = time.perf_counter()
        if check:
            _check(query, key, value, out, inputs.case)
        layer = CachedLayer(start.number, key, value, added=1, prefill=False, observed=weights)
        read = _read(key) + _read(value)
        resumed = time.perf_counter()
        maintain([layer], policy)
        done = time.perf_counter()
        key, value = layer.key, layer.value
        yield Step(appended - began, attended - appended, done - resumed, read)


def _attended(query: Tensor, key: PackedTensor, value: PackedTensor) -> tuple[Tensor, Tensor]:
    """As the compiled graph of a decode step does: attention, and how much it attends to every slot."""
    by_head = query if not key.held.heads else query.unflatten(1, (key.held.heads, -1)).flatten(0, 1)
    out, weights = torch.ops.attnpack.attention_weights(*attention_arguments(by_head, key.parts, value.parts))
    return out.reshape(query.shape), weights


def _check(query: Tensor, key: PackedTensor, value: PackedTensor, out: Tensor, case: Case) -> None:
    """Compare with attention over stored tokens alone."""
    positions = key.positions
    stored = torch.zeros((positions.shape[0], key.shape[2] + 1), dtype=torch.bool)
    stored.scatter_(1, positions % stored.shape[1], True)
    mask = stored[None, :, None, :-1] if key.held.heads else stored[:, None, None, :-1]
    mask = mask.repeat_interleave(case.heads // case.kv_heads, 1) if key.held.heads else mask
    grouped = case.heads != case.kv_heads
    expected = F.scaled_dot_product_attention(query, key.dense(), value.dense(), attn_mask=mask, enable_gqa=grouped)
    error = measure.difference(out, expected)
    if not error <= measure.TOLERANCE[case.dtype]:
        raise RuntimeError(f"{case}: attention over stored tokens differs by {error:.1e} of its scale")


def _read(packed: PackedTensor) -> int:
    blocks = [block for block in packed.parts.blocks if isinstance(block, Block)]
    factors = sum(block.coefficient.nbytes + block.basis.nbytes for block in blocks)
    return factors + packed.lease.buffer.rows[: packed.lease.length].nbytes


def _dense_steps(inputs: Inputs) -> Iterator[Step]:
    """Attention over all tokens; written in place, into room that `dense` made."""
    case = inputs.case
    key, value = (F.pad(each, (0, 0, 0, STEPS)) for each in (inputs.key, inputs.value))
    while True:
        for number, (query, new) in enumerate(zip(inputs.queries, inputs.new, strict=True)):
            end = case.tokens + number
            began = time.perf_counter()
            key[:, :, end : end + 1], value[:, :, end : end + 1] = new[0], new[1]
            appended = time.perf_counter()
            keys, values = key[:, :, : end + 1], value[:, :, : end + 1]
            F.scaled_dot_product_attention(query, keys, values, enable_gqa=case.heads != case.kv_heads)
            attended = time.perf_counter()
            yield Step(appended - began, attended - appended, 0.0, keys.nbytes + values.nbytes)


@torch.no_grad()
def run(case: Case, rounds: int) -> dict[str, Any]:
    """Time all contenders on one case; every number is of one step."""
    inputs = Inputs(case)
    starts = {name: inputs.start(method) for name, method in METHODS.items()}
    for start, policy in starts.values():
        for _ in itertools.islice(steps(inputs, start, policy, check=True), 4):  # K = 3 has read all, and ranked anew
            pass
    dense = _dense_steps(inputs)
    names, samples = ["dense", *METHODS], {name: [] for name in ["dense", *METHODS]}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = [next(dense) for _ in range(STEPS)] if name == "dense" else list(steps(inputs, *starts[name]))
            if number:  # the first warms up
                samples[name].append(Step(*(sum(each) / STEPS for each in zip(*taken, strict=True))))
    return {
        **asdict(case),
        "dtype": str(case.dtype).removeprefix("torch."),
        "steps": STEPS,
        "rounds": rounds,
        "contenders": _summaries(samples),
    }


def _summaries(samples: dict[str, list[Step]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in samples.items():
        whole = [step.append + step.attention + step.upkeep for step in each]
        found[name] = {
            "bytes_read": each[0].bytes,
            "seconds": {
                **{part: statistics.median(getattr(step, part) for step in each) for part in Step._fields[:3]},
                "step": statistics.median(whole),
            },
            "samples": whole,
        }
    for each in found.values():
        each["of_dense"] = {
            "bytes_read": each["bytes_read"] / found["dense"]["bytes_read"],
            "attention": each["seconds"]["attention"] / found["dense"]["seconds"]["attention"],
            "step": each["seconds"]["step"] / found["dense"]["seconds"]["step"],
        }
    return found


def table(result: dict[str, Any]) -> str:
    """One case as text: MB and milliseconds a step, and parts of dense."""
    head = ("MB read", "of dense", "attention", "of dense", "append", "upkeep", "step", "of dense")
    lines = [" " * 26 + "".join(name.rjust(11) for name in head)]
    for name, each in result["contenders"].items():
        seconds, part = each["seconds"], each["of_dense"]
        numbers = (
            f"{each['bytes_read'] / 1e6:.2f}",
            f"{part['bytes_read']:.3f}",
            f"{1e3 * seconds['attention']:.3f}",
            f"{part['attention']:.3f}",
            *(f"{1e3 * seconds[name]:.3f}" for name in ("append", "upkeep", "step")),
            f"{part['step']:.3f}",
        )
        lines.append(name.ljust(26) + "".join(number.rjust(11) for number in numbers))
    return "\n".join(lines)


def cases(tokens: Sequence[int], dtypes: Sequence[str]) -> list[Case]:
    """Multi-head and grouped-query shapes, on rows and on factors."""
    return [
        Case(count, kv_heads, DTYPES[dtype], rank)
        for dtype in dtypes
        for kv_heads in (32, 8)
        for rank in (None, RANK)
        for count in tokens
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192, 16384], metavar="T")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=5, help="runs of every contender (5)")
    parser.add_argument("--note", default="", help="about the machine, for the record")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every sample, and on what it was measured")
    given = parser.parse_args(arguments)
    measure.restart_with_malloc_settings()
    result: dict[str, Any] = {**measure.environment(), "note": given.note, "selective": []}
    for case in cases(given.tokens, given.dtype):
        measure.release_free_memory()
        found = run(case, given.rounds)
        result["selective"].append(found)
        print(f"T={case.tokens}, Hq={case.heads}, H={case.kv_heads}, {found['dtype']}, rank {case.rank}; ms a step")
        print(table(found), flush=True)
        if given.out:
            given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
