"""Rows of `attnpack batch`: those that are asked for, and those that a file of answers already has."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from attnpack_cli.errors import UserError

#: Names of files in a folder that are pictures.
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

_ROW = '{"id": ..., "images": [paths], "prompt": text}'
_ANSWER = '{"id": ..., "answer": text} or {"id": ..., "error": text}, as attnpack batch writes it'

Id = str | int


@dataclass(frozen=True)
class Row:
    """One prompt. images: paths, absolute."""

    id: Id
    images: tuple[str, ...]
    prompt: str


@dataclass
class Kept:
    """What a file of answers holds.

    answered: ids that have an answer. left_out: lines that are to go before the file is continued: those with an error,
    which are tried again, and a last line that was not written to its end.
    """

    answered: set[Id] = field(default_factory=set)
    left_out: int = 0
    ended: bool = True


def read_rows(source: Path, prompt: str | None) -> list[Row]:
    """Return the rows of a folder of pictures, all with one prompt, or of a JSONL file.

    Raises:
        UserError: for a folder without a prompt or pictures, and by its number for a line that is no row.
    """
    if source.is_dir():
        if prompt is None:
            raise UserError(f"{source} is a folder of pictures and needs a question for all of them: --prompt TEXT")
        found = sorted(each for each in source.iterdir() if each.suffix.lower() in ENDINGS and each.is_file())
        if not found:
            raise UserError(f"{source}: no pictures in it; expected files that end in {', '.join(ENDINGS)}")
        return [Row(each.name, (str(each.absolute()),), prompt) for each in found]
    if prompt is not None:
        raise UserError(f"--prompt is for a folder of pictures, and each line of {source} has its own: leave it out")
    rows: dict[Id, Row] = {}
    for number, line in _lines(source, f"a folder of pictures, or a file with lines such as {_ROW}"):
        row = _row(f"{source}, line {number}", line, source.absolute().parent)
        if row.id in rows:
            raise UserError(f"{source}, line {number}: got the id {row.id!r} again, expected each once; rename it")
        rows[row.id] = row
    if not rows:
        raise UserError(f"{source}: no rows in it; expected lines such as {_ROW}")
    return list(rows.values())


def read_answers(out: Path) -> Kept:
    """Return what a file holds that is to be continued; nothing where there is none.

    Raises:
        UserError: for a line that is no answer, but a last one that was not written to its end.
    """
    kept = Kept()
    for _, id, line in _answers(out):
        if id is None or id in kept.answered:
            kept.left_out += 1
        else:
            kept.answered.add(id)
        kept.ended = line.endswith(b"\n")
    return kept


def continue_answers(out: Path, kept: Kept) -> None:
    """Leave in a file, which is replaced at once, the lines with answers alone, each ended."""
    if not kept.left_out and kept.ended:
        return
    out = out.resolve()
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    seen: set[Id] = set()
    try:
        with beside.open("wb") as file:
            for _, id, line in _answers(out):
                if id is not None and id not in seen:
                    seen.add(id)
                    file.write(line.rstrip(b"\n") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)


def _answers(out: Path) -> Iterator[tuple[int, Id | None, bytes]]:
    """Numbers, ids and contents of lines; None as the id of one that is to go."""
    if not out.exists():
        return
    with out.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                # A process that is killed leaves the beginning of a line, which only its end would close.
                if line.endswith(b"\n"):
                    raise _no_answer(out, number) from None
                content = None
            if content is None and not line.endswith(b"\n"):
                yield number, None, line
            elif not isinstance(content, dict) or not _is_id(content.get("id")):
                raise _no_answer(out, number)
            elif isinstance(content.get("answer"), str):
                yield number, content["id"], line
            elif isinstance(content.get("error"), str):
                yield number, None, line
            else:
                raise _no_answer(out, number)


def _no_answer(out: Path, number: int) -> UserError:
    return UserError(f"--out {out}, line {number}: not an answer; expected {_ANSWER}; choose another place")


def _lines(source: Path, expected: str) -> Iterator[tuple[int, bytes]]:
    try:
        with source.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except FileNotFoundError:
        raise UserError(f"{source}: no such file or folder; expected {expected}") from None
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}; expected {expected}") from None


def _row(where: str, line: bytes, beside: Path) -> Row:
    try:
        content: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON ({error}); expected {_ROW}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: got {type(content).__name__}, expected {_ROW}")
    id, images, prompt = content.get("id"), content.get("images", []), content.get("prompt")
    if not _is_id(id):
        raise UserError(f"{where}: got the id {id!r}, expected a text or a whole number, as in {_ROW}")
    if not isinstance(images, list) or not all(isinstance(each, str) for each in images):
        raise UserError(f"{where}: got the images {images!r}, expected a list of paths, as in {_ROW}")
    if not isinstance(prompt, str):
        raise UserError(f"{where}: got the prompt {prompt!r}, expected a text, as in {_ROW}")
    return Row(id, _absolute(images, beside), prompt)


def _absolute(images: Sequence[str], beside: Path) -> tuple[str, ...]:
    return tuple(str(beside / each) for each in images)


def _is_id(value: Any) -> TypeGuard[Id]:
    return isinstance(value, (str, int)) and not isinstance(value, bool)
