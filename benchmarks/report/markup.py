"""HTML from values: text is escaped unless it is `Html`, and numbers are written one way everywhere."""

import html
import math
from collections.abc import Iterable, Sequence

from benchmarks.report.data import Interval

NOTHING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


class Html(str):
    """Text that is HTML already."""


Cell = str | Html


def text(value: Cell) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(name: str, *content: Cell, **attributes: str) -> Html:
    """`<name attributes>content</name>`; an attribute's trailing underscore is dropped, as of `class_`."""
    written = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{''.join(text(each) for each in content)}</{name}>")


def joined(parts: Iterable[Cell]) -> Html:
    return Html("\n".join(text(part) for part in parts))


def table(
    caption: Cell,
    head: Sequence[str],
    bodies: Iterable[tuple[str, Iterable[tuple[str, Sequence[Cell]]]]],
    words: bool = False,
) -> Html:
    """A table that scrolls in a frame of its own where the page is narrow.

    bodies: each a heading, which may be empty, and its rows: a class, which may be empty, and the cells. The first
    cell names the row; the others are aligned as numbers, or, with `words`, as words.
    """
    columns = str(len(head))
    parts = [element("thead", element("tr", *(element("th", name, scope="col") for name in head)))]
    for heading, rows in bodies:
        written = (
            [element("tr", element("th", heading, colspan=columns, scope="rowgroup"), class_="group")]
            if heading
            else []
        )
        for kind, (first, *others) in rows:
            cells = element("th", first, scope="row"), *(element("td", cell) for cell in others)
            written.append(element("tr", *cells, class_=kind) if kind else element("tr", *cells))
        parts.append(element("tbody", *written))
    inner = element("table", element("caption", caption), *parts, **({"class_": "words"} if words else {}))
    # The frame takes focus, so that it can be scrolled with a keyboard.
    return Html(f'<div class="scroll" tabindex="0">{inner}</div>')


def ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{number(value, 2 if abs(value) < 10 else 1)}x"


def share(value: float | None, digits: int = 1) -> str:
    """A share in per cent, without the sign."""
    return NOTHING if value is None else number(100 * value, digits)


def points(value: float | None, digits: int = 2) -> str:
    """A difference of shares in points, with its sign."""
    return NOTHING if value is None else number(100 * value, digits, sign=True)


def interval(found: Interval | None, digits: int = 2) -> str:
    return "" if found is None else f"[{points(found[0], digits)}, {points(found[1], digits)}]"


def with_interval(value: float | None, found: Interval | None) -> str:
    return f"{points(value)} {interval(found)}".strip()


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if round(value, digits) == 0:
        return f"{0:.{digits}f}"
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", _MINUS)


def nats(value: float | None) -> str:
    """A divergence, which is rarely large and often tiny."""
    if value is not None and 0 < value < 5e-5:
        return "< 0.0001"
    return number(value, 4 if value is None or abs(value) < 1 else 2)


def megabytes(value: float | None) -> str:
    return NOTHING if value is None else number(value / 1e6, 3 if value < 1e6 else 2 if value < 1e7 else 1)
