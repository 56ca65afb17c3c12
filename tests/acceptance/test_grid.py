"""Every cell of the acceptance grid: what a user runs, on real models and through Inductor.

Cells outside `fast()` are marked `slow`. `python -m tests.acceptance` runs the same cells and prints a table. Compiled
kernels are kept in Inductor's own cache folder (`TORCHINDUCTOR_CACHE_DIR`), which processes share: a family's vision
encoder is compiled once.
"""

import pytest

from tests.acceptance.cells import problems, run
from tests.acceptance.settings import GRID, fast

_FAST = set(fast())


@pytest.mark.parametrize(
    ("family", "setting"),
    [pytest.param(*cell, marks=() if cell in _FAST else pytest.mark.slow, id=", ".join(cell)) for cell in GRID],
)
def test_cell(family: str, setting: str) -> None:
    assert problems(run(family, setting)) == []
