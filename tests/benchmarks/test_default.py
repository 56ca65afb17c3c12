"""The benchmark of the default options at its smallest: what it writes, and that it compares what it says."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2]))

from attnpack_fx import PackPolicy
from benchmarks import default


def test_the_first_setting_is_what_a_user_gets():
    assert next(iter(default.SETTINGS.values())) == PackPolicy()


def test_the_model_has_the_sizes_that_are_said():
    model = default.mid_size(2, 2)
    inputs = default.prompt(2)
    assert inputs["input_ids"].shape == (2, default.IMAGE_TOKENS + default.TEXT_TOKENS)
    found = default.generation(model, inputs, 3)
    tokens = default.IMAGE_TOKENS + default.TEXT_TOKENS + 2
    assert found["bytes"] == 2 * tokens * 2 * 2 * 2 * 64 * 4  # samples, layers, keys and values, heads, dims, fp32
    assert found["first_token"] > 0 and found["tokens_per_second"] > 0


@pytest.mark.slow
def test_every_contender_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(default, "SETTINGS", {"default options": PackPolicy()})
    monkeypatch.setattr(default, "_WARMUP", 1)
    out = tmp_path / "default.json"
    default.main(["--quick", "--only", "speed", "--batches", "1", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["versions"]["torch"] == torch.__version__
    rows = record["speed"]["1"]
    assert list(rows) == [default.EAGER, default.INDUCTOR, "default options"]
    assert rows[default.EAGER]["bytes"] == rows[default.INDUCTOR]["bytes"]
    assert rows["default options"]["bytes"]["median"] < rows[default.EAGER]["bytes"]["median"]
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in rows)
    with pytest.raises(ValueError, match="got results of"):
        default.main(["--batches", "1", "--out", str(out)])
