"""The decode benchmark at its smallest: what it writes, and that it compares like with like."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import DynamicCache

from attnpack_fx import PackPolicy, pack_cache
from benchmarks import attention_step, decode, end_to_end, measure

ATTENTION = attention_step.Case(batch=2, tokens=96, heads=4, kv_heads=2, head_dim=16, rank=(8, 6))
DECODER = end_to_end.Case(batch=2, tokens=96, heads=4, kv_heads=2, head_dim=16, rank="full", hidden=64, mlp=128)
EXACT = {"static, Inductor", "dense, Inductor", "dense, eager", "attnpack"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What `decode.py --quick --json FILE` writes."""
    file = tmp_path_factory.mktemp("decode") / "result.json"
    decode.main(["--quick", "--dtype", "fp32", "--json", str(file)])
    return json.loads(file.read_text())


@pytest.mark.slow
def test_the_record_says_on_what_it_was_measured(written):
    assert written["versions"]["torch"] == torch.__version__
    assert written["threads"] == torch.get_num_threads()
    assert {"cpu", "commit", "malloc"} <= written.keys()


@pytest.mark.slow
def test_every_sample_of_every_contender_is_written(written):
    (attention,), (decoder,) = written["attention"], written["end_to_end"]
    assert attention["seconds"].keys() == {"dense", "packed", "decompressed"}
    assert decoder["seconds"].keys() >= EXACT
    assert decoder["seconds"].keys() == decoder["bytes"].keys() == decoder["error"].keys()
    for seconds in (*attention["seconds"].values(), *decoder["seconds"].values()):
        assert len(seconds["samples"]) == 2
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]


@pytest.mark.slow
def test_ratios_are_those_of_the_medians(written):
    (attention,), (decoder,) = written["attention"], written["end_to_end"]
    median = {name: seconds["median"] for name, seconds in attention["seconds"].items()}
    assert attention["speedup"] == pytest.approx(median["dense"] / median["packed"])
    median = {name: seconds["median"] for name, seconds in decoder["seconds"].items()}
    dense = min(median[name] for name in EXACT - {"attnpack"})
    assert decoder["speedup"] == pytest.approx(dense / median["attnpack"])
    assert decoder["tokens_per_second"]["attnpack"] == pytest.approx(2 / median["attnpack"])


@pytest.mark.slow
def test_nothing_is_compiled_while_the_clock_runs(written):
    assert written["end_to_end"][0]["graphs_compiled_while_timed"] == 0


@pytest.mark.slow
def test_a_quantized_cache_that_does_not_run_is_named(written):
    (decoder,) = written["end_to_end"]
    quantized = {"fp8, eager", "fp8, Inductor", "quanto 4 bit, eager", "hqq 4 bit, eager"}
    assert quantized == (decoder["seconds"].keys() | decoder["skipped"].keys()) - EXACT


@pytest.mark.slow
def test_every_exact_contender_gives_the_dense_logits(written):
    assert max(written["end_to_end"][0]["error"][name] for name in EXACT) <= 1e-4
    lossless = end_to_end.run(DECODER, steps=2, rounds=1, only=())
    assert lossless["error"].keys() == {"dense, eager", "attnpack"}
    assert max(lossless["error"].values()) <= 1e-4


@pytest.mark.slow
def test_the_same_bytes_are_packed_that_the_dense_caches_hold(written):
    held = written["end_to_end"][0]["bytes"]
    dense = 2 * 2 * 2 * 16 * 4  # key and value, batch, KV heads, head dim, fp32: bytes of one token
    assert held["dense, eager"] == dense * (96 + end_to_end.WARMUP + 2 * 3)
    assert held["static, Inductor"] == held["dense, eager"] + 8  # its length is a tensor
    assert held["attnpack"] < held["dense, eager"]


def _contender(logits, exact):
    return end_to_end.Contender(torch.nn.Identity(), DynamicCache(), dense=False, exact=exact, logits=logits)


