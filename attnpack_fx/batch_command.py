"""`attnpack batch`, once its arguments are checked: rows to workers, and answers to a file that may be continued."""

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnpack_cli.errors import UserError
from attnpack_cli.rows import Row, continue_answers
from attnpack_fx.demo.steps import Steps
from attnpack_fx.policy import PackPolicy, PolicyError
from attnpack_fx.ray_workers import Told, answered
from attnpack_fx.warning import AttnpackWarning

#: Rows that a worker is given at once where a memory decides about the batch.
_ROWS = 32


def batch(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    rows: list[Row] = [row for row in arguments.rows if row.id not in arguments.kept.answered]
    options = _options(arguments)
    continue_answers(arguments.out, arguments.kept)
    failed = 0
    workers: set[str] = set()
    if rows:
        failed, workers = _asked(arguments, rows, options)
    there = len(arguments.rows) - len(rows)
    print(
        f"{arguments.out}: {len(rows) - failed} answered, {failed} failed, {there} were there; "
        f"{len(workers)} workers, {time.perf_counter() - began:.1f} s"
    )
    return 1 if failed else 0


def _asked(arguments: argparse.Namespace, rows: Sequence[Row], options: dict[str, Any]) -> tuple[int, set[str]]:
    """How many rows failed, and which workers there were, once all are written."""
    failed = 0
    written: set[int] = set()
    workers: set[str] = set()
    given = [{"images": list(row.images), "prompt": row.prompt} for row in rows]
    size = arguments.batch or (_ROWS if arguments.memory else 8)
    # Ray prints to standard output what became of workers.
    with Steps(len(rows), unit="row") as steps, contextlib.redirect_stdout(sys.stderr):
        steps.advance(0, "starting workers")
        for told in answered(given, options, size=size, workers=arguments.workers, address=arguments.address):
            new = [each for each in told if each.number not in written]
            written.update(each.number for each in new)
            workers.update(each.worker for each in told)
            # A batch that is written is closed: a file of answers is there once there are any, and holds all so far.
            with arguments.out.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(_line(rows[each.number], each) for each in new)
            failed += sum(bool(each.error) for each in new)
            for text in {text for each in told for text in each.warned}:
                warnings.warn(text, AttnpackWarning, stacklevel=1)
            steps.advance(len(new), f"answering, {failed} failed" if failed else "answering")
    if len(written) < len(rows):
        raise UserError(f"{len(rows) - len(written)} rows did not come back from Ray; run the same command again")
    return failed, workers


def _line(row: Row, told: Told) -> str:
    found = {"error": told.error} if told.error else {"answer": told.answer}
    return json.dumps({"id": row.id, **found}, ensure_ascii=False) + "\n"


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Answers`, whose paths hold in any working directory."""
    place = Path(arguments.model).expanduser()
    try:
        policy = PackPolicy() if arguments.policy is None else PackPolicy.load(arguments.policy)
    except (PolicyError, OSError) as error:
        raise UserError(str(error)) from error
    return {
        "model": str(place.resolve()) if place.is_dir() else arguments.model,
        "policy": policy.to_dict(),
        "dtype": arguments.dtype,
        "max_new_tokens": arguments.max_new_tokens,
        "batch": arguments.batch,
        "memory": arguments.memory,
    }
