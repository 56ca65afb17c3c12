"""How fast one token is decoded, with the cache dense, quantized and packed.

    python benchmarks/decode.py                                    # both parts, shapes of LLaVA-1.5-7B
    python benchmarks/decode.py --part attention --batch 1 8 --tokens 1024 8192 --dtype fp32 bf16
    python benchmarks/decode.py --part end-to-end --batch 8 --tokens 4096 --json decode.json

attention: the attention operator of one layer. end-to-end: a decoder with random weights. Contenders take
turns; weights, tokens and cache contents are the same for all, and results are compared before any timing.
Times are medians, and in brackets the extremes, of all rounds; ratios are those of medians.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import attention_step, end_to_end, measure
from benchmarks.arguments import positive

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Flag and field of both kinds of case, and of the end-to-end case alone.
_SHAPE = ("heads", "kv_heads", "head_dim", "rank")
_DECODER = ("layers", "hidden", "mlp")
#: What --quick changes, unless given.
_QUICK = {
    "batch": [2],
    "tokens": [96],
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "rank": (8, 8),
    "hidden": 64,
    "mlp": 128,
    "steps": 2,
    "rounds": 2,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; shapes that are not given are None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("attention", "end-to-end", "all"), default="all")
    parser.add_argument("--batch", type=positive, nargs="+", help="one or more; with --tokens: every combination")
    parser.add_argument("--tokens", type=positive, nargs="+", help="tokens in the cache, one or more")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="of weights and cache, one or more")
    parser.add_argument("--heads", type=positive, help="query heads (32)")
    parser.add_argument("--kv-heads", type=positive, help="key/value heads (as --heads)")
    parser.add_argument("--head-dim", type=positive, help="numbers per head (128)")
    parser.add_argument("--rank", type=_rank, help="of keys and values, or key,value (64)")
    parser.add_argument("--layers", type=positive, help="end to end: decoder layers (1)")
    parser.add_argument("--hidden", type=positive, help="end to end: hidden size (4096)")
    parser.add_argument("--mlp", type=positive, help="end to end: width of the MLP (11008)")
    parser.add_argument("--steps", type=positive, help="end to end: tokens decoded per round (8)")
    parser.add_argument("--rounds", type=positive, help="samples of each contender (15; end to end: 7)")
    parser.add_argument("--threads", type=positive, help="CPU threads (as PyTorch chooses)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample, and on what it was measured")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: only shows that the benchmark works")
    given = parser.parse_args(arguments)
    if given.quick:
        for name, value in _QUICK.items():
            if getattr(given, name) is None:
                setattr(given, name, value)
    heads, kv_heads = given.heads or 32, given.kv_heads or given.heads or 32
    if heads % kv_heads:
        parser.error(f"--kv-heads: got {kv_heads} with {heads} heads, expected a divisor of --heads")
    if given.heads and not given.kv_heads:
        given.kv_heads = given.heads
    return given


def attention_cases(given: argparse.Namespace) -> list[attention_step.Case]:
    """The cases asked for; the default list where the command line names no shape."""
    if not any(getattr(given, name) for name in ("batch", "tokens", "dtype", *_SHAPE)):
        return attention_step.default_cases()
    grid = _grid(given, batch=[1, 8], tokens=[1024, 8192], dtype=["fp32"])
    return [replace(attention_step.Case(*cell), **_named(given, *_SHAPE)) for cell in grid]


def end_to_end_cases(given: argparse.Namespace) -> list[end_to_end.Case]:
    """The cases asked for; one layer of LLaVA-1.5-7B where the command line names no shape."""
    grid = _grid(given, batch=[8], tokens=[4096], dtype=["fp32"])
    return [replace(end_to_end.Case(*cell), **_named(given, *_SHAPE, *_DECODER)) for cell in grid]


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for, printing each result as it comes."""
    steps = given.steps or 8
    if given.threads:
        torch.set_num_threads(given.threads)
    result: dict[str, Any] = {**measure.environment(), "attention": [], "end_to_end": []}
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    print(f"{result['cpu']}, {result['threads']} threads; {versions}")
    if given.part in ("attention", "all"):
        print("\nAttention of one layer, one token: milliseconds, median (min - max)")
        header = ("shape", "dense", "packed", "decompressed", "dense/packed", "cache bytes")
        print(_row(header, _ATTENTION))
        for case in attention_cases(given):
            result["attention"].append(attention_step.run(case, given.rounds or 15))
            print(_row(_attention_row(result["attention"][-1]), _ATTENTION), flush=True)
    if given.part in ("end-to-end", "all"):
        for decoder in end_to_end_cases(given):
            sizes = f"layers={decoder.layers} hidden={decoder.hidden} MLP={decoder.mlp}"
            print(f"\nDecoding: {_shape(vars(decoder))} {sizes}")
            result["end_to_end"].append(end_to_end.run(decoder, steps, given.rounds or 7, _progress))
            _print_end_to_end(result["end_to_end"][-1])
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    result = run(given)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


