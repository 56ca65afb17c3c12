"""The benchmark of un-rotated keys at its smallest: what it writes, and that results are compared first."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import measure, unrotated

TINY = ["--batch", "2", "--tokens", "144", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--rounds", "2"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contender_is_measured_and_compared(tmp_path, dtype, capsys):
    file = tmp_path / "result.json"
    unrotated.main([*TINY, "--dtype", dtype, "--out", str(file)])
    written = json.loads(file.read_text())
    assert written["versions"]["torch"] == torch.__version__ and {"cpu", "commit", "threads"} <= written.keys()
    (result,) = written["unrotated"]
    assert result["seconds"].keys() == result["error"].keys() == set(unrotated.CONTENDERS)
    for name, seconds in result["seconds"].items():
        assert len(seconds["samples"]) == 2
        assert result["speedup"][name] == pytest.approx(result["seconds"]["dense"]["median"] / seconds["median"])
    assert "B=2 T=144 H=4/2" in capsys.readouterr().out


def test_unlike_results_are_refused(monkeypatch):
    monkeypatch.setattr(measure, "TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(RuntimeError, match="dense differs from dense attention"):
        unrotated.run(unrotated.Case(1, 144, heads=2, kv_heads=2, head_dim=16), rounds=1)


def test_flags_that_make_no_sense_are_refused(capsys):
    with pytest.raises(SystemExit):
        unrotated.parse(["--heads", "6", "--kv-heads", "4"])
    assert "expected a divisor" in capsys.readouterr().err


def test_the_default_cases_cover_groups_and_dtypes():
    cases = unrotated.cases(unrotated.parse([]))
    shapes = {(case.dtype, case.kv_heads) for case in cases}
    assert shapes == {(dtype, heads) for dtype in unrotated.DTYPES.values() for heads in (8, 32)}
