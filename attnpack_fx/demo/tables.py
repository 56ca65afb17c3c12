"""What the demo measured, and how it prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnpack_fx.demo.generation import DENSE, PACKED, Run
from attnpack_fx.explain import Report


@dataclass(frozen=True)
class Score:
    """One task at one number of images. Accuracies in [0, 1]; bytes of one prompt's cache after its answer."""

    task: str
    images: int
    questions: int
    dense: float
    packed: float
    dense_bytes: float
    packed_bytes: float


@dataclass(frozen=True)
class Speed:
    """One generation, by variant: seconds of prefill, tokens per second after it, bytes after every step."""

    images: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill: dict[str, float]
    tokens_per_second: dict[str, float]
    held: dict[str, list[int]]

    @classmethod
    def of(cls, runs: dict[str, Run], images: int, inputs: dict[str, Any]) -> "Speed":
        """From one run of each variant on the same inputs."""
        batch, prompt_tokens = inputs["input_ids"].shape
        return cls(
            images,
            batch,
            prompt_tokens,
            max(run.tokens.shape[1] for run in runs.values()),
            {variant: run.prefill for variant, run in runs.items()},
            {variant: run.tokens_per_second for variant, run in runs.items()},
            {variant: run.held for variant, run in runs.items()},
        )


@dataclass(frozen=True)
class Example:
    """One question and what was answered, None where it is not yet; `right` is None where nobody knows."""

    question: str
    dense: str | None
    packed: str | None
    right: str | None = None


def section(title: str, body: str) -> str:
    """A title and what stands below it."""
    return f"{title}\n\n{body}"


def scores_text(scores: Sequence[Score], speeds: Sequence[Speed]) -> str:
    """Accuracy and memory, as a section."""
    title = "Accuracy and memory (cache bytes of one prompt at the end of its answer)"
    return section(title, scores_table(scores, speeds))


def speed_text(speeds: Sequence[Speed]) -> str:
    """Speed, as a section."""
    title = (
        "Speed (tokens/s of the whole batch after the first token; compiling and warm-up not counted; "
        f"CPU threads: {torch.get_num_threads()})"
    )
    return section(title, f"{speed_table(speeds)}\n\n{ahead(speeds)}")


def found_text(found: Report) -> str:
    """What `explain` found, as one section or two."""
    vision, text = (_rank(found["policy"][name]) for name in ("vision_rank", "text_rank"))
    title = f"Error per layer against the dense cache (vision rank {vision}, text rank {text}; attnpack_fx.explain)"
    sections = [section(title, layers_table(found))]
    if found.settings:
        title = "Attention alone, in all layers of one step of the batch, by setting, with no more error of keys"
        sections.append(section(title, "\n".join(found.settings)))
    return "\n\n".join(sections)


def _rank(spec: Any) -> str:
    if spec is None:
        return "none (dense)"
    return f"{spec[0]} for keys and {spec[1]} for values" if isinstance(spec, (list, tuple)) else str(spec)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns padded to their widest cell, the first `left` flush left and the others flush right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: list[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return ("  " + "  ".join(padded)).rstrip()

    return "\n".join([line(cells[0]), line(["-" * width for width in widths]), *map(line, cells[1:])])


def scores_table(scores: Sequence[Score], speeds: Sequence[Speed]) -> str:
    """Accuracy and memory of every task, and the speed at its number of images."""
    by_images = {speed.images: speed.tokens_per_second for speed in speeds}
    rows = []
    for score in scores:
        rates = by_images.get(score.images, {})
        rows.append(
            [
                score.task,
                str(score.images),
                str(score.questions),
                f"{score.dense:.1%}",
                f"{score.packed:.1%}",
                size(score.dense_bytes),
                size(score.packed_bytes),
                ratio(score.dense_bytes, score.packed_bytes),
                *(rate(rates.get(variant)) for variant in (DENSE, PACKED)),
            ]
        )
    header = [
        "task",
        "images",
        "questions",
        "right dense",
        "packed",
        "cache dense",
        "packed",
        "smaller",
        "tokens/s dense eager",
        "packed compiled",
    ]
    return table(header, rows)


def speed_table(speeds: Sequence[Speed]) -> str:
    """Every variant's prefill time, rate and final cache."""
    rows = []
    for speed in speeds:
        for variant in speed.tokens_per_second:
            rows.append(
                [
                    variant,
                    str(speed.images),
                    str(speed.batch),
                    f"{speed.prompt_tokens:,}",
                    str(speed.new_tokens),
                    f"{speed.prefill[variant]:.2f} s",
                    rate(speed.tokens_per_second[variant]),
                    size(speed.held[variant][-1]),
                    ratio(speed.held[DENSE][-1], speed.held[variant][-1]),
                ]
            )
    header = [
        "variant",
        "images",
        "batch",
        "prompt tokens",
        "new tokens",
        "prefill",
        "tokens/s",
        "cache of the batch",
        "smaller",
    ]
    return table(header, rows)


def ahead(speeds: Sequence[Speed]) -> str:
    """Which variant has the most tokens per second, by the number of images."""
    first: dict[str, list[str]] = {}
    for speed in speeds:
        rates = speed.tokens_per_second
        first.setdefault(max(rates, key=lambda variant: rates[variant]), []).append(str(speed.images))
    found = "; ".join(f"{variant}, at {', '.join(images)}" for variant, images in first.items())
    return f"  Ahead, by images in a prompt: {found}."


def example_text(example: Example) -> str:
    """A question and its answers, one under the other."""
    lines = {"question": example.question, "right": example.right, "dense": example.dense, "packed": example.packed}
    return "\n".join(f"  {name:<8}  {text}" for name, text in lines.items() if text is not None)


def layers_table(report: dict[str, Any]) -> str:
    """The layers of an `attnpack_fx.explain` report: ranks, relative errors, bytes."""
    rows = []
    for layer in report["layers"]:
        tokens = ", ".join(f"{count} {name}" for name, count in layer["tokens"].items() if count)
        ranks = ", ".join(f"{name} {key}/{layer['value_rank'][name]}" for name, key in layer["key_rank"].items()) or "-"
        errors = ["-" if layer[name] is None else f"{layer[name]:.2%}" for name in ("key_error", "value_error")]
        sizes = [
            size(layer["dense_bytes"]),
            size(layer["bytes"]),
            ratio(layer["dense_bytes"], layer["bytes"]),
        ]
        rows.append([str(layer["layer"]), tokens, ranks, *errors, *sizes])
    header = ["layer", "tokens", "rank key/value", "key error", "value error", "dense", "packed", "smaller"]
    return table(header, rows, left=3)


def size(count: float) -> str:
    """Bytes in the largest fitting unit, three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


def ratio(dense: float, packed: float) -> str:
    """How many times smaller."""
    return f"{dense / packed:.2f}x" if packed else "-"


def rate(tokens_per_second: float | None) -> str:
    """Tokens per second."""
    return (
        "-"
        if not tokens_per_second
        else f"{tokens_per_second:,.0f}"
        if tokens_per_second >= 10
        else f"{tokens_per_second:.1f}"
    )