_ATTENTION = (40, 26, 26, 30, 14, 13)
_END_TO_END = (22, 24, 10, 8, 12, 10)


def _attention_row(result: dict[str, Any]) -> tuple[str, ...]:
    held = result["bytes"]
    return (
        _shape(result),
        *(_milliseconds(result["seconds"][name]) for name in ("dense", "packed", "decompressed")),
        f"{result['speedup']:.2f}x",
        f"1/{held['dense'] / held['packed']:.1f}",
    )


def _print_end_to_end(result: dict[str, Any]) -> None:
    print(_row(("cache", "ms/step (min - max)", "tokens/s", "ratio", "cache MB", "error"), _END_TO_END))
    fastest = result["tokens_per_second"][result["fastest_dense"]]
    for name, speed in sorted(result["tokens_per_second"].items(), key=lambda item: -item[1]):
        cells = (
            name,
            _milliseconds(result["seconds"][name]),
            f"{speed:.2f}",
            f"{speed / fastest:.2f}x",
            f"{result['bytes'][name] / 1e6:.1f}",
            f"{result['error'][name]:.0e}",
        )
        print(_row(cells, _END_TO_END))
    print(f"ratio: to {result['fastest_dense']!r}, the fastest dense contender; error: of logits, to eager")
    if result["graphs_compiled_while_timed"]:
        print(f"mind: {result['graphs_compiled_while_timed']} graphs were compiled while timing")


def _progress(text: str) -> None:
    print(f"  {text}", flush=True)


def _shape(case: dict[str, Any]) -> str:
    dtype = str(case["dtype"]).removeprefix("torch.")
    rank = case["rank"] if isinstance(case["rank"], str) else ",".join(map(str, case["rank"]))
    heads = f"H={case['heads']}" + (f"/{case['kv_heads']}" if case["kv_heads"] != case["heads"] else "")
    return f"{dtype} B={case['batch']} T={case['tokens']} {heads} D={case['head_dim']} R={rank}"


def _milliseconds(seconds: dict[str, Any]) -> str:
    return f"{seconds['median'] * 1e3:.2f} ({seconds['min'] * 1e3:.2f} - {seconds['max'] * 1e3:.2f})"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return first[0].ljust(first[1]) + "".join(cell.rjust(width) for cell, width in rest)


def _grid(
    given: argparse.Namespace, batch: list[int], tokens: list[int], dtype: list[str]
) -> list[tuple[int, int, torch.dtype]]:
    names = given.dtype or dtype
    dtypes = [DTYPES[name] for name in names]
    return list(itertools.product(given.batch or batch, given.tokens or tokens, dtypes))


def _named(given: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def _rank(text: str) -> tuple[int, int]:
    key, _, value = text.partition(",")
    ranks = int(key), int(value or key)
    if min(ranks) < 2:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 2: the contents have half the rank")
    return ranks


if __name__ == "__main__":
    measure.restart_with_malloc_settings()
    main()
