"""The memory table: at tiny sizes every byte is accounted for, and the paper's figures are those of the formula."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from attnpack_fx.passes.avl import AVL
from attnpack_fx.passes.h2o import H2O
from attnpack_fx.passes.kivi import KIVI
from attnpack_fx.passes.minicache import MiniCache
from attnpack_fx.passes.quantize import Quantize
from benchmarks import memory

TINY = memory.Model("tiny", 5, 4, 2, head_dim=16)
ROWS = (
    memory.Row("dense", TINY, 24, 6, None, paper=0.0384, unit="MB"),
    memory.Row("rotated", TINY, 24, 6, (3, 5), paper=2.5),
    memory.Row("vision alone", TINY, 24, 0, (4, 4), grid=(4, 6)),
    memory.Row("vision in 4 bits", TINY, 24, 6, (4, 6), bits=4),
    memory.Row("all in 4 bits", TINY, 24, 6, (4, 6), bits=4, text_bits=4),
    memory.Row("one position", TINY, 24, 6, (3, 5), unrotated=True),
    memory.Row("axes", TINY, 48, 6, (3, 5), unrotated=True, grid=(6, 8)),
)
#: Rows of the paper's own table; figures of other methods are of other prompts.
PRINTED = [row for row in memory.ROWS if row.paper and not row.name.startswith(("MiniCache", "H2O", "A-VL"))]
KEEP_HALF = H2O(0.5, target="vision")
WITH_METHODS = (
    replace(ROWS[1], methods=(KEEP_HALF,), budget=lambda row: 2 * 5 * (8 * (12 + 32) + 2 * 6 * 32)),
    replace(
        ROWS[1],
        methods=(KEEP_HALF, Quantize(4, target=("coefficients", "bases", "tail"), recent=0)),
        # A byte holds codes of two neighbouring columns.
        budget=lambda row: 5 * ((2 + 3) * 12 + (3 + 5) * 32 / 2 + 2 * 6 * 32 / 2),
    ),
    memory.Row("A-VL", TINY, 24, 6, None, methods=(AVL(),), budget=lambda row: 2 * 5 * 2 * (12 + 6) * 32),
    memory.Row(
        "KIVI", TINY, 32, 8, None, methods=(KIVI(2, 8, 16),), budget=lambda row: 5 * 32 * ((32 + 24) / 4 + 2 * (8 + 16))
    ),
    memory.Row(
        "MiniCache",
        replace(TINY, layers=8),
        *(24, 6, None),
        methods=(MiniCache(),),
        budget=lambda row: 0.75 * 2 * 2 * 8 * 30 * 32,
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_closed_form_and_what_is_besides_make_every_byte(without_inductor, row):
    result = memory.run(row)
    assert result["counted"] == memory.closed_form(row) + sum(result["besides"].values())
    assert result["full"] == memory.closed_form(replace(row, ranks=None, text_bits=0))
    assert result["ratio"] == result["full"] / result["counted"]
    besides = {"placement"} if row.ranks else set()
    besides |= {"scales"} if row.bits else set()
    besides |= {"text coefficients"} if row.text_bits else set()
    besides |= {"cos, sin"} if row.unrotated else set()
    assert result["besides"].keys() == besides


def test_what_is_besides_has_the_size_it_must_have(without_inductor):
    one, axes = (memory.run(row)["besides"] for row in ROWS if row.unrotated)
    assert one["cos, sin"] == 2 * 24 * 8 * 2
    assert one["placement"] == 8 * 30
    # Tables as long as the axes, and the row of every token on each of the two that vary.
    assert axes["cos, sin"] == 2 * (6 + 8) * 8 * 2 + 2 * 48 * 8
    bits = memory.run(ROWS[4])["besides"]
    assert bits["scales"] == 5 * 8 * (4 + 6 + 2 * 6) and bits["text coefficients"] == 5 * 2 * 6 * 3


@pytest.mark.parametrize("row", WITH_METHODS, ids=lambda row: "+".join(method.name for method in row.methods))
def test_every_byte_of_methods_has_a_name(without_inductor, row):
    result = memory.run(row)
    assert result["counted"] == row.budget(row) + sum(result["besides"].values())
    kinds = {
        "H2O": {"placement", "observed"},
        "Quantize": {"scales", "codebook"},
        "AVL": {"placement", "observed"},
        "KIVI": {"placement", "scales", "zero points", "groups"},
        "MiniCache": {"placement", "norms", "retained tokens"},
    }
    assert result["besides"].keys() == set().union(*(kinds[method.name] for method in row.methods))
    assert all(size > 0 for size in result["besides"].values())


def test_bytes_without_a_name_are_refused(without_inductor):
    with pytest.raises(RuntimeError, match=r"tiny, A-VL: .* bytes are not 1 and"):
        memory.run(replace(WITH_METHODS[2], budget=lambda row: 1))


@pytest.mark.parametrize("row", PRINTED, ids=lambda row: f"{row.model.name} {row.name}")
def test_the_paper_prints_what_the_closed_form_says(row):
    size = memory.closed_form(row)
    full = memory.closed_form(replace(row, ranks=None, text_bits=0, budget=None))
    figure = size / 1e6 if row.unit == "MB" else full / size
    digits = 1 if row.unit == "MB" else 2
    assert abs(figure - row.paper) <= 1.1 * 10**-digits  # 16/16 is off by one in the last digit
    assert abs(figure / row.paper - 1) < 0.005


def test_a_cache_that_is_not_packed_as_asked_is_refused(without_inductor, monkeypatch):
    row = ROWS[1]
    monkeypatch.setattr(memory, "policy", lambda _: memory.PackPolicy(vision_rank=2, key_space="rotated"))
    with pytest.raises(RuntimeError, match=r"tiny, rotated: expected packed {'vision': 3}"):
        memory.run(row)


def test_rows_are_written_and_printed(without_inductor, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "ROWS", ROWS[:2])
    file = tmp_path / "memory.json"
    memory.main(["--out", str(file), "--dtype", "bf16", "--only", "tiny"])
    written = json.loads(file.read_text())
    assert written["versions"]["torch"] == torch.__version__ and {"cpu", "commit"} <= written.keys()
    assert [each["name"] for each in written["memory"]] == ["dense", "rotated"]
    assert written["memory"][1]["paper"] == 2.5
    printed = capsys.readouterr().out
    assert "0.0384 MB" in printed and "2.5x" in printed


def test_a_row_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        memory.main(["--only", "nothing"])
    assert "expected a part of a model or row; rows: 128/128" in capsys.readouterr().err
