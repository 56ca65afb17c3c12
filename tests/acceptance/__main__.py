"""`python -m tests.acceptance`: the acceptance grid as a Markdown table, settings by families.

A cell says how many layers are packed and the bytes of the cache as a part of the dense one's, or what is wrong.
"""

import argparse
import sys
import time

import torch

from tests.acceptance.cells import Record, problems, run
from tests.acceptance.families import FAMILIES, LAYERS
from tests.acceptance.settings import GRID, SETTINGS, fast


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance", description=__doc__)
    parser.add_argument("--families", help=f"comma-separated, of {', '.join(FAMILIES)}")
    parser.add_argument("--settings", help=f"separated by semicolons, of {'; '.join(SETTINGS)}")
    parser.add_argument("--fast", action="store_true", help="only the cells that run by default in the tests")
    given = parser.parse_args()
    families = _chosen(parser, given.families, ",", FAMILIES)
    settings = _chosen(parser, given.settings, ";", SETTINGS)
    torch.set_num_threads(1)
    records: dict[tuple[str, str], Record] = {}
    began = time.perf_counter()
    for family, setting in fast() if given.fast else GRID:
        if family in families and setting in settings:
            record = records[family, setting] = run(family, setting)
            print(
                f"{record.seconds:6.1f} s  {family}, {setting}: {_cell(record)}",
                *problems(record),
                sep="\n    ",
                file=sys.stderr,
            )
    print(_table(records, families, settings))
    wrong = {cell: problems(record) for cell, record in records.items() if problems(record)}
    if wrong:
        print()
    for (family, setting), found in wrong.items():
        print(f"- {family}, {setting}: {'; '.join(found)}")
    seconds = time.perf_counter() - began
    print(f"\n{len(records)} cells, {len(wrong)} of them wrong, {seconds:.0f} s")
    return 1 if wrong else 0


def _chosen(parser: argparse.ArgumentParser, text: str | None, separator: str, known: object) -> list[str]:
    names = list(known)  # type: ignore[call-overload]
    if text is None:
        return names
    chosen = [name.strip() for name in text.split(separator)]
    for name in chosen:
        if name not in names:
            parser.error(f"got {name!r}, expected one of {', '.join(map(repr, names))}")
    return chosen


def _table(records: dict[tuple[str, str], Record], families: list[str], settings: list[str]) -> str:
    families = [family for family in families if any(family == each for each, _ in records)]
    settings = [setting for setting in settings if any(setting == each for _, each in records)]
    lines = ["| setting | " + " | ".join(families) + " |", "| --- |" + " --- |" * len(families)]
    for setting in settings:
        cells = [_cell(records[family, setting]) if (family, setting) in records else "" for family in families]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(record: Record) -> str:
    if record.raised is not None:
        return "raises " + record.raised.split("(")[0].split(":")[0]
    text = f"{len(record.packed)} of {LAYERS} packed, bytes {record.ratio:.3f}"
    if record.promised is not None:
        text += f" (at most {record.promised / record.dense_bytes:.3f})"
    for reason in sorted(record.dense | record.unpruned | record.unmerged):
        text += f"; {reason}"
    return text + ("; **wrong**" if problems(record) else "")


if __name__ == "__main__":
    sys.exit(main())
