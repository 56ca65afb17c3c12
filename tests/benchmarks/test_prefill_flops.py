"""Operations of prefill: the count is the closed form, and published totals are those of the formula."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from attnpack_fx.passes.asap import ASAP
from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.pool import Pool
from attnpack_fx.passes.random_prune import RandomPrune
from benchmarks import prefill_flops

TINY = prefill_flops.Shape("tiny", 3, 32 * 16, 32 * 24, 32 * 2, 24)
METHODS = (FastV(1, ratio=0.25), ASAP(2, keep=7), RandomPrune(1), Pool(2, window=5))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_rewritten_graph_runs_what_the_closed_form_says(method):
    result = prefill_flops.run(TINY, method, 0.5)  # raises where they differ
    small = TINY.scaled(prefill_flops.SCALE)
    assert result["counted"] == prefill_flops.closed_form(small, method)
    assert result["counted_dense"] == prefill_flops.closed_form(small, None)
    assert result["kept"] == {"FastV": 18, "ASAP": 7, "RandomPrune": 12, "Pool": 5}[method.name]


def test_published_totals_are_those_of_the_formula():
    totals = {3.817: (prefill_flops.LLAVA, 576), 20.825: (prefill_flops.NEXT, 2880)}
    for total, (shape, vision) in totals.items():
        assert round(prefill_flops.papers_formula(shape, vision) / 1e12, 3) == total


def test_a_count_that_is_not_the_closed_form_is_refused(monkeypatch):
    monkeypatch.setattr(prefill_flops, "own", lambda shape, method: 1)
    with pytest.raises(RuntimeError, match="tiny, Pool: counted"):
        prefill_flops.run(TINY, METHODS[3], None)


def test_rows_are_written_and_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prefill_flops, "ROWS", ((TINY, METHODS[0], 0.57),))
    file = tmp_path / "flops.json"
    prefill_flops.main(["--out", str(file)])
    written = json.loads(file.read_text())
    assert {"versions", "cpu", "commit", "scale"} <= written.keys()
    (row,) = written["prefill_flops"]
    assert row["paper"] == 0.57 and row["counted_share"] == row["counted"] / row["counted_dense"]
    assert "18 / 24" in capsys.readouterr().out
