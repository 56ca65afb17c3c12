"""Which batch to try next, to find the largest whose memory stays under a cap."""

import math
from collections.abc import Mapping

#: The first batch tried. Not 1, whose sizes are compiled in.
FIRST = 2
_GROWTH = 8


def next_batch(known: Mapping[int, float], cap: float, limit: int) -> int | None:
    """The next batch to try; None when the largest that fits is known to an eighth of itself, or by a straight line.

    known: bytes by batch, of those tried; `math.inf` for one that could not run. More memory for a larger batch is
    taken for granted. cap: in bytes. limit: the largest batch to try.

    The second batch is twice the first; then a straight line through the two largest says which one still fits. What
    lies between one that fits and one that does not is found by where such a line crosses the cap.
    """
    if not known:
        return min(FIRST, limit)
    high = min((batch for batch, held in known.items() if held > cap), default=None)
    fitting = sorted(batch for batch, held in known.items() if held <= cap and (high is None or batch < high))
    if not fitting:
        return None if high == 1 else 1
    low = fitting[-1]
    step = max(1, low // 8)
    if high is not None:
        if high - low <= step:
            return None
        quarter = (high - low) // 4
        crossing = _crossing(known, low, high, cap) if math.isfinite(known[high]) else (low + high) // 2
        return min(max(crossing, low + max(1, quarter)), high - max(1, quarter))
    if low >= limit:
        return None
    if len(fitting) < 2:
        return min(2 * low, limit)
    further = min(_crossing(known, fitting[-2], low, cap), _GROWTH * low, limit)
    return further if further > low else None


def largest(known: Mapping[int, float], cap: float) -> int | None:
    """The largest batch that fits, smaller than any that does not; None where none does."""
    high = min((batch for batch, held in known.items() if held > cap), default=math.inf)
    return max((batch for batch, held in known.items() if held <= cap and batch < high), default=None)


def _crossing(known: Mapping[int, float], first: int, second: int, cap: float) -> int:
    """The largest batch under the cap on the line through two known ones; far away where memory does not grow."""
    slope = (known[second] - known[first]) / (second - first)
    if slope <= 0:
        return _GROWTH * second
    return math.floor(first + (cap - known[first]) / slope)
