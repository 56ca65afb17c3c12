"""Throughput under a cap: the search, what a run keeps, what points hold. Nothing here is timed."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from attnpack_fx import cache_bytes, hf
from benchmarks.child import in_child
from benchmarks.speed import command, contenders, point, search, summary
from benchmarks.speed.case import FULL, QUICK, Case

TINY = Case(hidden=64, mlp=96, heads=2, head_dim=32, layers=2, tokens=96, text=8, dtype="float32", steps=2)


def found(cost, cap: float, limit: int = 512) -> tuple[int | None, list[int]]:
    """The largest batch the search settles on, and all it tried."""
    known: dict[int, float] = {}
    while (batch := search.next_batch(known, cap, limit)) is not None:
        assert batch not in known and 1 <= batch <= limit
        known[batch] = cost(batch)
    return search.largest(known, cap), list(known)


@pytest.mark.parametrize(
    "cost",
    [
        lambda b: 7 * b,
        lambda b: 300 + 2 * b,
        lambda b: 5 * b**1.3,
        lambda b: 100 * math.ceil(b / 16),
        lambda b: b + 900,
    ],
)
@pytest.mark.parametrize("cap", [9, 100, 1000, 1234, 5000])
def test_the_largest_batch_that_fits_is_found_to_an_eighth(cost, cap):
    best, tried = found(cost, cap)
    truth = max((batch for batch in range(1, 513) if cost(batch) <= cap), default=None)
    if truth is None:
        assert best is None
    else:
        assert best is not None and cost(best) <= cap and truth - best < max(1, truth / 8 + 1)
    assert len(tried) <= 14 and sum(cost(batch) > cap for batch in tried) <= 6


def test_a_batch_that_cannot_run_does_not_fit():
    best, tried = found(lambda batch: batch if batch < 11 else math.inf, 1000)
    assert best == 10 and 11 in tried
    assert found(lambda batch: math.inf, 1000) == (None, [2, 1])


def test_memory_that_does_not_grow_ends_at_the_limit():
    assert found(lambda batch: 10, 20, limit=64)[0] == 64


@pytest.fixture
def measured(monkeypatch):
    """Made-up points instead of processes; quanto is missing. A list of those asked for."""
    asked: list[tuple[str, int]] = []

    def fake(function, name, batch, case, threads):
        assert function is point.run
        asked.append((name, batch))
        if name.startswith("quanto"):
            return {"skipped": "no quanto"}
        bytes_each, seconds = (40 << 20, 2.0) if name.startswith("static") else (5 << 20, 1.0)
        held = {"cache_bytes": batch, "peak_bytes": batch * bytes_each, "timed_peak_bytes": batch * bytes_each}
        return {**held, "samples": [seconds] * case.steps}

    monkeypatch.setattr(command, "in_child", fake)
    return asked


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, measured, monkeypatch, capsys):
    out = tmp_path / "speed.json"
    arguments = ["--quick", "--out", str(out), "--cap", "200"]
    fake = command.in_child

    def interrupted(*given, **named):
        if len(measured) == 5:
            raise KeyboardInterrupt
        return fake(*given, **named)

    monkeypatch.setattr(command, "in_child", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    begun = json.loads(out.read_text())
    assert {"versions", "cpu", "commit", "threads"} <= begun.keys() and len(begun["rows"]) == 5
    monkeypatch.setattr(command, "in_child", fake)
    before = list(measured)
    command.main(arguments)
    ended = json.loads(out.read_text())
    worked = [row for row in ended["rows"] if "skipped" not in row]
    assert len(set(before)) == len(before)
    again = [each for each in measured[5:] if each in before and not each[0].startswith("quanto")]
    largest = {(name, of["batch"]) for name, of in ended["summary"]["best"].items()}
    assert set(again) <= largest  # only to be timed in turn

    assert {name: of["batch"] for name, of in ended["summary"]["best"].items()} == {
        "static, Inductor": 4,
        "ours, rank 64 rotated": 38,
    }
    assert ended["summary"]["ratio_to_dense"] == pytest.approx(38 / (4 / 2)) and ended["summary"]["skipped"]
    assert ended["summary"]["ratio_to_quantised"] is None
    for row in worked:
        timed = (row["contender"], row["batch"]) in largest
        assert len(row["samples"]) == QUICK.steps * (1 + QUICK.rounds * timed)
        assert row["fits"] == (row["peak_bytes"] <= row["cap_bytes"] == 200 * 10**6)
    text = capsys.readouterr().out
    assert "static, Inductor: 19.00x" in text and "skipped: no quanto" in text

    count = len(measured)
    command.main(arguments)
    assert [name for name, _ in measured[count:]] == ["quanto 4 bit"]  # It might be installed now.
    with pytest.raises(ValueError, match=r"cap_bytes.*give another --out"):
        command.main([*arguments[:-1], "300"])


def test_arguments():
    quick, full = command.parse(["--quick"]), command.parse(["--full", "--threads", "1", "--dtype", "float32"])
    assert quick.case == QUICK and quick.contenders == contenders.FEW and quick.out is None
    assert full.case == replace(FULL, dtype="float32") and full.contenders == tuple(contenders.CONTENDERS)
    with pytest.raises(SystemExit):
        command.parse(["--cap", "0"])
    assert {contenders.CONTENDERS[name].kind for name in contenders.FEW} == {"dense", "quantised", "ours"}


def test_failed_points_are_said(measured):
    rows = [{"contender": "fp8", "kind": "quantised", "batch": 1, "cap_bytes": 9, "failed": "killed", "fits": False}]
    assert summary.summarised(rows)["best"] == {} and "no batch fits: killed" in summary.table(rows, TINY)


def test_a_point_runs_in_a_process_of_its_own():
    row = in_child(point.run, "dense, eager", 3, TINY, threads=1)
    # Keys and values of two layers, of the prompt and of 3 + 1 + 2 + 1 + 2 steps.
    assert "failed" not in row, row
    assert row["cache_bytes"] == 2 * 2 * 3 * 2 * 32 * (96 + 9) * 4
    assert len(row["samples"]) == TINY.steps and row["peak_bytes"] < 50e6
    failed = in_child(point.run, "dense, eager", 3, replace(TINY, tokens=-1), threads=1)
    assert "RuntimeError" in failed["failed"]


@torch.no_grad()
def test_our_cache_is_the_dense_one_packed_and_repeated(without_inductor, monkeypatch):
    monkeypatch.setattr(contenders, "_CONTENT_RANK", 8)
    token = torch.ones(3, 1, dtype=torch.int64)
    logits = {}
    for name in ("dense, eager", "ours, rank 16 un-rotated"):
        model, contender = contenders.model_of(TINY), contenders.CONTENDERS[name]
        cache = contender.cache(model, TINY, 3)
        contender.compiles(model)
        logits[name] = model(input_ids=token, use_cache=True, **hf.cache_argument(cache)).logits
    dense, ours = logits.values()
    assert torch.allclose(ours, dense, atol=1e-4 * float(dense.abs().max()))
    assert cache_bytes(cache) < 2 * 2 * 3 * 2 * 32 * 97 * 4
    weights = {weight.data_ptr() for layer in model.model.layers for weight in layer.parameters()}
    assert len(weights) == len(list(model.model.layers[0].parameters()))  # in memory once
