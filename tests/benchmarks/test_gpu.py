"""The GPU benchmark without a GPU: a dry run writes every part, goes on where it ended, and is rendered as such."""

import json
import math
import multiprocessing
import operator
import os
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import DynamicCache

from attnpack_fx import PackPolicy, pack_cache
from attnpack_fx.kernels import registering
from attnpack_fx.step_cost import attention_arguments
from benchmarks import measure
from benchmarks.gpu import (
    apart,
    attention,
    command,
    contenders,
    correctness,
    decode,
    decoders,
    generated,
    judging,
    kernels,
    launches,
    layers,
    part,
    problems,
    render,
)
from benchmarks.gpu.layers import Layout
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.store import Store
from benchmarks.gpu.timing import Clock, Contender, compare
from tests.kernels.inputs import relative_error

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a dry run of every part writes."""
    out = tmp_path_factory.mktemp("results") / "dry"
    assert command.main(["--dry", "--out", str(out)]) == 0
    return out


def _loaded(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# ---- a dry run of everything -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("each", PARTS, ids=lambda each: each.name)
def test_every_part_says_on_what_it_was_measured(folder, each):
    written = _loaded(folder, each.name)
    assert written["part"] == each.name and written["dry"] is True
    assert written["versions"]["torch"] == torch.__version__ and "triton" in written["versions"]
    assert written["commit"] == measure.commit(measure.ROOT)
    assert written["ceilings"].keys() == {"copy", "matmul"} and min(written["ceilings"].values()) > 0
    run = part.Run(Machine(dry=True), written["ceilings"], written["cases"], command._DRY_MEMORY_GB)
    assert written["cases"].keys() == each.cases(run).keys() != set()
    assert not any(case.keys() & {"wrong", "skipped"} for case in written["cases"].values())


def test_a_dry_run_needs_no_triton(monkeypatch):
    monkeypatch.setattr(registering, "triton", None)
    assert kernels.names() == kernels.CHECKS.keys()
    assert kernels.check_kernel("fused_kernel", True, 0)["says"].startswith("ok, of ATen alone, worst error")


def test_every_operator_has_a_check():
    assert correctness.CHECKS.keys() == correctness.registered()


@pytest.mark.slow
def test_every_operator_is_checked_in_every_dtype(folder):
    checked = _loaded(folder, "correctness")["cases"]
    operators = {name.partition(" ")[0] for name in checked}
    assert operators == correctness.registered() >= {"attention", "append_", "compress", "decompress", "fold", "plan"}
    assert len(checked) == 3 * len(operators)
    for case in checked.values():
        assert case["worst"] <= case["limit"] and case["inputs"] > 0


@pytest.mark.slow
def test_attention_is_timed_against_what_runs(folder):
    for case in _loaded(folder, "attention")["cases"].values():
        assert {"flash", "flex"} <= case["dense"].keys()
        assert set(case["does_not_run"]) == {"flash", "efficient", "cuDNN", "flex"} - case["dense"].keys()
        best = min(peer["seconds"] for peer in case["dense"].values())
        for row in case["ranks"].values():
            assert row["byte_ratio"] == case["dense_bytes"] / row["bytes"] > 1
            assert row["ratio"] == pytest.approx(best / row["packed"]["seconds"])
            assert row["ratio_over_byte_ratio"] == pytest.approx(row["ratio"] / row["byte_ratio"])
            assert row["ratio_over_decompressed"] > 0 and row["packed"]["eager"]["samples"] >= 3
            assert row["error"] <= correctness.TOLERANCE[attention.DTYPE]
        highest = max(map(int, case["ranks"]))
        assert case["unrotated"].keys() == {str(highest // 2), str(highest)}
        for row in case["unrotated"].values():
            assert row["ratio"] == pytest.approx(best / row["packed"]["seconds"])
            assert row["error"] <= correctness.TOLERANCE[attention.DTYPE] and "decompressed" not in row


@pytest.mark.slow
def test_models_generate(folder):
    cases = _loaded(folder, "kernels")["cases"]
    assert generated.CHECKS.keys() < cases.keys() and all(case["says"].startswith("ok, ") for case in cases.values())


@pytest.mark.slow
def test_codes_are_timed_against_what_runs(folder):
    for case in _loaded(folder, "codes")["cases"].values():
        assert case["stored"].keys() == {
            "factors",
            *(f"factors, {b} bits" for b in (8, 4)),
            "rows, 4 bits",
            "rows, 2 bits",
        }
        for row in case["stored"].values():
            assert row["byte_ratio"] == case["dense_bytes"] / row["bytes"] > 1
            assert row["ratio"] == pytest.approx(case["dense"][case["best_dense"]]["seconds"] / row["seconds"])
            assert row["error"] <= correctness.TOLERANCE[attention.DTYPE]
        sizes = [case["stored"][name]["bytes"] for name in ("factors", "factors, 8 bits", "factors, 4 bits")]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_packing_is_timed_against_the_prefill(folder):
    (case,) = _loaded(folder, "factorize")["cases"].values()
    seconds = {name: spent["median"] for name, spent in case["seconds"].items()}
    assert seconds.keys() == {"compress", "svd_lowrank", "fold", "rebuild and svd_lowrank", "prefill"}
    assert case["share_of_prefill"] == pytest.approx(seconds["compress"] / seconds["prefill"])


@pytest.mark.slow
def test_decoding_is_timed_at_equal_and_at_largest_batch(folder):
    cases = _loaded(folder, "decode")["cases"]
    alone = {case["contender"] for case in cases.values() if case["batch"] == 1}
    assert alone == set(decoders.CONTENDERS)
    (largest,) = (case for case in cases.values() if "memory_gb" in case)
    assert largest["batch"] > 2
    for case in cases.values():
        assert case["tokens_per_second"] == pytest.approx(case["batch"] / case["seconds_per_step"]["median"])
        assert case["graphs_compiled_while_timed"] == 0 and case["cache_bytes"] > 0
    ours = next(case for case in cases.values() if case["contender"] == decoders.OURS)
    assert 0 <= ours["error"] <= measure.TOLERANCE[decoders.DTYPE]


@pytest.mark.slow
def test_the_packed_batch_is_larger_than_the_dense_one(folder):
    cases = _loaded(folder, "paper")["cases"]
    ours, dense = cases[decoders.OURS], cases[decoders.STATIC]
    assert ours["batch"] > dense["batch"]
    assert ours["cache_bytes"] < ours["dense_cache_bytes"]


@pytest.mark.slow
def test_a_step_is_traced(folder):
    for case in _loaded(folder, "profile")["cases"].values():
        assert case["kernels"] > 0 and case["busy_seconds"] > 0
        assert case["busy_share"] == case["busy_seconds"] / case["wall_seconds"]


@pytest.mark.slow
def test_a_second_run_measures_nothing(folder, capsys):
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert command.main(["--dry", "--out", str(folder)]) == 0
    told = capsys.readouterr().out
    for each in PARTS:
        assert f"{each.title}: 0 of {len(_loaded(folder, each.name)['cases'])} cases" in told
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.slow
def test_a_dry_run_is_rendered_as_one(folder):
    pytest.importorskip("triton")
    page = render.page(folder.parent)
    assert render._NONE not in page and page.count("A dry run: the times mean nothing") == len(PARTS)
    for each in PARTS:
        section = page.partition(f"## {each.title}")[2]
        assert section.partition("\n## ")[0].count("| ") > 0


# ---- the command -------------------------------------------------------------------------------------------


def test_the_page_in_docs_is_what_the_results_render_to():
    pytest.importorskip("triton")
    assert render.PAGE.read_text() == render.page(render.RESULTS), "run python -m benchmarks.gpu --render"


def test_without_results_the_page_says_so(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "cpu").mkdir()
    # Another benchmark's file of the same name.
    (tmp_path / "cpu" / "attention.json").write_text('{"attention": []}')
    page = render.page(tmp_path)
    assert render._NONE in page and "###" not in page
    for each in PARTS:
        assert render._wrapped(each.about) in page


def test_it_refuses_to_run_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--part", "ceilings", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", [[], ["--out", str(render.RESULTS / "dry")]])
def test_a_dry_run_writes_nothing_among_measurements(out, capsys):
    with pytest.raises(SystemExit):
        command.main(["--dry", *out])
    assert "expected --out with a folder that is not in" in capsys.readouterr().err


def test_when_time_is_up_the_rest_is_named_and_measured_by_the_next_run(tmp_path, capsys):
    arguments = ["--dry", "--part", "ceilings", "--only", "matmul", "--out", str(tmp_path)]
    assert command.main([*arguments, "--minutes", "-1"]) == 0
    assert "3 cases are left" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert command.main(arguments) == 0
    written = _loaded(tmp_path, "ceilings")
    assert list(written["cases"]) == ["matmul bfloat16", "matmul float16", "matmul float32"]
    assert command.main([*arguments[:-4], "--only", "copy", "--out", str(tmp_path)]) == 0
    assert list(_loaded(tmp_path, "ceilings")["cases"]) == [*written["cases"], "copy"]


def test_fresh_measures_again(tmp_path, capsys):
    arguments = ["--dry", "--part", "ceilings", "--only", "copy", "--out", str(tmp_path)]
    for extra, expected in (([], 1), ([], 0), (["--fresh"], 1)):
        command.main([*arguments, *extra])
        assert f"{expected} of 1 cases to measure" in capsys.readouterr().out


def test_a_wrong_result_is_recorded_and_fails_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(correctness, "CHECKS", {})
    arguments = ["--dry", "--part", "correctness", "--only", "linear float32", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    (case,) = _loaded(tmp_path, "correctness")["cases"].values()
    assert case == {"wrong": "operator attnpack::linear has no check in benchmarks/gpu/correctness.py"}
    assert "has no check" in capsys.readouterr().out
    # It stays wrong until it is measured again.
    assert command.main(arguments) == 1


def test_a_case_that_raises_hides_no_other(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("PTXAS error: too many registers\nptxas exited with 255")

    monkeypatch.setitem(correctness.CHECKS, "fold", fails)
    arguments = ["--dry", "--part", "correctness", "--only", "float32", "--only", "l", "--out", str(tmp_path)]
    monkeypatch.setattr(correctness, "registered", lambda: {"fold", "linear"})
    monkeypatch.setattr(correctness, "CHECKS", {name: correctness.CHECKS[name] for name in ("fold", "linear")})
    assert command.main(arguments) == 1
    cases = _loaded(tmp_path, "correctness")["cases"]
    told = "RuntimeError: PTXAS error: too many registers ... ptxas exited with 255"
    assert cases["fold float32"] == {"wrong": told} and "worst" in cases["linear float32"]
    assert capsys.readouterr().out.endswith(f"1 failed:\n  correctness, fold float32: {told}\n")


def test_where_the_cuda_context_is_lost_nothing_more_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "context_lost", lambda: True)
    assert command.main(["--dry", "--only", "float", "--only", "matmul", "--out", str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.iterdir()] == [], "a part with no cases lets the next begin"
    assert "context of this process is lost" in capsys.readouterr().out
    assert command.main(["--dry", "--part", "ceilings", "--out", str(tmp_path)]) == 1
    assert list(_loaded(tmp_path, "ceilings")["cases"]) == ["copy"]


def test_checked_inputs_have_the_seed_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(correctness.reference, "take_rows", lambda x, index, spare: torch.zeros(()))
    arguments = ["--dry", "--part", "correctness", "--only", "take_rows float32", "--out", str(tmp_path)]
    assert command.main([*arguments, "--seed", "31"]) == 1
    told = _loaded(tmp_path, "correctness")["cases"]["take_rows float32"]["wrong"]
    assert "seed 31: error" in told and "--part correctness --only 'take_rows float32' --fresh --seed 31" in told


# ---- a process of its own ----------------------------------------------------------------------------------


def test_a_process_serves_calls_and_is_replaced_when_it_ends():
    served = apart.Apart(60)
    try:
        first = served.call(os.getpid)
        assert first != os.getpid() and served.call(operator.add, 2, 3) == 5
        with pytest.raises(apart.CallFailedError, match="ZeroDivisionError: division by zero"):
            served.call(operator.truediv, 1, 0)
        assert served.call(os.getpid) == first
        with pytest.raises(apart.CallFailedError, match="its process ended with status 3"):
            served.call(os._exit, 3)
        second = served.call(os.getpid)
        assert second != first
        served._seconds = 0.3
        with pytest.raises(apart.CallFailedError, match="not done after 0 s"):
            served.call(time.sleep, 60)
        served._seconds = 60
        assert served.call(os.getpid) not in (first, second)
    finally:
        served.close()


def test_a_lost_context_is_recognised(monkeypatch):
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    assert not apart.context_lost()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not apart.context_lost()
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert apart.context_lost()
    ours, other = multiprocessing.Pipe()
    ours.send((operator.truediv, (1, 0)))
    thread = threading.Thread(target=apart._serve, args=(other,))
    thread.start()
    assert ours.recv() == (
        *(None, "ZeroDivisionError: division by zero; the CUDA context is lost, and what follows gets another process"),
        False,
    )
    ours.close()
    thread.join(10)


@pytest.mark.parametrize(
    ("change", "packed", "told"),
    [
        (lambda logits: logits, True, None),
        (lambda logits: logits, False, "no layer of the cache is packed"),
        (lambda logits: logits.index_fill(1, torch.tensor([4]), math.nan), True, "logits are Inf or NaN"),
        (lambda logits: logits * 1.01, True, "logits differ by 1.0e-02, expected at most 1.0e-03"),
        (lambda logits: logits.index_fill(2, torch.tensor([7]), 1.0001), True, "token 1 is 7, expected 3, of 12"),
    ],
)
def test_what_generates_something_else_is_found(change, packed, told, monkeypatch):
    logits = torch.zeros((1, 12, 300))
    logits[:, :, 3], logits[:, :, 7] = 1, 0.9999
    keys = pack_cache(_filled(), PackPolicy(text_rank=2)).layers[0].keys if packed else torch.zeros(())
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=keys)])
    answers = iter([(logits, None), (change(logits), cache)])
    monkeypatch.setattr(generated, "_generated", lambda model, inputs: next(answers))
    if told is None:
        assert generated.check("generate: LLaVA, rotated", True, 0)["error"] == 0
        return
    with pytest.raises(apart.CallFailedError, match=re.escape(told)):
        generated.check("generate: LLaVA, rotated", True, 0)


def _filled():
    cache = DynamicCache()
    cache.update(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), 0)
    return cache


# ---- its pieces --------------------------------------------------------------------------------------------


def test_results_of_other_sources_are_replaced(tmp_path):
    file = tmp_path / "device" / "part.json"
    Store(file, {"commit": "a", "sources": "1"}, fresh=False).record("case", {"x": 1})
    again = Store(file, {"commit": "a", "sources": "1"}, fresh=False)
    assert again.resumed and again.cases == {"case": {"x": 1}} and again.replaced == []
    other = Store(file, {"commit": "a", "sources": "2"}, fresh=False)
    assert not other.resumed and other.cases == {} and other.replaced == ["sources"]
    assert [path.name for path in file.parent.iterdir()] == ["part.json"]


def test_numbers_that_are_none_do_not_get_into_a_file(tmp_path):
    with pytest.raises(ValueError):
        Store(tmp_path / "part.json", {}, fresh=False).record("case", {"x": math.nan})
    assert not (tmp_path / "part.json").exists()


def test_an_operator_that_computes_something_else_is_found(monkeypatch):
    machine = Machine(dry=True)
    reference = correctness.reference.take_rows
    monkeypatch.setattr(correctness.reference, "take_rows", lambda *arguments: reference(*arguments) + 1e-3)
    with pytest.raises(part.WrongResultError, match="take_rows of 9, seed"):
        correctness.measure_case(machine, "take_rows", torch.float32)


@pytest.mark.parametrize("error", [0.2, math.nan, math.inf])
def test_no_error_above_the_limit_passes(error):
    with pytest.raises(part.WrongResultError, match="expected at most"):
        judging.judge({}, "attention", error, 0.1, 0)


def test_inputs_differ_in_everything_attention_can():
    shapes = problems.attention_shapes(dry=False)
    assert {16, 24, 80, 128, 256} <= {shape.key_dim for shape in shapes}
    assert {"none", "bool", "additive"} == {shape.mask for shape in shapes}
    assert {0, 1, 2} == {len(shape.segments) for shape in shapes}
    assert any(shape.rotary and shape.interleaved for shape in shapes) and any(shape.ragged for shape in shapes)
    assert {1, 2, 9, 65} <= {shape.queries for shape in shapes}
    assert {1, 2, 4, 7, 8} <= {shape.group for shape in shapes}


@pytest.mark.parametrize("layout", [Layout("plain", 4, 4, 16), Layout("grouped", 6, 2, 16)])
def test_packed_dense_and_decompressed_attend_to_the_same(layout):
    random = torch.Generator().manual_seed(0)
    packed = layers.packed_layer(layout, 2, 50, 4, torch.float32, random)
    assert packed.nbytes == layers.packed_bytes(layout, 2, 50, 4, torch.float32)
    keys, values = (torch.empty(2, layout.kv_heads, 50, 16) for _ in range(2))
    packed.fill_dense(keys, values)
    assert keys.nbytes + values.nbytes == layers.dense_bytes(layout, 2, 50, torch.float32)
    rows = [(0, 0), (1, layout.heads - 1)]
    expected = packed.expected(rows)
    dense = contenders.dense([contenders.DenseLayer(packed.query, keys, values)], layout, dry=True)
    outs = [dense[name].calls[0]() for name in ("flash", "flex")]
    outs.append(contenders.decompressed({4: [packed]}, 50)[4].calls[0]())
    outs.append(torch.ops.attnpack.attention(*attention_arguments(packed.query, *packed.parts)))
    for out in outs:
        assert out.shape == packed.query.shape
        assert relative_error(out[[0, 1], [0, layout.heads - 1], 0], expected) < 1e-5


def test_input_sets_exceed_the_cache():
    machine = Machine(dry=True)
    case = attention.Case(Layout("plain", 2, 2, 16), 1, 96, (4,))
    sets = attention._packed_sets(machine, case, 4, torch.Generator().manual_seed(0))
    size = sets[0].nbytes
    assert (len(sets) - 1) * size < attention._CACHES * machine.cache_bytes <= len(sets) * size


def test_what_does_not_fit_has_a_reason(monkeypatch):
    machine = Machine(dry=True)
    monkeypatch.setattr(machine, "free_bytes", lambda: 20_000)
    case = attention.Case(Layout("plain", 2, 2, 16), 1, 200, (4,))
    result = attention.measure_case(part.Run(machine, {"copy": 1.0, "matmul": 1.0}), case)
    assert result["dense"] == {} and result["does_not_run"].keys() == {"dense", "decompressed"}
    assert "more than 60% of" in result["does_not_run"]["dense"]
    assert result["ranks"]["4"]["packed"]["seconds"] > 0 and "ratio" not in result["ranks"]["4"]
    assert any("| 4 |" in line for line in attention.table({case.name: result})) and not attention.verdict({"": result})
    monkeypatch.setattr(machine, "free_bytes", lambda: 10)
    skipped = attention.measure_case(part.Run(machine, {"copy": 1.0, "matmul": 1.0}), case)
    assert skipped["skipped"].startswith("rank 4: packed cache of 0.0 GB is more than 60%")
    assert any(skipped["skipped"] in line for line in attention.table({case.name: skipped}))


def test_a_peer_that_fails_is_a_result_and_ours_is_an_error():
    def fails():
        raise TypeError("unsupported\nand more")

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert part.attempt(fails) == part.Failure("does not run: TypeError: unsupported")
    for run in (part.attempt, part.within_memory):
        assert run(too_large).reason.startswith("out of memory: ")
        assert run(lambda: 3) == 3
    with pytest.raises(TypeError):
        part.within_memory(fails)


def _row(ratio, byte_ratio):
    return {"ratio": ratio, "byte_ratio": byte_ratio, "ratio_over_byte_ratio": ratio / byte_ratio}


def test_targets_of_attention_are_judged():
    cases = {
        "short": {"batch": 1, "tokens": 576, "ranks": {"16": _row(1.5, 4.0), "64": _row(0.9, 3.0)}},
        "long": {"batch": 1, "tokens": 9216, "ranks": {"16": _row(9.0, 10.0), "64": _row(7.9, 10.0)}},
    }
    worst, long, short = attention.verdict(cases)
    assert worst.startswith("Worst ratios: short R=64: 0.90x; short R=16: 1.50x; long R=64: 7.90x")
    assert "does not hold (1 of 2; the worst is 0.79 at long R=64)" in long
    assert "does not hold (the worst is 0.90 at short R=64)" in short
    cases["short"]["ranks"].pop("64")
    cases["long"]["ranks"].pop("64")
    assert [": holds (" in line for line in attention.verdict(cases)] == [False, True, True]


def test_the_largest_batch_fills_the_memory():
    ran = {
        1: {"peak_bytes": 110, "cache_bytes": 4, "weight_bytes": 90},
        8: {"peak_bytes": 180, "cache_bytes": 32, "weight_bytes": 90},
    }
    # 100 fixed, 10 a sample.
    assert decode.largest_batch(1000, ran) == (950 - 100) // 10
    assert decode.largest_batch(105, ran) == 0
    # Never less than the cache itself.
    flat = {batch: {"peak_bytes": 100, "cache_bytes": 20 * batch, "weight_bytes": 90} for batch in (1, 8)}
    assert decode.largest_batch(1000, flat) == (950 - 90) // 20


def test_the_largest_batch_waits_for_the_equal_ones():
    run = part.Run(Machine(dry=True), {}, {}, (0.001,))
    with pytest.raises(part.NotYetError):
        decode.measure_largest(run, decoders.DRY_DECODERS[0], decoders.DRY_PROMPTS[0], 0.001, decoders.EAGER)


@torch.no_grad()
def test_a_cache_that_is_not_packed_and_logits_that_differ_are_found(monkeypatch):
    decoder, prompt = decoders.DRY_DECODERS[0], decoders.DRY_PROMPTS[0]
    model = decoders.build(decoder, CPU)
    contender = decoders.contenders(model, decoder, prompt, 2, dry=True)[decoders.EAGER]()
    contender.prefill(decoders.random_ids(model, 2, prompt.tokens, Machine(dry=True)))
    ids = torch.ones((2, 1), dtype=torch.int64)
    with pytest.raises(part.WrongResultError, match="layer 0 of our cache is not packed, it holds a Tensor"):
        decoders.packed_error(model, contender, ids)
    pack_cache(contender.cache, PackPolicy(text_rank=8))
    assert decoders.packed_error(model, contender, ids) <= measure.TOLERANCE[decoders.DTYPE]
    decode_once = contender.decode
    monkeypatch.setattr(contender, "decode", lambda ids: (decode_once(ids), contender.logits.mul_(1.2)))
    with pytest.raises(part.WrongResultError, match="logits differ"):
        decoders.packed_error(model, contender, ids)


def test_one_model_is_kept():
    first = decoders.build(decoders.DRY_DECODERS[0], CPU)
    assert decoders.build(decoders.DRY_DECODERS[0], CPU) is first
    other = decoders.build(replace(decoders.DRY_DECODERS[0], layers=2), CPU)
    assert list(decoders._kept.values()) == [other] and other.config.num_hidden_layers == 2


def _event(cat, name, ts, dur, correlation=None, tid=1):
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": arguments}


def test_a_trace_is_summed_up():
    events = [
        _event("cpu_op", "attnpack::attention", 0, 10),
        _event("cuda_runtime", "cudaLaunchKernel", 2, 1, 7),
        _event("cuda_runtime", "cudaLaunchKernel", 20, 1, 8),
        _event("cuda_driver", "cuLaunchKernelEx", 30, 1, 9),
        _event("cuda_runtime", "cudaLaunchKernel", 5, 1, 10, tid=2),
        _event("cuda_runtime", "cudaStreamSynchronize", 6, 1, 11),
        _event("kernel", "inner", 100, 50, 7, tid=9),
        _event("kernel", "nvjet_gemm", 140, 20, 8, tid=9),
        _event("kernel", "combine_kernel", 200, 30, 9, tid=9),
        _event("kernel", "elsewhere", 300, 10, 10, tid=9),
        {"ph": "M", "name": "process_name"},
    ]
    found = launches.summary(events, 2, ("combine_kernel",))
    assert found["busy_seconds"] == pytest.approx((60 + 30 + 10) / 2 * 1e-6)
    assert (found["kernels"], found["launches"], found["matrix_products"]) == (2, 2, 0.5)
    assert found["packed_kernels"] == {"inner": 0.5, "combine_kernel": 0.5}
    case = {**found, "layers": 1}
    assert launches.verdict({"tiny": case}) == ["At most 4 kernels of packed operators a layer: holds (1.0, tiny)."]


def test_the_kernels_of_the_packed_cache_have_names():
    names = launches._names()
    assert all(name.endswith("_kernel") for name in names)


def test_contenders_take_turns_over_all_their_inputs():
    calls = []
    contender = Contender([lambda: calls.append("a"), lambda: calls.append("b")])
    result = compare(Clock(CPU), {"both": contender}, graphs=False)["both"]
    assert calls.count("a") == calls.count("b") and calls[:4] == ["a", "b", "a", "b"]
    assert result["seconds"] == result["eager"]["median"] > 0 and "graph" not in result


def test_the_shapes_are_those_of_the_models():
    sizes = {decoder.name: decoder.token_bytes for decoder in decoders.DECODERS}
    assert sizes["LLaVA-1.5-7B"] == 2 * 2 * 32 * 4096 and sizes["Qwen3-VL-8B"] == 2 * 2 * 36 * 1024
    # AttentionPack's case: 214 GB of dense cache for the vision tokens of 64 prompts.
    assert sizes["LLaVA-1.5-13B"] * 64 * 16 * 256 / 1e9 == pytest.approx(214.7, abs=0.1)
