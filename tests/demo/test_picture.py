"""The picture is drawn for few and many images and layers, and every part of it is in it."""

import numpy as np
import pytest
from PIL import Image

from attnpack_cli.errors import UserError
from attnpack_fx.demo import picture
from attnpack_fx.demo.generation import DENSE, INDUCTOR, PACKED
from attnpack_fx.demo.spectra import Spectrum
from attnpack_fx.demo.tables import Speed
from attnpack_fx.policy import PackPolicy


def spectra(layers: int) -> list[Spectrum]:
    decay = [2.0**-number for number in range(20)]
    return [
        Spectrum(layer, part, modality, 40, decay)
        for layer in range(layers)
        for part in ("keys", "values")
        for modality in ("vision", "text")
    ]


def speed(tokens: int) -> Speed:
    held = {
        DENSE: [6_000_000 + 1000 * step for step in range(tokens)],
        INDUCTOR: [6_000_000] * tokens,
        PACKED: [1_000_000] * tokens,
    }
    rates = dict.fromkeys(held, 1.0)
    return Speed(4, 1, 276, tokens, rates, rates, held)


@pytest.fixture
def figures(monkeypatch) -> list:
    """Every figure made."""
    from matplotlib.figure import Figure

    made = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", _noting(made, Figure.savefig))
    return made


def _noting(made, save):
    def noting(figure, *arguments, **options):
        made.append(figure)
        return save(figure, *arguments, **options)

    return noting


@pytest.mark.parametrize(("images", "layers", "tokens"), [(0, 1, 1), (1, 4, 8), (16, 40, 64)])
def test_every_part_is_drawn(tmp_path, figures, images, layers, tokens):
    file = tmp_path / "a.png"
    shown = [Image.new("RGB", (64, 64), (10 * number, 200, 0)) for number in range(images)]
    picture.draw(file, "title", "a $ question", shown, spectra(layers), speed(tokens), PackPolicy(vision_rank=(8, 4)))
    assert np.asarray(Image.open(file).convert("L")).std() > 10
    (figure,) = figures
    axes = figure.get_axes()
    drawn = [panel.images[0].get_array() for panel in axes if panel.images]
    assert [tuple(pixels[0, 0]) for pixels in drawn] == [image.getpixel((0, 0)) for image in shown]
    keys, values = (next(panel for panel in axes if panel.get_title().startswith(part)) for part in ("keys", "values"))
    assert [len(panel.lines) for panel in (keys, values)] == [2 * layers + 1] * 2
    labels = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in (keys, values)]
    assert "vision packed at rank 8" in labels[0] and "vision packed at rank 4" in labels[1]
    memory = next(panel for panel in axes if panel.get_title().startswith("memory"))
    assert len(memory.lines) == 2
    smaller = (6_000_000 + 1000 * (tokens - 1)) / 1_000_000
    assert f"{smaller:.2f}x smaller" in memory.get_legend().get_texts()[1].get_text()


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot write the picture"):
        picture.draw(tmp_path / "missing" / "a.png", "title", "question", [], spectra(1), speed(2), PackPolicy())


def test_long_questions_are_cut():
    assert picture._shortened("a  b\n" * 200) == ("a b " * 200)[:137] + "..."
