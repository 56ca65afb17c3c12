"""The benchmark of quality at its smallest: what it writes, how it continues, and that its shorter way is checked."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from attnpack_fx import PackPolicy
from attnpack_fx.demo.load import load, trained_model
from benchmarks.quality import check, command, figure, packing, score, sweeps
from benchmarks.quality.data import Setting, batches

TINY = ["--quick", "--questions", "2", "--batch", "2", "--seed", "3"]
SMALL = Setting("read", 1)


@pytest.fixture(scope="module")
def loaded():
    return load(str(trained_model()), "float32")


@pytest.fixture
def small(monkeypatch):
    """One image, two policies whose cache has one form, so that one graph decodes both."""
    monkeypatch.setattr(command, "MAIN", SMALL)
    monkeypatch.setattr(command, "CHECKED", command.CHECKED[1:])
    monkeypatch.setitem(
        sweeps._SWEEPS,
        "uniform",
        lambda quick, setting, layers: (
            sweeps._fixed(str(rank), PackPolicy(vision_rank=rank, key_space="unrotated")) for rank in (8, 16)
        ),
    )


def test_rows_are_written_drawn_and_kept(tmp_path, small, monkeypatch, capsys):
    out, picture = tmp_path / "quality.json", tmp_path / "quality.png"
    monkeypatch.setattr(sweeps.attnpack_fx, "calibrate", None, raising=False)
    arguments = [*TINY, "--out", str(out), "--figure", str(picture), "--only", "uniform"]
    command.main(arguments)
    first = json.loads(out.read_text())
    assert {"versions", "cpu", "commit", "seed", "dtype"} <= first.keys()
    assert [row["name"] for row in first["rows"]] == ["8", "16"]
    for row in first["rows"]:
        rank = int(row["name"])
        assert PackPolicy.from_dict(row["policy"]).vision_rank == rank
        assert row["questions"] == 2 and 0 <= row["accuracy"] <= 1 and row["kl"] >= -1e-6
        low, high = row["difference_interval"]
        assert low <= row["accuracy"] - row["dense_accuracy"] + 1e-9 and row["difference"] <= high + 1e-9
        # bfloat16 factors of 4 layers, 2 samples, keys and values; then indices, and perhaps angles.
        factors = 4 * 2 * 2 * (64 + 256) * rank * 2
        assert factors < row["vision_bytes"] < row["cache_bytes"] < row["dense_cache_bytes"]
        assert row["dense_vision_bytes"] == 4 * 2 * 2 * 64 * 256 * 2
        # Of each of 75 tokens: 8 bytes in two indices, in each sample; cos and sin of 64 numbers, once.
        assert 0 < row["vision_bytes"] - factors <= 75 * (2 * 2 * 8 + 2 * 64 * 2)
    assert first["rows"][0]["kl"] > first["rows"][1]["kl"] and first["rows"][1]["dense_accuracy"] > 0.9
    (checked,) = first["check"]
    assert checked["policy"]["key_space"] == "unrotated" and checked["difference"] < 0.05
    assert {(row["layer"], row["kind"]) for row in first["spectra"]} == {
        (layer, kind) for layer in range(4) for kind in ("keys, rotated", "keys, un-rotated", "values")
    }
    assert all(row["error"]["8"] > row["error"]["16"] > row["error"]["32"] for row in first["spectra"])
    assert Image.open(picture).size[0] > 800

    command.main([*arguments, "--only", "calibrated"])
    second = json.loads(out.read_text())
    assert second["rows"][:2] == first["rows"]
    assert [row["skipped"] for row in second["rows"][2:]] == ["SkippedError: attnpack_fx.calibrate does not exist"] * 2
    assert "1/16, calibrated" in capsys.readouterr().out

    with pytest.raises(ValueError, match="give another --out"):
        command.main([*arguments[:-2], "--dtype", "float32"])


def test_lossless_packing_answers_as_the_dense_cache_does(loaded):
    late = Setting("cell", 1, late=True)
    # At rank 64 packing 64 tokens saves nothing, and they stay dense.
    policies = [PackPolicy(vision_rank="full", key_space="rotated"), PackPolicy(vision_rank=64, key_space="unrotated")]
    with packing.op_by_op():
        asked = batches(loaded, late, 2, 2, 0)
        rows = [score.score(loaded.model, packing.Decoders(loaded.model), asked, each, 0) for each in policies]
    for row in rows:
        assert row["agree"] == 1 and row["difference"] == 0 and row["first_divergence"] is None
        assert abs(row["kl"]) < 1e-8
    assert asked[0].from_cache == 1
    assert rows[1]["dense_vision_bytes"] < rows[1]["vision_bytes"] < 1.1 * rows[1]["dense_vision_bytes"]


def test_packing_that_differs_from_the_compiled_prefill_is_refused(loaded, monkeypatch):
    # A model that is not compiled leaves its cache dense.
    monkeypatch.setattr(check, "compiled", lambda model, policy: model)
    with pytest.raises(RuntimeError, match="bytes packed outside the graph"):
        check.check(loaded, packing.Decoders(loaded.model), SMALL, PackPolicy(vision_rank=16), 0)


def test_a_policy_without_effect_is_skipped(loaded):
    (batch,) = batches(loaded, SMALL, 2, 2, 0)
    with pytest.raises(sweeps.SkippedError, match="no effect on bytes"):
        command._check_effect(batch, PackPolicy(vision_rank=16), PackPolicy(vision_rank=16, strict=True))
    command._check_effect(batch, PackPolicy(vision_rank=16), PackPolicy(vision_rank=17))


def test_the_uniform_policy_beside_a_plan_has_its_bytes(loaded):
    for rank in (4, 40):
        plan = sweeps.candidates("bits", True, SMALL, 4)
        assert all(each.make(loaded).layers for each in plan)
        uniform = PackPolicy(vision_rank=rank)
        assert sweeps._uniform_of_equal_bytes(uniform, loaded, SMALL).vision_rank == rank


def test_calibration_sees_training_images_only(loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(sweeps.digits, "held_out_questions", lambda *_, split: seen.append(split) or [])
    assert sweeps._samples(loaded, SMALL) == [] and seen == ["train"]


def test_divergence_and_interval():
    tokens, reference = torch.tensor([[1, 2, 3], [1, 5, 4], [7, 2, 3]]), torch.tensor([[1, 2, 3]] * 3)
    assert score._first_difference(tokens, reference).tolist() == [0, 2, 1]
    left = torch.tensor([[[0.0, 0.0]]])
    right = torch.tensor([[[0.0, math.log(3)]]])
    assert score._kl(left, right).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert score.interval(np.full(10, 0.25), 0) == (0.25, 0.25)
    low, high = score.interval(np.array([0.0, 1.0] * 200), 0)
    # Two standard errors of a fair coin tossed 400 times.
    assert low == pytest.approx(0.45, abs=0.01) and high == pytest.approx(0.55, abs=0.01)


def test_a_figure_of_nothing_is_refused(tmp_path):
    record = {"settings": ["a"], "rows": [{"setting": "a", "skipped": "why"}]}
    with pytest.raises(ValueError, match="run the sweeps first"):
        figure.draw(record, tmp_path / "a.png")


def test_a_batch_that_does_not_divide_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--out", "a.json", "--questions", "33"])
    assert "expected a multiple" in capsys.readouterr().err
