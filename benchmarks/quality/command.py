"""The command line of the benchmark, and the file of results, which is continued where it exists."""

import argparse
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attnpack_fx import PackPolicy
from attnpack_fx.demo.load import Loaded, load, trained_model
from attnpack_fx.policy import PolicyError
from benchmarks import results_file
from benchmarks.checked import positive
from benchmarks.quality.check import check
from benchmarks.quality.data import Batch, Setting, batches
from benchmarks.quality.figure import draw
from benchmarks.quality.packing import Decoders, op_by_op, packed, vision_bytes
from benchmarks.quality.score import score
from benchmarks.quality.spectra import spectra
from benchmarks.quality.sweeps import SPACES, SWEEPS, Candidate, SkippedError, candidates

MAIN = Setting()
#: Asked of some sweeps only: of those that show how far a result carries.
OTHERS = (Setting("read", 1), Setting("read", 4, late=True), Setting("cell", 4, late=True), Setting("read", 16))
_SPREAD = ("uniform", "calibrated")
#: Policies for which packing outside the graph is compared with the compiled prefill.
CHECKED = tuple(PackPolicy(vision_rank=16, key_space=space) for space in SPACES)
_SEED = 2


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    settings = [MAIN, *(OTHERS if given.full else ())]
    record = _record(given, settings)
    loaded = load(str(trained_model()), given.dtype)
    with op_by_op():
        decoders = Decoders(loaded.model)
        if "check" not in record:
            record["check"] = [check(loaded, decoders, MAIN, policy, given.seed) for policy in CHECKED]
        for setting in settings:
            _measure(given, loaded, decoders, setting, record)
    results_file.write(given.out, record)
    if given.figure:
        draw(record, given.figure)


def _measure(
    given: argparse.Namespace, loaded: Loaded, decoders: Decoders, setting: Setting, record: dict[str, Any]
) -> None:
    count = given.questions if setting == MAIN else max(given.batch, given.questions // 2 // given.batch * given.batch)
    size = min(given.batch, max(1, given.batch * MAIN.images // setting.images))

    @lru_cache(maxsize=1)
    def asked() -> list[Batch]:
        return batches(loaded, setting, count, size, given.seed)

    if setting == MAIN and "spectra" not in record:
        record["spectra"] = spectra(asked()[0])
    rows: list[dict[str, Any]] = record["rows"]
    print(f"\n{setting.name}, {count} questions")
    print(
        f"{'sweep':<11}{'policy':<40}{'right':>8}{'dense':>8}{'difference':>24}{'exact':>8}{'KL':>10}{'vision':>8}{'all':>7}"
    )
    for sweep in SWEEPS:
        if (given.only and sweep not in given.only) or (setting != MAIN and sweep not in _SPREAD):
            continue
        for candidate in candidates(
            sweep, given.quick, setting, loaded.model.config.get_text_config().num_hidden_layers
        ):
            known = {"sweep": sweep, "name": candidate.name, "setting": setting.name}
            old = next((row for row in rows if known.items() <= row.items()), None)
            if old is None or "skipped" in old:  # What could not be measured then may be there now.
                row = {**known, **_row(loaded, decoders, asked, candidate, given.seed)}
                results_file.replace_row(rows, old, row)
                results_file.write(given.out, record)
                old = row
            print(_line(old), flush=True)


def _row(
    loaded: Loaded,
    decoders: Decoders,
    asked: Any,
    candidate: Candidate,
    seed: int,
) -> dict[str, Any]:
    began = time.monotonic()
    try:
        policy = candidate.make(loaded)
        if candidate.unlike is not None:
            _check_effect(asked()[0], policy, candidate.unlike)
        row = score(loaded.model, decoders, asked(), policy, seed)
    except (SkippedError, NotImplementedError, PolicyError) as error:
        return {"skipped": f"{type(error).__name__}: {error}"}
    return {"policy": policy.to_dict(), **row, "seconds": round(time.monotonic() - began, 1)}


def _check_effect(batch: Batch, policy: PackPolicy, other: PackPolicy) -> None:
    """Raise SkippedError where both hold the same bytes."""
    held, unlike = (vision_bytes(packed(batch, each), batch) for each in (policy, other))
    if held == unlike:
        raise SkippedError(f"no effect on bytes: {held} with bases={policy.bases!r} and with {other.bases!r}")


def _line(row: dict[str, Any]) -> str:
    head = f"{row['sweep']:<11}{row['name']:<40}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    low, high = row["difference_interval"]
    difference = f"{100 * row['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    return (
        f"{head}{100 * row['accuracy']:>8.2f}{100 * row['dense_accuracy']:>8.2f}{difference:>24}"
        f"{100 * row['exact']:>8.1f}{row['kl']:>10.2e}{row['vision_ratio']:>7.1f}x{row['cache_ratio']:>6.1f}x"
    )


def _record(given: argparse.Namespace, settings: list[Setting]) -> dict[str, Any]:
    """The file of results as it is, or a new one, for these settings too."""
    own = {"dtype": given.dtype, "seed": given.seed, "batch": given.batch, "questions": given.questions}
    record = results_file.begin(given.out, own)
    known = record.setdefault("settings", [])
    known += [setting.name for setting in settings if setting.name not in known]
    return record


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description="Accuracy against bytes.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON; rows already in it are kept")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw accuracy and KL against bytes")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="few policies and 64 questions")
    amount.add_argument("--full", action="store_true", help="other tasks and numbers of images as well")
    parser.add_argument("--questions", type=positive, help="of the main setting (320; quick: 64)")
    parser.add_argument("--only", action="append", choices=SWEEPS, help="this sweep; may be given several times")
    parser.add_argument("--batch", type=positive, default=32, help="questions prefilled together (32)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model (bfloat16)")
    parser.add_argument("--seed", type=int, default=_SEED)
    parser.add_argument("--threads", type=positive, help="CPU threads (as PyTorch chooses)")
    given = parser.parse_args(arguments)
    given.questions = given.questions or (64 if given.quick else 320)
    if given.questions % given.batch:
        parser.error(f"--questions: got {given.questions}, expected a multiple of --batch, {given.batch}")
    return given
