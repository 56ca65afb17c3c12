"""The demo on the trained model: questions about held-out images of handwritten digits, answered dense and packed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attnpack_fx.demo.errors import require
from attnpack_fx.demo.generation import DENSE, INDUCTOR, PACKED, Run, compiled, decode, timed, warmed
from attnpack_fx.demo.load import Loaded, batch_inputs, load, trained_model
from attnpack_fx.demo.picture import draw
from attnpack_fx.demo.spectra import spectra
from attnpack_fx.demo.tables import VARIANTS, Example, Score, Speed, examples_text, layers_table, scores_table, speed_table
from attnpack_fx.policy import PackPolicy

_ANSWER_TOKENS = 9
_SEED = 0


@dataclass(frozen=True)
class Settings:
    """questions: per task and number of images, answered as one batch. new_tokens: of the speed runs.
    inductor: whether to measure plain Inductor as well."""

    images: tuple[int, ...] = (1, 4, 16)
    questions: int = 8
    new_tokens: int = 64
    inductor: bool = True


QUICK = Settings(images=(4,), questions=4, new_tokens=16, inductor=False)
