"""The acceptance grid: what a user runs, on real models and through Inductor.

Cells outside `fast()` are marked `slow`. `python -m tests.acceptance` runs all of the grid, of which these are those
that `tested()` takes in turn, and prints a table. Compiled kernels are kept in Inductor's own cache folder
(`TORCHINDUCTOR_CACHE_DIR`), which processes share: a family's vision encoder is compiled once.
"""

import pytest

from tests.acceptance.cells import problems, run
from tests.acceptance.settings import fast, tested

_FAST = set(fast())


@pytest.mark.parametrize(
    ("family", "setting"),
    [pytest.param(*cell, marks=() if cell in _FAST else pytest.mark.slow, id=", ".join(cell)) for cell in tested()],
)
def test_cell(family: str, setting: str) -> None:
    assert problems(run(family, setting)) == []
