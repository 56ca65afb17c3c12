"""Result files as they lie in a folder: any of them may be missing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Groups of what this library does; all others are what it is compared with.
OURS = "ours"

Interval = tuple[float, float]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One method on one model. Shares are in [0, 1], `kl` in nats per token, intervals 95 % over contexts.

    ratio: bytes of the dense cache over counted bytes, after the prompt; vision_ratio: the same of vision tokens.
    contexts: how many prompts it was measured on. difference: accuracy minus the dense cache's, paired by context.
    target: the ratio asked for, where one was. tasks, long: as they stand in the file.
    """

    group: str
    name: str
    target: float | None
    contexts: int
    ratio: float
    vision_ratio: float | None
    accuracy: float
    accuracy_interval: Interval | None
    difference: float
    difference_interval: Interval | None
    exact: float | None
    rouge_l: float | None
    kl: float | None
    agree: float | None
    first_divergence: float | None
    tasks: Mapping[str, Record]
    long: Record

    @property
    def ours(self) -> bool:
        return is_ours(self.group)


@dataclass(frozen=True)
class Skipped:
    group: str
    name: str
    target: float | None
    reason: str


@dataclass(frozen=True)
class Quality:
    """Every method on one model.

    contexts: prompts of a row that does not say otherwise. dense, spectra: as they stand in the file. made: the file's
    own record of the run.
    """

    file: str
    model: str
    architecture: str
    contexts: int
    images: int | None
    dense: Record
    spectra: tuple[Record, ...]
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    made: Record

    @property
    def groups(self) -> list[str]:
        """Groups in the order of their first row: ours first."""
        names = dict.fromkeys(row.group for row in self.rows)
        return sorted(names, key=lambda name: not is_ours(name))

    @property
    def tasks(self) -> list[str]:
        """Tasks that any row has, in the order of the file."""
        return list(dict.fromkeys(task for row in self.rows for task in row.tasks))


@dataclass(frozen=True)
class Results:
    """speed, long, counted: as they stand in the files, None where there is none. missing: what is not there."""

    qualities: tuple[Quality, ...] = ()
    speed: Record | None = None
    long: Record | None = None
    counted: Record | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


_WHAT = {
    "speed.json": "Throughput at a fixed memory cap",
    "long.json": "Memory over a long generation",
    "counted.json": "Counted bytes of published models",
}


def is_ours(group: str) -> bool:
    return group.split(",")[0].strip() == OURS


def is_dense(contender: str) -> bool:
    """Of contenders of `benchmarks.speed` and policies of a long generation."""
    return contender.startswith(("dense", "static"))


def load(folder: Path) -> Results:
    """Whatever result files lie in `folder`. Raises ValueError where one is not what it should be, or for no folder."""
    if not folder.is_dir():
        raise ValueError(f"--results: got {folder}, expected a folder of result files; run the measurements first")
    missing = {}
    files = sorted(folder.glob("quality-*.json"))
    if not files:
        missing["quality-*.json"] = "Accuracy against bytes"
    qualities = tuple(_quality(file) for file in files)
    others: dict[str, Record | None] = {}
    for name, what in _WHAT.items():
        record = _read(folder / name) if (folder / name).exists() else None
        others[name] = record if measured(record) else None
        if others[name] is None:
            missing[name] = what if record is None else f"{what}, by any of its rows"
    missing |= {f"{each.file}, spectra": f"Singular values of {each.model}" for each in qualities if not each.spectra}
    return Results(qualities, others["speed.json"], others["long.json"], others["counted.json"], missing)


def rows_of(record: Record | None) -> list[Record]:
    """Rows of a result file; `benchmarks.memory` calls them "memory"."""
    if record is None:
        return []
    rows: list[Record] = record.get("rows") or record.get("memory") or []
    return rows


def measured(record: Record | None) -> list[Record]:
    """Rows of a result file that were neither skipped nor failed."""
    return [row for row in rows_of(record) if "skipped" not in row and "failed" not in row]


def machine(record: Record) -> str:
    """Processor, threads, versions and dtype of a result file, in words; what it does not say is left out."""
    versions = record.get("versions") or {}
    threads = record.get("threads")
    parts = [
        record.get("device") or record.get("gpu"),
        record.get("cpu"),
        None if threads is None else f"{threads} thread{'' if threads == 1 else 's'}",
        *(f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name)),
        record.get("dtype"),
    ]
    return ", ".join(str(part) for part in parts if part) or "a machine that the file does not name"


def commit(record: Record) -> str:
    return str(record.get("commit") or "unknown")[:10]


def _read(file: Path) -> Record:
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: got {error}, expected JSON; remove it, or measure again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: got a {type(found).__name__}, expected an object with rows; measure again")
    return found


def _quality(file: Path) -> Quality:
    record = _read(file)
    try:
        rows: list[Row] = []
        skipped: list[Skipped] = []
        for row in record.get("rows", ()):
            if "skipped" in row:
                skipped.append(Skipped(row["group"], row["name"], row.get("target"), str(row["skipped"])))
            else:
                rows.append(_row(row, record["contexts"]))
        return Quality(
            file=file.name,
            model=record["model"],
            architecture=record.get("architecture") or "",
            contexts=record["contexts"],
            images=record.get("images"),
            dense=record["dense"],
            spectra=tuple(record.get("spectra") or ()),
            rows=tuple(rows),
            skipped=tuple(skipped),
            made={name: value for name, value in record.items() if name not in ("rows", "spectra", "dense")},
        )
    except KeyError as error:
        raise ValueError(f"{file}: got no {error}, expected it in every result of quality; measure again") from error


def _row(row: Record, contexts: int) -> Row:
    return Row(
        group=row["group"],
        name=row["name"],
        target=row.get("target"),
        contexts=row.get("contexts", contexts),
        ratio=row["prompt_ratio"],
        vision_ratio=row.get("vision_ratio"),
        accuracy=row["accuracy"],
        accuracy_interval=_interval(row.get("accuracy_interval")),
        difference=row["difference"],
        difference_interval=_interval(row.get("difference_interval")),
        exact=row.get("exact"),
        rouge_l=row.get("rouge_l"),
        kl=row.get("kl"),
        agree=row.get("agree"),
        first_divergence=row.get("first_divergence"),
        tasks=row.get("tasks") or {},
        long=row.get("long") or {},
    )


def _interval(found: Any) -> Interval | None:
    return None if found is None else (found[0], found[1])
