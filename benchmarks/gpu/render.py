"""docs/gpu.md, from the results that are there."""

import textwrap
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.gpu import store
from benchmarks.gpu.parts import PARTS

RESULTS, PAGE = measure.ROOT / "benchmarks" / "results", measure.ROOT / "docs" / "gpu.md"
_NONE = "No GPU results are committed yet"


def page(results: Path) -> str:
    """The page for every `<device>/<part>.json` of this benchmark below a folder."""
    found: dict[str, dict[str, Any]] = {}
    for device in sorted(path for path in results.iterdir() if path.is_dir()):
        loaded = {part.name: store.load(device / f"{part.name}.json") for part in PARTS}
        parts = {name: content for name, content in loaded.items() if content is not None}
        if parts:
            found[device.name] = parts
    lines = [
        "# On a GPU",
        "",
        "Written by `python -m benchmarks.gpu --render`; edit `benchmarks/gpu/`, not this page. To measure, on a",
        "machine with a CUDA device:",
        "",
        "    python -m benchmarks.gpu                           # every part, up to 8 minutes each",
        "    python -m benchmarks.gpu --part attention          # one part; again, it goes on where it ended",
        "    python -m benchmarks.gpu --part decode --only 7B   # only the cases with that in their name",
        "    python -m benchmarks.gpu --dry --out DIR           # the same code, tiny, on a CPU; times mean nothing",
        "",
        "Results go to `benchmarks/results/<device>/<part>.json`, with device, driver, versions, commit and ceilings.",
        "",
    ]
    if not found:
        lines += [f"{_NONE}; run `python -m benchmarks.gpu` on one. It measures:", ""]
    for part in PARTS:
        lines += [f"## {part.title}", "", _wrapped(part.about), ""]
        for folder, parts in found.items():
            if part.name in parts:
                lines += [f"### {folder}", "", _wrapped(_origin(parts[part.name])), ""]
                lines += ["**A dry run: the times mean nothing.**", ""] if parts[part.name]["dry"] else []
                shown = parts[part.name]["cases"]
                lines += [*part.table(shown), "", *(f"- {line}" for line in part.verdict(shown)), ""]
    return _joined(lines)


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
