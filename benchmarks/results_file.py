"""A benchmark's JSON file of results: begun, continued where it exists, and written as a whole after every row."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import measure


def begin(out: Path | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """The results in `out` so far, or new ones: `measure.environment()`, `own`, and no "rows".

    own: how this run measures; rows that were measured otherwise are not mixed with it. out: None keeps no file.

    Rows kept from another commit or machine stand beside new ones: what differs is listed under "continued". Raises
    ValueError where the file was measured otherwise.
    """
    own = json.loads(json.dumps(own))
    if out is None or not out.exists():
        return {**measure.environment(), **own, "rows": []}
    record: dict[str, Any] = json.loads(out.read_text())
    other = {name: record.get(name) for name in own}
    if other != own:
        raise ValueError(f"{out}: got results of {other}, expected {own}; give another --out, or remove it")
    for name, value in measure.environment().items():
        change = {name: value}
        if record[name] != value and change not in record.get("continued", []):
            record.setdefault("continued", []).append(change)
    return record


def write(out: Path | None, record: Mapping[str, Any]) -> None:
    """Replace the file, so that it is never found half written; None does nothing."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(out)


def replace_row(rows: list[dict[str, Any]], old: Mapping[str, Any] | None, row: dict[str, Any]) -> None:
    """Put `row` where `old` stands in `rows`, or behind them."""
    if old is None:
        rows.append(row)
    else:
        rows[rows.index(old)] = row
