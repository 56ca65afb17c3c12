"""The command line: each contender once, in a process of its own."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import results_file
from benchmarks.arguments import part, positive
from benchmarks.child import in_child
from benchmarks.long.contenders import CONTENDERS, DENSE, FEW
from benchmarks.long.generate import Length, run

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    threads = given.threads or torch.get_num_threads()
    torch.set_num_threads(threads)  # `measure.environment` says so
    record = results_file.begin(given.out, {"benchmark": "memory", **asdict(given.length)})
    rows: list[Row] = record["rows"]
    with tqdm(given.contenders, desc="memory", unit="contender", file=sys.stderr) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            old = next((row for row in rows if row["name"] == name), None)
            if old is not None and "bytes" in old:
                continue
            found = in_child(run, name, given.length, threads=threads)
            results_file.replace_row(rows, old, {"name": name, "policy": CONTENDERS[name].to_dict(), **found})
            results_file.write(given.out, record)
    print(table(rows, given.length))


def table(rows: Sequence[Row], length: Length) -> str:
    """Kilobytes of the batch's caches after the prompt, half of the tokens and all, and what dense ones are to them."""
    dense = next((row["bytes"][-1] for row in rows if row["name"] == DENSE and "bytes" in row), None)
    lines = [
        f"{length.prompts} prompts of {length.images} images, {length.tokens} tokens generated; KB held after",
        f"{'':26}{'the prompt':>12}{'half':>10}{'all':>10}{'a token':>10}{'dense over it':>15}{'peak MB':>9}",
    ]
    for row in rows:
        if "bytes" not in row:
            how = "skipped" if "skipped" in row else "failed"
            lines.append(f"{row['name']:26} {how}: {row[how]}")
            continue
        held = row["bytes"]
        grown = (held[-1] - held[0]) / row["steps"][-1] / length.prompts
        kilobytes = [f"{each / 1e3:,.0f}" for each in (held[0], held[len(held) // 2], held[-1])]
        ratio = "" if dense is None else f"{dense / held[-1]:.2f}x"
        lines.append(
            f"{row['name']:26}{kilobytes[0]:>12}{kilobytes[1]:>10}{kilobytes[2]:>10}{grown / 1e3:>10.2f}"
            f"{ratio:>15}{row['peak_bytes'] / 1e6:>9.1f}"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `length` and `contenders` say what it comes to."""
    what = "Bytes a cache holds over a long generation."
    parser = part("memory", what, "96 tokens after 2 prompts, dense and ours")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="rows already in it are kept")
    parser.add_argument("--tokens", type=positive, help="generated (512; quick: 96)")
    parser.add_argument("--only", action="append", choices=CONTENDERS, metavar="NAME", help="; ".join(CONTENDERS))
    given = parser.parse_args(arguments)
    length = Length(prompts=2, tokens=96, every=8) if given.quick else Length()
    if given.tokens:
        length = Length(length.images, length.prompts, given.tokens, length.every)
    if length.tokens % length.every:
        parser.error(
            f"--tokens: got {length.tokens}, expected a multiple of {length.every}, after which bytes are counted"
        )
    given.length = length
    given.contenders = tuple(given.only or (FEW if given.quick else CONTENDERS))
    return given
