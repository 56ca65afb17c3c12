"""The demo on the trained model: questions about held-out handwritten digits, answered dense and packed."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnpack_fx.demo import digits
from attnpack_fx.demo.generation import (
    DENSE,
    INDUCTOR,
    PACKED,
    Run,
    compiled,
    explained,
    texts,
    timed,
    warm_up,
)
from attnpack_fx.demo.load import Loaded, batch_inputs
from attnpack_fx.demo.picture import draw
from attnpack_fx.demo.spectra import spectra
from attnpack_fx.demo.steps import Steps
from attnpack_fx.demo.tables import Example, Score, Speed, example_text, found_text, scores_text, speed_text
from attnpack_fx.policy import PackPolicy, RankSpec

#: Ranks of keys and values at which this model answers as it does dense; RoPE costs the keys rank.
VISION_RANK: RankSpec = (32, 16)
_ANSWER_TOKENS = 12
_SEED = 0
_EXAMPLES = 4
_TITLES = {DENSE: "Answers of the dense cache", PACKED: "\nAnswers of both"}
#: Seconds after which plain Inductor, the least of the comparisons, is left out.
_PATIENCE = 150

Case = tuple[str, int]


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    images: numbers of images in a prompt, ascending. questions: of each task and number of images, in one batch.
    new_tokens: of the speed runs. inductor: whether to time plain Inductor as well, if time allows.
    """

    images: tuple[int, ...] = (1, 4, 16)
    questions: int = 8
    new_tokens: int = 64
    inductor: bool = True


QUICK = Settings(images=(4,), questions=4, new_tokens=24, inductor=False)


def run(loaded: Loaded, settings: Settings, policy: PackPolicy, out: Path, steps: Steps) -> None:
    """Answer, measure, draw to `out`; print answers and tables, each as soon as it is there."""
    cases = [(task, images) for images in settings.images for task in digits.TASKS]
    questions = {
        (task, images): digits.held_out_questions(task, images, settings.questions, _SEED) for task, images in cases
    }
    inputs = {
        case: batch_inputs(loaded, [question.prompt for question in asked], [question.images for question in asked])
        for case, asked in questions.items()
    }
    answers: dict[str, dict[Case, Run]] = {}
    speeds: dict[str, dict[int, Run]] = {}
    variants = [DENSE, PACKED, *([INDUCTOR] if settings.inductor else [])]
    # What is printed: both answers to one question of each of the last cases.
    shown = cases[-_EXAMPLES:]
    steps.expect(2 + 2 * len(cases) + len(variants) * (1 + len(settings.images)))
    began = time.monotonic()
    for variant in variants:
        if variant == INDUCTOR and time.monotonic() - began > _PATIENCE:
            break
        with compiled(loaded.model, variant, policy):
            steps.begin(f"{variant}: warming up")
            # Two cases that differ in every size: what is compiled after the second holds for all others.
            for case in (("read", settings.images[-1]), ("locate", settings.images[-2:][0])):
                warm_up(loaded, inputs[case])
            answers[variant], speeds[variant] = {}, {}
            if variant in _TITLES:
                steps.print(_TITLES[variant])
            for case in cases if variant != INDUCTOR else []:
                steps.begin(f"{variant}: {case[0]}, {case[1]} images")
                answers[variant][case] = timed(loaded, inputs[case], _ANSWER_TOKENS)
                if case in shown:
                    steps.print("\n" + example_text(_example(loaded, case, questions[case][0], answers)))
            for images in settings.images:
                steps.begin(f"{variant}: {settings.new_tokens} tokens, {images} images")
                speeds[variant][images] = timed(loaded, inputs["read", images], settings.new_tokens, exactly=True)
        if variant == PACKED:
            scores = [
                _score(loaded, case, questions[case], answers[DENSE][case], answers[PACKED][case]) for case in cases
            ]
            steps.print("\n" + scores_text(scores, _measured(speeds, settings, inputs)))
    measured = _measured(speeds, settings, inputs)
    steps.print("\n" + speed_text(measured))
    if settings.inductor and INDUCTOR not in speeds:
        steps.print(f"\nPlain Inductor was not timed: the rest took longer than {_PATIENCE} seconds.")
    last = ("read", settings.images[-1])
    steps.begin("explain")
    steps.print("\n" + found_text(explained(loaded, inputs[last], policy)))
    steps.begin("singular values, picture")
    asked = questions[last][0]
    title = f"{Path(loaded.name).name}: the packed cache of {last[1]} images of handwritten digits"
    draw(out, title, _short(asked), asked.images, spectra(loaded, inputs[last]), measured[-1], policy)
    steps.print(f"\nPicture: {out}")


def _measured(speeds: dict[str, dict[int, Run]], settings: Settings, inputs: dict[Case, dict[str, Any]]) -> list[Speed]:
    """Of the variants that ran so far, by the number of images."""
    return [
        Speed.of({variant: runs[images] for variant, runs in speeds.items()}, images, inputs["read", images])
        for images in settings.images
    ]


def _score(loaded: Loaded, case: Case, questions: list[digits.Question], dense: Run, packed: Run) -> Score:
    def right(run: Run) -> float:
        graded = [digits.score(question, text) for question, text in zip(questions, texts(loaded, run), strict=True)]
        return sum(graded) / len(graded)

    task, images = case
    count = len(questions)
    held = dense.cache_bytes / count, packed.cache_bytes / count
    return Score(task, images, count, right(dense), right(packed), *held)


def _example(loaded: Loaded, case: Case, question: digits.Question, answers: dict[str, dict[Case, Run]]) -> Example:
    """As far as there are answers: the packed ones come after all dense ones, and some time is spent on compiling."""
    dense, packed = (
        texts(loaded, answers[variant][case])[0] if variant in answers else None for variant in (DENSE, PACKED)
    )
    return Example(f"{case[1]} images; {_short(question)}", dense, packed, question.answer)


def _short(question: digits.Question) -> str:
    """The question without the images before it."""
    return question.prompt.rpartition("question : ")[2].removesuffix(" answer :")
