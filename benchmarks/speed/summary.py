"""What the points come to: the largest batch of each contender, and ratios between them."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.speed.case import Case
from benchmarks.speed.search import largest

Row = dict[str, Any]


def worked(row: Row) -> bool:
    return "skipped" not in row and "failed" not in row


def peak(row: Row) -> float:
    """Bytes that count against the cap; infinite for a batch that could not run."""
    return float(row["peak_bytes"]) if worked(row) else math.inf


def summarised(rows: Sequence[Row]) -> dict[str, Any]:
    """The largest batch that fits, by contender, and tokens/s of ours over the fastest of each other kind there.

    fastest: the contender of each kind that `ratio_to_dense` and `ratio_to_quantised` compare; ratios are None where
    nothing of that kind was measured. skipped: reasons, by contender.
    """
    best: dict[str, Row] = {}
    for name in dict.fromkeys(row["contender"] for row in rows if "skipped" not in row):
        own = {row["batch"]: row for row in rows if row["contender"] == name}
        cap = next(row["cap_bytes"] for row in own.values())
        batch = largest({batch: peak(row) for batch, row in own.items()}, cap)
        if batch is not None:
            best[name] = own[batch]
    fastest: dict[str, str] = {}
    for name, row in best.items():
        if row["kind"] not in fastest or row["tokens_per_second"] > best[fastest[row["kind"]]]["tokens_per_second"]:
            fastest[row["kind"]] = name

    def ratio(kind: str) -> float | None:
        if "ours" not in fastest or kind not in fastest:
            return None
        ours, other = (best[fastest[each]]["tokens_per_second"] for each in ("ours", kind))
        return float(ours / other)

    return {
        "best": {
            name: {each: row[each] for each in ("batch", "tokens_per_second", "cache_bytes", "peak_bytes")}
            for name, row in best.items()
        },
        "fastest": fastest,
        "ratio_to_dense": ratio("dense"),
        "ratio_to_quantised": ratio("quantised"),
        "skipped": {row["contender"]: row["skipped"] for row in rows if "skipped" in row},
    }


def table(rows: Sequence[Row], case: Case) -> str:
    found = summarised(rows)
    lines = [
        f"{case.layers} layers of {case.heads} heads of {case.head_dim}, {case.dtype}, prompts of {case.tokens} tokens "
        f"({case.text} text); cap {case.cap_bytes / 1e6:.0f} MB",
        f"{'':30}{'batch':>7}{'cache MB':>10}{'peak MB':>9}{'tokens/s':>10}{'spread':>20}{'ms a step':>11}",
    ]
    for name, of in found["best"].items():
        row = next(row for row in rows if (row["contender"], row["batch"]) == (name, of["batch"]))
        rates = sorted(row["batch"] / sample for sample in row["samples"])
        lines.append(
            f"{name:30}{row['batch']:>7}{row['cache_bytes'] / 1e6:>10.1f}{row['peak_bytes'] / 1e6:>9.1f}"
            f"{row['tokens_per_second']:>10.1f}{f'{rates[0]:.1f} to {rates[-1]:.1f}':>20}"
            f"{1e3 * statistics.median(row['samples']):>11.1f}"
        )
    for name in dict.fromkeys(row["contender"] for row in rows):
        if name in found["skipped"]:
            lines.append(f"{name:30} skipped: {found['skipped'][name]}")
        elif name not in found["best"]:
            reason = next((row["failed"] for row in rows if row["contender"] == name and "failed" in row), None)
            lines.append(f"{name:30} no batch fits{'' if reason is None else f': {reason}'}")
    for kind in ("dense", "quantised"):
        if found[f"ratio_to_{kind}"] is not None:
            ours, other = found["fastest"]["ours"], found["fastest"][kind]
            lines.append(f"{ours} over {other}: {found[f'ratio_to_{kind}']:.2f}x tokens/s in the same memory")
    return "\n".join(lines)
