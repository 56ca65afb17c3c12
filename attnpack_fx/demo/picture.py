"""The demo's picture: images of a prompt, singular values of its cache, the cache's size over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnpack_cli.errors import UserError
from attnpack_fx.demo.generation import DENSE, PACKED
from attnpack_fx.demo.spectra import Spectrum
from attnpack_fx.demo.tables import Speed, ratio
from attnpack_fx.passes.storage import KeySpace
from attnpack_fx.policy import PackPolicy
from attnpack_fx.ranks import parts

if TYPE_CHECKING:
    from PIL.Image import Image

_ROW = 8
_FLOOR = 1e-4
_COLOURS = {DENSE: "tab:gray", PACKED: "tab:blue"}
_STYLES = {"vision": "-", "text": ":"}


def draw(
    file: Path,
    title: str,
    question: str,
    images: Sequence["Image"],
    spectra: Sequence[Spectrum],
    speed: Speed,
    policy: PackPolicy,
) -> None:
    """Write the picture to `file`, in the format its name ends in.

    question: shown above `images`. speed: whose `held` is drawn. policy: its ranks are marked among the
    singular values.

    Raises `UserError` when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(images) // _ROW)
    heights = [0.95 * rows + 0.3, 3.4, 2.9]
    figure = Figure(figsize=(11, sum(heights) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    parts: Any = figure.subfigures(3, 1, height_ratios=heights, hspace=0.04)
    top, middle, bottom = parts
    _images(top, question, images)
    _spectra(middle, spectra, policy)
    _memory(bottom.subplots(), speed)
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {file}: cannot write the picture: {error}") from error


def _images(figure: Any, question: str, images: Sequence["Image"]) -> None:
    figure.suptitle(_shortened(question), fontsize=10)
    if not images:
        return
    columns = min(len(images), _ROW)
    panels = list(figure.subplots(-(-len(images) // columns), columns, squeeze=False).flat)
    for panel in panels:
        panel.axis("off")
    for number, (panel, image) in enumerate(zip(panels, images, strict=False), 1):
        panel.imshow(image)
        panel.set_title(f"#{number}", fontsize=8, pad=2)


def _spectra(figure: Any, spectra: Sequence[Spectrum], policy: PackPolicy) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    figure.suptitle("singular values of the cache after prefill, relative to the largest", fontsize=11)
    layers = max((spectrum.layer for spectrum in spectra), default=0) + 1
    colours = colormaps["viridis"].resampled(layers)
    shade = ScalarMappable(Normalize(-0.5, layers - 0.5), colours)
    panels = figure.subplots(1, 2, sharey=True)
    space: KeySpace = "rotated" if policy.key_space == "rotated" else "unrotated"
    for place, (panel, part) in enumerate(zip(panels, ("keys", "values"), strict=True)):
        shown = {}
        for spectrum in spectra:
            if spectrum.part == part:
                numbers = range(1, len(spectrum.values) + 1)
                heights = [max(value, _FLOOR / 10) for value in spectrum.values]
                panel.plot(numbers, heights, _STYLES[spectrum.modality], color=colours(spectrum.layer), lw=1.4)
                shown[spectrum.modality] = spectrum.tokens
        marks = [
            Line2D([], [], color="black", ls=_STYLES[name], label=f"{name} ({count:,} tokens)")
            for name, count in shown.items()
        ]
        for modality, spec in (("vision", policy.vision_rank), ("text", policy.text_rank)):
            rank = parts(spec, space)[place] if spec is not None else None
            if isinstance(rank, int) and modality in shown:
                colour = "tab:red" if modality == "vision" else "tab:orange"
                marks.append(
                    panel.axvline(rank, color=colour, ls="--", lw=1, label=f"{modality} packed at rank {rank}")
                )
        panel.set(
            yscale="log",
            ylim=(_FLOOR, 1.5),
            xlabel="singular value number",
            title=f"{part}, [tokens, heads x head size]",
        )
        panel.title.set_fontsize(10)
        panel.grid(alpha=0.3)
        if marks:
            panel.legend(handles=marks, fontsize=8, loc="upper right")
    panels[0].set_ylabel("singular value / largest")
    bar = figure.colorbar(shade, ax=list(panels), label="layer", pad=0.01)
    step = max(1, layers // 8)
    bar.set_ticks(range(0, layers, step), labels=[str(layer) for layer in range(0, layers, step)])


def _memory(panel: Any, speed: Speed) -> None:
    largest = max(max(held) for held in speed.held.values())
    unit, scale = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6) if largest >= 1e6 else ("kB", 1e3)
    final = {variant: held[-1] for variant, held in speed.held.items() if variant in _COLOURS}
    for variant in final:
        held = speed.held[variant]
        smaller = "" if variant == DENSE else f", {ratio(final[DENSE], final[variant])} smaller at the end"
        label = f"{variant}: {final[variant] / scale:.3g} {unit}{smaller}"
        panel.plot(
            range(1, len(held) + 1),
            [count / scale for count in held],
            color=_COLOURS[variant],
            lw=2,
            label=label,
        )
        panel.fill_between(
            range(1, len(held) + 1), [count / scale for count in held], color=_COLOURS[variant], alpha=0.12
        )
    prompts = "one prompt" if speed.batch == 1 else f"{speed.batch} prompts at once"
    panel.set_title(
        f"memory of the cache while generating ({prompts}, {speed.prompt_tokens:,} tokens each)", fontsize=11
    )
    panel.set(
        xlabel="generated tokens",
        ylabel=f"cache, {unit}",
        xlim=(1, max(speed.new_tokens, 2)),
        ylim=(0, 1.35 * largest / scale),
    )
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    panel.legend(loc="upper right", fontsize=9, ncols=2)


def _shortened(text: str, limit: int = 140) -> str:
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
