"""The demo on any transformers model: one prompt, with or without images, answered dense and packed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnpack_fx.demo.generation import DENSE, PACKED, Run, compiled, explained, timed, warm_up
from attnpack_fx.demo.load import Loaded, model_inputs
from attnpack_fx.demo.picture import draw
from attnpack_fx.demo.printed import Printed
from attnpack_fx.demo.spectra import spectra
from attnpack_fx.demo.steps import Steps
from attnpack_fx.demo.tables import Speed, found_text, section, speed_text
from attnpack_fx.policy import PackPolicy

if TYPE_CHECKING:
    from PIL.Image import Image


def run(
    loaded: Loaded,
    prompt: str,
    images: Sequence["Image"],
    max_new_tokens: int,
    policy: PackPolicy,
    out: Path,
    steps: Steps,
) -> None:
    """Answer, measure, draw to `out`; print each answer as its tokens come, each table as it is there."""
    inputs = model_inputs(loaded, prompt, images)
    runs: dict[str, Run] = {}
    steps.expect(6)
    steps.print(section("Answers", f"  question  {prompt}"))
    for variant, label in ((DENSE, "dense"), (PACKED, "packed")):
        with compiled(loaded.model, variant, policy):
            steps.begin(f"{variant}: warming up")
            warm_up(loaded, inputs)
            steps.begin(f"{variant}: answering")
            with steps.aside():
                print(f"  {label:<10}", end="", flush=True)
                runs[variant] = timed(loaded, inputs, max_new_tokens, printed=Printed(loaded.tokenizer))
                print()
    speed = Speed.of(runs, len(images), inputs)
    steps.print(f"\n{speed_text([speed])}")
    steps.begin("explain")
    found = explained(loaded, inputs, policy)
    steps.print(f"\n{found_text(found)}")
    steps.begin("singular values, picture")
    draw(out, f"{Path(loaded.name).name}: the packed cache", prompt, images, spectra(loaded, inputs), speed, policy)
    steps.print(f"\nPicture: {out}")
