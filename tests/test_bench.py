"""`attnpack bench`: what it starts, what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import benchmarks.__main__ as benchmarks
from attnpack_cli import bench
from attnpack_cli import main as cli


def test_the_rest_of_the_line_is_the_part_s(monkeypatch):
    started = []

    def run(command, env, check):
        started.append((command[1:], env["PYTHONPATH"].split(":")[0]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert cli.main(["bench", "quality", "--quick", "--model", "digits-llava"]) == 0
    root = str(Path(bench.__file__).parents[1])
    assert started == [(["-m", "benchmarks", "quality", "--quick", "--model", "digits-llava"], root)]


def test_a_failing_part_is_the_exit_code(monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", lambda command, env, check: subprocess.CompletedProcess(command, 3))
    assert cli.main(["bench", "speed"]) == 3


def test_without_a_clone_it_says_where_it_looked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages" / "attnpack_fx" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "report"]) == 2
    assert str(tmp_path) in (said := capsys.readouterr().err) and "clone" in said


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "taste"])
    assert "quality" in capsys.readouterr().err


def test_all_parts_run_in_turn_with_the_same_amount(monkeypatch, tmp_path):
    ran = []
    for name in benchmarks._RUN:
        monkeypatch.setitem(benchmarks._RUN, name, lambda given, rest, name=name: ran.append((name, given, rest)))
    benchmarks.main(["all", "--quick", "--out", str(tmp_path), "--threads", "1"])
    assert [name for name, _, _ in ran] == ["quality", "memory", "speed", "report"]
    assert all(given.out == tmp_path and benchmarks._amount(given) == ["--quick", "--threads=1"] for _, given, _ in ran)
    with pytest.raises(SystemExit):
        benchmarks.main(["all", "--cap", "3"])
    benchmarks.main(["speed", "--full", "--cap", "3"])
    name, given, rest = ran[-1]
    assert name == "speed" and rest == ["--cap", "3"] and benchmarks._amount(given) == ["--full"]
    # What a quick run measures does not go among what is committed.
    benchmarks.main(["memory", "--quick"])
    assert ran[-1][1].out == ran[-1][1].page == Path("evaluation-quick")
    benchmarks.main(["report"])
    assert ran[-1][1].page == benchmarks.REPORT and ran[-1][1].out == benchmarks.results_file.FOLDER
