"""The demo on any transformers model: one prompt, with or without images, answered dense and packed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnpack_fx.demo.generation import DENSE, PACKED, Run, compiled, explained, texts, timed, warm_up
from attnpack_fx.demo.load import Loaded, model_inputs
from attnpack_fx.demo.picture import draw
from attnpack_fx.demo.spectra import spectra
from attnpack_fx.demo.tables import Example, Speed, report
from attnpack_fx.policy import PackPolicy

if TYPE_CHECKING:
    from PIL.Image import Image
    from tqdm import tqdm


def run(
    loaded: Loaded,
    prompt: str,
    images: Sequence["Image"],
    max_new_tokens: int,
    policy: PackPolicy,
    out: Path,
    progress: "tqdm",
) -> str:
    """Answer, measure, draw to `out`; returns what to print."""
    inputs = model_inputs(loaded, prompt, images)
    runs: dict[str, Run] = {}
    progress.total = 6
    for variant in (DENSE, PACKED):
        with compiled(loaded.model, variant, policy):
            progress.set_description_str(f"{variant}: warming up")
            warm_up(loaded, inputs)
            progress.update()
            progress.set_description_str(f"{variant}: answering")
            runs[variant] = timed(loaded, inputs, max_new_tokens)
            progress.update()
    progress.set_description_str("explain")
    found = explained(loaded, inputs, policy)
    progress.update()
    progress.set_description_str("singular values, picture")
    speed = Speed.of(runs, len(images), inputs)
    draw(out, f"{Path(loaded.name).name}: the packed cache", prompt, images, spectra(loaded, inputs), speed, policy)
    progress.update()
    dense, packed = (texts(loaded, runs[variant])[0] for variant in (DENSE, PACKED))
    return report([Example(prompt, dense, packed)], [], [speed], found, out)
