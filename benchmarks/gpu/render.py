"""docs/gpu.md: what to run, what it should come to, and the results that are there."""

import textwrap
from pathlib import Path
from string import Template
from typing import Any

from benchmarks import measure
from benchmarks.gpu import predicted, roofline, store
from benchmarks.gpu.parts import PARTS

RESULTS, PAGE = measure.ROOT / "benchmarks" / "results", measure.ROOT / "docs" / "gpu.md"
_NONE = "No GPU results are committed yet"
#: The page without what is computed.
_TEMPLATE = Template(Path(__file__).with_name("page.md").read_text())


def page(results: Path) -> str:
    """The page for every `<device>/<part>.json` of this benchmark below a folder."""
    found: dict[str, dict[str, Any]] = {}
    for device in sorted(path for path in results.iterdir() if path.is_dir()):
        loaded = {part.name: store.load(device / f"{part.name}.json") for part in PARTS}
        parts = {name: content for name, content in loaded.items() if content is not None}
        if parts:
            found[device.name] = parts
    lines: list[str] = []
    for part in PARTS:
        lines += [f"## {part.title}", "", _wrapped(part.about), ""]
        for folder, parts in found.items():
            if part.name in parts:
                lines += [f"### {folder}", "", _wrapped(_origin(parts[part.name])), ""]
                lines += ["**A dry run: the times mean nothing.**", ""] if parts[part.name]["dry"] else []
                shown = parts[part.name]["cases"]
                lines += [*part.table(shown), "", *(f"- {line}" for line in part.verdict(shown)), ""]
    return _TEMPLATE.substitute(
        found="" if found else f"{_NONE}: every time on this page is a prediction.",
        parts=_joined(lines).strip(),
        table="\n".join(predicted.table(results)),
        memory=f"{roofline.MEMORY / 1e12:.1f}",
        l2=f"{roofline.L2 / 1e12:.1f}",
        processors=roofline.PROCESSORS,
        clock=f"{roofline.CLOCK / 1e9:.2f}",
        matrix=f"{roofline.MATRIX / 1e12:.0f}",
        vector=f"{roofline.VECTOR / 1e12:.0f}",
        launch=f"{roofline.LAUNCH * 1e6:.0f}",
    )


def _origin(content: dict[str, Any]) -> str:
    """On what a part was measured, in one paragraph."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items() if number)
    ceilings = content["ceilings"]
    where = f"{content['device']}, {content['memory_bytes'] / 1e9:.0f} GB, driver {content['driver'] or 'unknown'}"
    speed = f"copies {ceilings['copy'] / 1e9:.0f} GB/s, multiplies {ceilings['matmul'] / 1e12:.0f} TFLOP/s in bf16"
    return f"{where}; {speed}. {versions}. Commit {content['commit'] or 'unknown'}."


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _joined(lines: list[str]) -> str:
    """Lines as a text, without doubled empty ones."""
    kept = [line for number, line in enumerate(lines) if line or (number and lines[number - 1])]
    return "\n".join(kept).strip() + "\n"
