"""The command line: read what there is, draw, and write the page, its figures and the table."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import measure, results_file
from benchmarks.report import curves, drawing
from benchmarks.report.accuracy import accuracy
from benchmarks.report.data import Results, load
from benchmarks.report.markdown import markdown
from benchmarks.report.markup import Html
from benchmarks.report.page import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Where the committed report lies.
FOLDER = measure.ROOT / "docs" / "evaluation"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="attnpack bench report", description="Write one HTML page, figures and a Markdown table from result files."
    )
    parser.add_argument("--results", type=Path, default=results_file.FOLDER, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER")
    given = parser.parse_args(arguments)
    try:
        results = load(given.results)
        written = write(results, given.out)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    for what in results.missing.values():
        print(f"{what}: not measured")
    for file in written:
        print(file)


def write(results: Results, out: Path) -> list[Path]:
    """Files of the report in `out`, in place of earlier ones. Figures that nothing was measured for are not written."""
    figures = drawn(results)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "index.html", out / "table.md"]
    embedded = {name: Html(drawing.svg(figure, _slug(name), name)) for name, figure in figures.items()}
    written[0].write_text(page(results, embedded))
    written[1].write_text(markdown(results))
    if results.qualities:
        figures["accuracy"] = accuracy(results.qualities)  # all models side by side, which on the page have one each
    for name, figure in figures.items():
        written.append(out / f"{_slug(name)}.png")
        drawing.save_png(figure, written[-1])
    return written


def drawn(results: Results) -> dict[str, "Figure"]:
    """Figures of the page by name."""
    figures = {f"accuracy {quality.model}": accuracy([quality]) for quality in results.qualities}
    figures |= {f"spectra {quality.model}": curves.spectra(quality) for quality in results.qualities if quality.spectra}
    if results.speed is not None:
        figures["throughput"] = curves.throughput(results.speed)
    if results.long is not None:
        figures["memory"] = curves.memory(results.long)
    return figures


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
