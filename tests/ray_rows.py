"""Questions about handwritten digits, as rows of pictures and prompts, and how the trained model answers them."""

import io
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from attnpack_fx.demo.digits import Question, held_out_questions

#: Tokens of an answer, and its end.
TOKENS = 9


@lru_cache(maxsize=1)
def questions(count: int = 64) -> list[Question]:
    """Questions to read one of two images."""
    return held_out_questions("read", images=2, count=count, seed=0)


def prompt(question: Question) -> str:
    """The question without images and template, which the processor adds."""
    return question.prompt.split(" question : ")[1].removesuffix(" answer :")


def encoded(question: Question) -> list[bytes]:
    """Its images as PNG."""
    files = [io.BytesIO() for _ in question.images]
    for image, file in zip(question.images, files, strict=True):
        image.save(file, "PNG")
    return [file.getvalue() for file in files]


def save_rows(folder: Path, asked: Sequence[Question], more: Sequence[dict[str, Any]] = ()) -> Path:
    """Write images, and a JSONL file of rows beside them: those of `asked` by their number, and `more`."""
    rows: list[dict[str, Any]] = []
    for number, question in enumerate(asked):
        names = [f"{number}-{place}.png" for place in range(len(question.images))]
        for name, content in zip(names, encoded(question), strict=True):
            (folder / name).write_bytes(content)
        rows.append({"id": number, "images": names, "prompt": prompt(question)})
    file = folder / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    return file
