"""Measure a trained model on held-out digits, through its processor and ``generate``.

    python -m benchmarks.training.evaluate digits-llava

Prints a table and writes ``accuracy.json`` next to the weights. Decoding is greedy, one question per prompt; the row
``second turn`` asks a second ``read`` question after the model has answered a first one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnpack_fx.demo import digits
from attnpack_fx.demo.load import Loaded, batch_inputs
from benchmarks.trained import ASSETS, MODELS, load_trained

IMAGE_COUNTS = (1, 4, 16)
MAX_NEW_TOKENS = 13


def generate(loaded: Loaded, questions: list[digits.Question], prompts: list[str]) -> list[str]:
    """Answer a batch of prompts, equally long, about the images of ``questions``; one text per prompt."""
    inputs = batch_inputs(loaded, prompts, [question.images for question in questions])
    with torch.inference_mode():
        output = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return loaded.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(loaded: Loaded, task: str, images: int, count: int, seed: int, batch: int) -> dict[str, Any]:
    """Ask ``count`` held-out questions; returns the mean score and the share of wholly right answers."""
    questions = digits.held_out_questions(task, images, count, seed)
    scores: list[float] = []
    for start in range(0, count, batch):
        part = questions[start : start + batch]
        texts = generate(loaded, part, [question.prompt for question in part])
        scores += [digits.score(question, text) for question, text in zip(part, texts, strict=True)]
    return summary(task, images, scores)


def evaluate_second_turn(loaded: Loaded, images: int, count: int, seed: int, batch: int) -> dict[str, Any]:
    """Ask for one image and then for another; returns the score of the second answers.

    The first answer is the right one, so that all prompts are equally long.
    """
    pairs = digits.held_out_conversations(images, count, seed)
    scores: list[float] = []
    for start in range(0, count, batch):
        part = pairs[start : start + batch]
        prompts = [digits.follow_up_prompt(opening, opening.answer, second) for opening, second in part]
        seconds = [second for _, second in part]
        texts = generate(loaded, seconds, prompts)
        scores += [digits.score(question, text) for question, text in zip(seconds, texts, strict=True)]
    return summary("second turn", images, scores)


def summary(task: str, images: int, scores: list[float]) -> dict[str, Any]:
    """Mean, standard error and share of perfect scores."""
    values = np.asarray(scores)
    return {
        "task": task,
        "images": images,
        "questions": len(values),
        "score": round(float(values.mean()), 4),
        "standard_error": round(float(values.std(ddof=1) / np.sqrt(len(values))), 4),
        "all_right": round(float((values == 1.0).mean()), 4),
    }


def main() -> None:
    """Parse the command line, evaluate, print and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.evaluate", description="Measure a trained digits model."
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, default=None, help="default: accuracy.json in the model's folder")
    parser.add_argument("--questions", type=int, default=320, help="questions per task and number of images")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load_trained(arguments.model, arguments.dtype)
    out = arguments.out or ASSETS / arguments.model / "accuracy.json"
    rows: list[dict[str, Any]] = []
    record = {"split": "held_out", "seed": arguments.seed, "dtype": arguments.dtype, "results": rows}
    print(f"{'task':<12}{'images':>7}{'questions':>11}{'score':>9}{'+-':>8}{'all right':>11}{'seconds':>9}")

    def add(row: dict[str, Any], seconds: float) -> None:
        rows.append(row)
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(
            f"{row['task']:<12}{row['images']:>7}{row['questions']:>11}{row['score']:>9.4f}"
            f"{row['standard_error']:>8.4f}{row['all_right']:>11.4f}{seconds:>9.1f}",
            flush=True,
        )

    for images in IMAGE_COUNTS:
        batch = max(8, 64 // images)
        for task in digits.TASKS:
            began = time.monotonic()
            row = evaluate(loaded, task, images, arguments.questions, arguments.seed, batch)
            add(row, time.monotonic() - began)
        if images > 1:
            began = time.monotonic()
            row = evaluate_second_turn(loaded, images, arguments.questions // 2, arguments.seed, batch)
            add(row, time.monotonic() - began)


if __name__ == "__main__":
    main()
