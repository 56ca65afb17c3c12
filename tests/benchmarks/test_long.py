"""Memory over a generation at its smallest: bytes by hand, and that a run is resumed."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from attnpack_cli.models import trained_model
from attnpack_fx import PackPolicy, cache_bytes
from attnpack_fx.demo.load import load
from benchmarks.long import command, generate
from benchmarks.long.contenders import CONTENDERS, FEW
from benchmarks.long.generate import Length

SMALL = Length(images=1, prompts=1, tokens=8, every=4)
LAYERS, HEADS, DIM = 4, 4, 64
#: Keys and values of one token in all layers, bfloat16.
A_TOKEN = LAYERS * 2 * HEADS * DIM * 2


def test_dense_bytes_are_counted_after_the_prompt_and_every_few_tokens():
    row = generate.run("dense", SMALL)
    assert row["steps"] == [0, 4, 8]
    prompt, *_ = row["bytes"]
    assert prompt % A_TOKEN == 0 and prompt > 64 * A_TOKEN
    assert row["bytes"] == [prompt, prompt + 4 * A_TOKEN, prompt + 8 * A_TOKEN]


@pytest.mark.slow
def test_packed_bytes_are_less_and_grow_by_the_dense_text():
    row = generate.run("rank 16, text dense", SMALL)
    assert row["bytes"][0] < 64 * A_TOKEN
    assert row["bytes"][2] - row["bytes"][0] >= 8 * A_TOKEN


@pytest.mark.parametrize("name", ["quanto, 4 bit", "quanto, 2 bit", "hqq, 4 bit"])
def test_all_that_a_quantised_cache_holds_is_counted(name):
    pytest.importorskip("optimum.quanto" if name.startswith("quanto") else "hqq")
    model = load(str(trained_model()), "bfloat16").model
    batch, tokens, late = 2, 32, 3
    cache = CONTENDERS[name].cache(model)
    key, new = (torch.randn(batch, HEADS, count, DIM, dtype=torch.bfloat16) for count in (tokens, late))
    for layer in range(LAYERS):
        cache.update(key.clone(), key.clone(), layer)
    numbers, bits = key.numel(), CONTENDERS[name].quantised["nbits"]
    # A scale and a zero point of 2 bytes each for every 64 numbers.
    assert cache_bytes(cache) == LAYERS * 2 * (numbers * bits // 8 + numbers // 64 * 4)
    before = cache_bytes(cache)
    for layer in cache.layers:  # As `update` leaves it; called, it would decode, for which quanto compiles C++.
        layer.keys, layer.values = new.clone(), new.clone()
    assert cache_bytes(cache) - before == late * batch * A_TOKEN  # the newest tokens are dense


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    asked = []

    def fake(function, name, length, threads):
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        if name.startswith("hqq"):
            return {"skipped": "no hqq"}
        return {"steps": [0, 8], "bytes": [1000, 4000 if name == "dense" else 2000], "peak_bytes": 5000}

    monkeypatch.setattr(command, "in_child", fake)
    out = tmp_path / "memory.json"
    arguments = ["--tokens", "96", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == list(CONTENDERS)[:2]
    command.main(arguments)
    assert asked == [*list(CONTENDERS)[:3], *list(CONTENDERS)[2:]]
    record = json.loads(out.read_text())
    assert {"versions", "cpu", "commit"} <= record.keys() and record["tokens"] == 96
    policy = next(row["policy"] for row in record["rows"] if row["name"] == "rank 16, text folded")
    assert PackPolicy.from_dict(policy).fold_every == 64
    text = capsys.readouterr().out
    assert "2.00x" in text and "skipped: no hqq" in text
    command.main(arguments)
    assert asked[-1].startswith("hqq") and len(asked) == len(CONTENDERS) + 2  # It might be installed now.
    with pytest.raises(ValueError, match="give another --out"):
        command.main([*arguments, "--tokens", "16"])


def test_arguments(capsys):
    quick = command.parse(["--quick"])
    assert quick.length == Length(prompts=2, tokens=96, every=8) and quick.contenders == FEW
    assert command.parse([]).length.tokens == 512 and command.parse(["--full"]).length == command.parse([]).length
    with pytest.raises(SystemExit):
        command.parse(["--tokens", "13"])
    assert "got 13, expected a multiple of 16" in capsys.readouterr().err
