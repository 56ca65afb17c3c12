"""Selective reading at its smallest: what it writes, bytes that are those of the tokens read, right results."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import measure, selective

TOKENS = 192
ROWS = selective.Case(TOKENS, 2, torch.float32, None, heads=4, head_dim=16)
FACTORS = selective.Case(TOKENS, 2, torch.float32, 8, heads=4, head_dim=16)


@pytest.fixture(scope="module", params=[ROWS, FACTORS], ids=["rows", "factors"])
def result(request):
    return selective.run(request.param, rounds=1)


def test_fewer_bytes_are_read_the_smaller_the_core(result):
    read = {name: each["bytes_read"] for name, each in result["contenders"].items()}
    for every in ("K = 3", "never"):
        ordered = [read[f"A-VL core {core}, {every}"] for core in (0.1, 0.2, 0.4, 0.5)]
        assert ordered == sorted(ordered) and ordered[-1] < read["dense"]
    assert read["H2O 0.2"] < read["H2O 0.5"] < read["dense"]


def test_bytes_are_those_of_the_tokens_read():
    found = selective.run(ROWS, rounds=1)["contenders"]
    token = 2 * 2 * 16 * 4
    # The mean over steps: text and appended tokens, and of 64 vision tokens the core, rounded up.
    appended = sum(range(1, selective.STEPS + 1)) / selective.STEPS
    assert found["A-VL core 0.4, never"]["bytes_read"] == token * (selective.TEXT + 26 + appended)
    reread = sum(step % 3 == 0 for step in range(1, selective.STEPS + 1)) / selective.STEPS
    tokens = selective.TEXT + 26 + appended + reread * (32 - 26)
    assert found["A-VL core 0.4, K = 3"]["bytes_read"] == pytest.approx(token * tokens)
    # Written before it is read, the newest token counts.
    assert found["dense"]["bytes_read"] == token * (TOKENS + appended)


def test_every_contender_is_timed_with_its_upkeep(result):
    assert result["contenders"].keys() == {"dense", *selective.METHODS}
    for name, each in result["contenders"].items():
        seconds = each["seconds"]
        assert min(seconds["append"], seconds["attention"]) > 0 and (seconds["upkeep"] > 0) == (name != "dense")
        assert len(each["samples"]) == 1
        assert each["samples"][0] == pytest.approx(sum(seconds[part] for part in ("append", "attention", "upkeep")))
        assert each["of_dense"]["bytes_read"] <= 1


def test_a_wrong_result_is_refused(monkeypatch):
    monkeypatch.setattr(measure, "TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(RuntimeError, match="attention over stored tokens differs"):
        selective.run(ROWS, rounds=1)


def test_it_is_written_and_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(selective, "cases", lambda tokens, dtypes: [ROWS])
    monkeypatch.setattr(measure, "restart_with_malloc_settings", lambda: None)
    file = tmp_path / "selective.json"
    selective.main(["--rounds", "1", "--note", "shared", "--out", str(file)])
    written = json.loads(file.read_text())
    assert written["note"] == "shared" and written["versions"]["torch"] == torch.__version__
    assert written["selective"][0]["tokens"] == TOKENS and written["selective"][0]["dtype"] == "float32"
    assert "A-VL core 0.1, never" in capsys.readouterr().out


def test_cases_are_all_there():
    found = selective.cases([2048], ["fp32", "bf16"])
    assert len({*found}) == len(found) == 8 and {case.rank for case in found} == {None, selective.RANK}
