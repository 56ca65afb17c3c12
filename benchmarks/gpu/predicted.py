"""The table of predicted times, and beside them what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import store
from benchmarks.gpu.layers import MODELS, SHAPES, Layout
from benchmarks.gpu.part import markdown
from benchmarks.gpu.roofline import SETTINGS, predict

#: The device that is predicted; what others measured does not stand beside it.
DEVICE = "H200"
HEADER = (
    *("model", "B", "T", "stored", "kernels", "MB read", "predicted us", "bound by", "dense us", "ratio"),
    *("measured us", "measured/predicted"),
)
_WORDS = ("stored", "kernels", "bound by")


def table(results: Path) -> list[str]:
    """Every shape with every way to store it, and what files below a folder hold of it."""
    found = measurements(results)
    rows = []
    for layout, batch, tokens in SHAPES:
        model = next(name for name, other in MODELS.items() if other == layout)
        for setting in SETTINGS:
            expected = predict(layout, batch, tokens, setting)
            seconds = measured(found, layout, batch, tokens, setting)
            beside = ("-", "-") if seconds is None else (f"{seconds * 1e6:.1f}", f"{seconds / expected.seconds:.2f}")
            rows.append(
                (
                    *(model, f"{batch}", f"{tokens}", setting, " + ".join(expected.kernels)),
                    *(f"{expected.nbytes / 1e6:.1f}", f"{expected.seconds * 1e6:.1f}", expected.bound),
                    *(f"{expected.dense_seconds * 1e6:.1f}", f"{expected.ratio:.2f}x", *beside),
                )
            )
    return markdown(HEADER, rows, _WORDS)


def measurements(results: Path) -> dict[str, Mapping[str, Any]]:
    """The cases of the parts that measure attention, on the device that is predicted; none of a dry run."""
    found: dict[str, Mapping[str, Any]] = {}
    for part in ("attention", "codes"):
        for file in sorted(results.glob(f"*/{part}.json")):
            content = store.load(file)
            if content is not None and not content["dry"] and DEVICE in content["device"]:
                found[part] = content["cases"]
    return found


def measured(
    found: Mapping[str, Mapping[str, Any]], layout: Layout, batch: int, tokens: int, setting: str
) -> float | None:
    """Seconds, or None where there are none."""
    part, group, row = _PLACES[setting]
    case = found.get(part, {}).get(f"{layout.name} B={batch} T={tokens}", {})
    times = case.get(group, {}).get(row, {})
    return times.get("packed", times).get("seconds")  # type: ignore[no-any-return]


#: Part, group of a case, and row in it, where a setting is measured.
_PLACES = {
    "rotated, 64": ("attention", "ranks", "64"),
    "default, 32 and 64": ("attention", "unrotated", "32"),
    "un-rotated, 64": ("attention", "unrotated", "64"),
    "rotated, 64, 4 bits": ("codes", "stored", "factors, 4 bits"),
}