def test_unlike_logits_are_refused():
    logits = torch.randn(2, 1, 8)
    contenders = {"dense, eager": _contender(logits, True), "fp8, eager": _contender(2 * logits, False)}
    assert end_to_end._errors(contenders, DECODER) == {"dense, eager": 0.0, "fp8, eager": 1.0}
    contenders["static, Inductor"] = _contender(logits + 1e-3 * logits.abs().max(), True)
    with pytest.raises(RuntimeError, match=r"static, Inductor: logits differ"):
        end_to_end._errors(contenders, DECODER)
    contenders["static, Inductor"] = _contender(torch.full_like(logits, torch.nan), True)
    with pytest.raises(RuntimeError, match=r"static, Inductor: logits differ"):
        end_to_end._errors(contenders, DECODER)


def test_a_cache_that_was_not_packed_is_refused():
    cache = DynamicCache()
    end_to_end._fill(cache, DECODER)
    with pytest.raises(RuntimeError, match="not packed"):
        end_to_end._check_packed(cache)
    end_to_end._check_packed(pack_cache(cache, PackPolicy(text_rank=8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_results_agree(dtype):
    result = attention_step.run(replace(ATTENTION, dtype=dtype), rounds=1)
    assert max(result["error"].values()) <= measure.TOLERANCE[dtype]
    assert result["bytes"]["packed"] < result["bytes"]["dense"]


def test_unlike_attention_results_are_refused(monkeypatch):
    monkeypatch.setattr(measure, "TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(RuntimeError, match="differs from dense attention"):
        attention_step.run(ATTENTION, rounds=1)


def test_flags_make_the_cases():
    given = decode.parse(["--batch", "1", "8", "--tokens", "512", "--heads", "16", "--rank", "32,64"])
    cases = decode.attention_cases(given)
    assert [(case.batch, case.tokens) for case in cases] == [(1, 512), (8, 512)]
    assert {(case.heads, case.kv_heads, case.rank) for case in cases} == {(16, 16, (32, 64))}
    given = decode.parse(["--layers", "2", "--hidden", "64", "--mlp", "96", "--dtype", "bf16"])
    assert decode.end_to_end_cases(given) == [end_to_end.Case(dtype=torch.bfloat16, layers=2, hidden=64, mlp=96)]


@pytest.mark.parametrize("arguments", [["--rank", "1"], ["--batch", "0"], ["--heads", "6", "--kv-heads", "4"]])
def test_flags_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        decode.parse(arguments)
    assert "expected" in capsys.readouterr().err


def test_contenders_take_turns():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = measure.in_turn(contenders, rounds=3)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_command_restarts_once_with_malloc_settings(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda program, arguments, environment: started.append(environment))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in measure.MALLOC:
        monkeypatch.delenv(name, raising=False)
    measure.restart_with_malloc_settings()
    for name, value in measure.MALLOC.items():
        assert started[0][name] == value
        monkeypatch.setenv(name, value)
    measure.restart_with_malloc_settings()
    assert len(started) == 1


def test_the_commit_is_read_from_the_repository(tmp_path):
    assert measure.commit(tmp_path) is None
    (tmp_path / ".git/refs/heads").mkdir(parents=True)
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / ".git/packed-refs").write_text("# pack-refs with: peeled\nabc refs/heads/main\n")
    assert measure.commit(tmp_path) == "abc"
    (tmp_path / ".git/refs/heads/main").write_text("def\n")
    assert measure.commit(tmp_path) == "def"


def test_the_commit_of_a_work_tree_is_read_from_its_repository(tmp_path):
    own = tmp_path / "main/.git/worktrees/tree"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/branch\n")
    (own / "commondir").write_text("../..\n")
    (tmp_path / "main/.git/refs/heads").mkdir(parents=True)
    (tmp_path / "main/.git/refs/heads/branch").write_text("abc\n")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/.git").write_text(f"gitdir: {own}\n")
    assert measure.commit(tmp_path / "tree") == "abc"
