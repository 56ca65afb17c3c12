"""Costs of a decode step: at tiny sizes, what is measured is the closed form, and every way attends to the same."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from attnpack_fx.kernels import reference
from benchmarks import costs

SHAPES = (
    costs.Shape("one position", 4, 4, 16, 40, 8),
    costs.Shape("grouped", 6, 2, 8, 36, 4),
    costs.Shape("axes", 4, 2, 16, 63, 8, (7, 9)),
)
MODES = [(shape, number) for shape in SHAPES for number in range(len(list(costs.modes(shape))))]


def _mode(shape, number):
    return list(costs.modes(shape))[number]


@pytest.mark.parametrize(("shape", "number"), MODES, ids=lambda each: getattr(each, "name", each))
def test_what_is_measured_is_the_closed_form(shape, number):
    mode = _mode(shape, number)
    assert costs.measured(mode) == mode.closed_form(mode.shape)


@pytest.mark.parametrize(("shape", "number"), MODES, ids=lambda each: getattr(each, "name", each))
def test_every_way_attends_as_the_reference_does(shape, number):
    mode = _mode(shape, number)
    expected = reference.attention(mode.query, mode.keys, mode.values, None, mode.shape.head_dim**-0.5)
    assert (mode().double() - expected).abs().max() <= 0.05 * expected.abs().max()


def test_every_mode_is_there():
    names = [mode.name for mode in costs.modes(SHAPES[2])]
    assert len(set(names)) == len(names) == 14
    assert names[:2] == ["dense", "decompress, then attend"] and names[-1] == "un-rotated keys R=2, tables"
    # Axes have to be found for there to be tables.
    assert [mode.name for mode in costs.modes(SHAPES[0])] == [name for name in names if "tables" not in name]


def test_one_form_of_each_rank_is_chosen():
    chosen = [mode.name.split(",")[0] for mode in costs.modes(SHAPES[2]) if mode.chosen]
    assert chosen == ["un-rotated keys R=8", "un-rotated keys R=2"]


def test_the_formulas_give_the_known_figures():
    """Millions of operations, two a multiplication, in the paper's setting: LLaVA-1.5-7B at R = 64."""
    llava = costs.SHAPES[0]
    scale = llava.heads * llava.head_dim
    operations = {form: 2e-6 * (form(llava).multiplies - scale) for form in (costs.dense, costs.absorbed)}
    assert operations[costs.dense] == pytest.approx(9.4, abs=0.05)
    assert operations[costs.absorbed] == pytest.approx(5.8, abs=0.05)
    assert 2e-6 * costs.decompressed(llava).multiplies == pytest.approx(613, abs=0.5)
    assert 2e-6 * costs.decompressed_partial(llava).multiplies == pytest.approx(444, abs=0.5)
    assert costs.absorbed(llava).bytes == pytest.approx(1.20e6, rel=0.005)


def test_products_counts_what_it_says():
    with costs.Products() as products:
        x, y, i = torch.ones(3, 4), torch.ones(4), torch.arange(5)
        x * y  # 12
        x.addcmul_(x, y)  # 12
        torch.mul(x, y, out=torch.empty(3, 4))  # 12
        torch.view_as_complex(torch.ones(5, 2)) * 2j  # 20
        i * 2  # makes indices
        x + y
        weights, bags = torch.ones(5), torch.tensor([0])
        torch.nn.functional.embedding_bag(i, torch.ones(6, 7), bags, mode="sum", per_sample_weights=weights)
    assert products.multiplies == 12 + 12 + 12 + 20 + 5 * 7
    assert y.data_ptr() in products.read


def test_an_operand_that_is_only_viewed_is_not_read():
    with costs.Products() as products:
        x, y = torch.ones(2, 3), torch.ones(2, 3)
        products.read.clear()
        x.view(6)[2:].unsqueeze(0)
        y.view(6) + 1
    assert products.read == {y.data_ptr()}


def test_costs_are_written_and_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(costs, "SHAPES", SHAPES[2:])
    file = tmp_path / "costs.json"
    costs.main(["--out", str(file)])
    written = json.loads(file.read_text())
    assert written["versions"]["torch"] == torch.__version__ and {"cpu", "commit"} <= written.keys()
    (shape,) = written["costs"]
    assert shape["tokens"] == 63 and len(shape["modes"]) == 14
    each = shape["modes"]["rotated"]
    assert each["measured"] == each["closed_form"]
    dense = shape["modes"]["dense"]["measured"]
    assert each["of_dense"]["multiplies"] == each["measured"]["multiplies"] / dense["multiplies"]
    printed = capsys.readouterr().out
    assert "axes: T=63, Hq=4, H=2, D=16, R=8" in printed and " *" in printed
