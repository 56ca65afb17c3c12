"""The report: what it claims follows from the rows, what is missing is named, and the page is one whole file."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

import report_inputs

from benchmarks import results_file
from benchmarks.report import analysis, command, other_tables, quality_tables, words
from benchmarks.report.data import load
from benchmarks.report.markdown import brief
from benchmarks.report.markup import nats, number, points
from benchmarks.report.page import page
from benchmarks.report.published import REFERENCES

_EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SECTIONS = {"accuracy", "paper", "equal-bytes", "throughput", "memory", "spectra", "all", "counted", "how", "skipped"}


class Balanced(HTMLParser):
    """Fails at a tag that closes no open one; keeps what a page would fetch, ids, and anchors that are linked to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.ids, self.linked = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in _EMPTY:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href") and value.startswith("#"):
                self.linked.append(value[1:])
            elif tag != "a" and name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                self.fetched.append(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return report_inputs.write(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def results(folder):
    return load(folder)


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    command.main(["--results", str(folder), "--out", str(out)])
    return out


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30))
def test_the_front_is_every_point_that_none_is_better_than(drawn):
    beaten = {
        point for point in drawn for other in drawn if other != point and other[0] >= point[0] and other[1] >= point[1]
    }

    assert [drawn[place] for place in analysis.front(drawn)] == sorted(set(drawn) - beaten)


def test_the_page_is_one_file(written):
    text = (written / "index.html").read_text()
    found = Balanced(text)

    assert found.fetched == []
    assert not re.search(r"url\((?!#)|@import|<script|<link", text)
    assert set(re.findall(r'https?://[^"<\s]*', text)) == {"https://arxiv.org/abs/2603.23914"}
    assert len(found.ids) == len(set(found.ids))
    assert set(found.linked) <= set(found.ids)
    assert set(found.ids) >= SECTIONS


def test_figures_and_the_table_are_written(written):
    assert {file.name for file in written.iterdir()} == {
        "index.html",
        "table.md",
        "accuracy.png",
        "accuracy-digits-llava.png",
        "accuracy-digits-qwen3-vl.png",
        "memory.png",
        "spectra-digits-llava.png",
        "spectra-digits-qwen3-vl.png",
        "throughput.png",
    }
    rows = [line for line in (written / "table.md").read_text().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {4, 9}  # the brief table of both models, and those of each


def test_every_row_and_group_is_on_the_page(written, results):
    text = (written / "index.html").read_text()

    for quality in results.qualities:
        assert [row for row in quality.rows if f">{row.name}</th>" not in text] == []
    for group, *_ in report_inputs.GROUPS:
        assert f'<th colspan="13" scope="rowgroup">{group}</th>' in text
        assert f">{group}</text>" in text
    assert "tokens are not pruned &lt;here&gt;" in text
    assert "hqq is missing" in text
    assert "RuntimeError: no fp8" in text


@pytest.mark.parametrize("file", ["speed.json", "long.json", "counted.json"])
def test_a_missing_file_is_named(folder, tmp_path, file):
    for other in folder.iterdir():
        if other.name != file:
            (tmp_path / other.name).symlink_to(other)
    found = load(tmp_path)
    text = page(found, {name: "" for name in (*_names(load(folder)),)})

    assert list(found.missing) == [file]
    assert "This page is not complete" in text
    assert f"nothing of <code>{file}</code>" in text
    Balanced(text)


def test_a_file_of_failures_alone_is_not_measured(tmp_path):
    (tmp_path / "speed.json").write_text('{"rows": [{"contender": "dense", "batch": 2, "failed": "no memory"}]}')
    found = load(tmp_path)

    assert found.speed is None
    assert found.missing["speed.json"] == "Throughput at a fixed memory cap, by any of its rows"


def test_a_model_of_skipped_methods_alone(results, tmp_path):
    (quality, _) = results.qualities
    found = replace(results, qualities=(replace(quality, rows=(), spectra=()),), speed=None, long=None)
    text = command.write(found, tmp_path)[0].read_text()

    assert "the claim of 16x fewer bytes at a loss of 0.1 points or less <strong" in text
    assert "nothing of ours was measured" in text
    Balanced(text)


def test_an_empty_folder_is_a_page_that_says_so(tmp_path, capsys):
    out = tmp_path / "out"
    command.main(["--results", str(tmp_path), "--out", str(out)])
    text = (out / "index.html").read_text()

    assert "Accuracy was not measured" in text
    assert "Accuracy against bytes: not measured" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {"index.html", "table.md"}
    assert "Throughput at a fixed memory cap: not measured" in (out / "table.md").read_text()
    Balanced(text)


def test_one_model_with_a_group_that_is_new(results, tmp_path):
    (quality, _) = results.qualities
    rows = tuple(replace(row, group="a new group" if row.group == "pairs" else row.group) for row in quality.rows)
    found = replace(results, qualities=(replace(quality, rows=rows, spectra=()),), speed=None, long=None)
    text = command.write(found, tmp_path)[0].read_text()

    assert ">a new group</text>" in text
    assert "spectra in quality-digits-llava.json" in text


def test_text_is_escaped(results):
    (quality, _) = results.qualities
    hostile = "<b onclick='x()'>&"
    rows = tuple(replace(row, name=hostile, group=hostile) for row in quality.rows)
    found = replace(results, qualities=(replace(quality, model=hostile, architecture=hostile, rows=rows),))
    text = page(found, {name: "" for name in _names(found)})

    assert hostile not in text
    assert "<b onclick" not in text
    Balanced(text)


def test_claims_follow_the_rows(results):
    (quality, _) = results.qualities
    kept, lost = _of(quality, lambda row: 0.0), _of(quality, lambda row: -0.1)

    assert [found.holds for found in analysis.claims(kept)] == [True, True]
    assert all(">holds<" in words.claim(kept, found) for found in analysis.claims(kept))
    assert [found.best for found in analysis.claims(lost)] == [None, None]
    assert all(">does not hold<" in words.claim(lost, found) for found in analysis.claims(lost))
    assert "none and none" in words.summary([lost])


def test_a_claim_of_which_the_interval_says_less(results):
    (quality, _) = results.qualities
    rows = tuple(replace(row, difference_interval=(-0.01, 0.01)) for row in _of(quality, lambda row: 0.0).rows)
    found = analysis.claims(replace(quality, rows=rows))[0]

    assert found.holds and found.certain is None
    assert "No row of ours has its whole 95 % interval within it." in words.claim(quality, found)


def test_ratios_just_short_do_not_hold(results):
    (quality, _) = results.qualities
    rows = tuple(replace(row, ratio=min(row.ratio, 15.99)) for row in _of(quality, lambda row: 0.0).rows)

    assert not any(found.holds for found in analysis.claims(replace(quality, rows=rows)))


def test_where_ours_is_not_ahead_is_marked(results):
    (quality, _) = results.qualities
    ahead = analysis.comparisons(quality)
    behind = _of(quality, lambda row: -0.1 if row.ours else 0.0)
    level = _of(quality, lambda row: 0.0)

    assert {each.ratio for each in ahead} == set(report_inputs.TARGETS)
    assert all(each.verdict.startswith("ahead") for each in ahead)
    assert 'class="behind"' not in quality_tables.equal_bytes_table(quality)
    for other, verdict in ((behind, "not ahead"), (level, "level")):
        assert {each.verdict for each in analysis.comparisons(other)} == {verdict}
        assert f"<strong>{verdict}</strong>" in quality_tables.equal_bytes_table(other)


def test_a_verdict_says_where_intervals_overlap(results):
    (quality, _) = results.qualities
    for ours, verdict in ((0.01, "ahead, intervals overlap"), (-0.01, "not ahead, intervals overlap")):
        close = _of(quality, lambda row, ours=ours: ours if row.ours else 0.0)
        wide = [replace(row, difference_interval=(row.difference - 0.1, row.difference + 0.1)) for row in close.rows]
        assert {each.verdict for each in analysis.comparisons(replace(close, rows=tuple(wide)))} == {verdict}


def test_more_bytes_do_not_count_as_equal(results):
    (quality, _) = results.qualities
    (row, *_) = quality.rows
    fitting, large = replace(row, ratio=15.9), replace(row, ratio=15.0, difference=1.0)

    assert analysis.best_at([fitting, large], 16) is fitting
    assert analysis.best_at([large], 16) is None


def test_speeds_are_over_the_fastest_dense_contender():
    found = other_tables.speeds(report_inputs.speed())

    assert found["static, Inductor"] == 1.0
    assert found["ours, rank 64 rotated"] > 1
    assert other_tables.speeds(None) == {}


def test_throughput_stands_beside_accuracy_where_both_were_measured(results):
    (quality, _) = results.qualities
    (name, *_) = [row.name for row in analysis.main_rows(quality)]

    assert "tokens/s over dense" not in quality_tables.main_table([quality], other_tables.speeds(results.speed))
    assert "<td>6.50x</td>" in quality_tables.main_table([quality], {name: 6.5})


def test_the_papers_references_follow_from_its_tables():
    assert [(f"{ratio:.1f}", f"{lost:+.1f}") for _, ratio, lost in REFERENCES] == [("5.1", "+0.2"), ("21.2", "-1.4")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "\N{EN DASH}"),
        (float("inf"), "infinite"),
        (float("nan"), "not a number"),
        (-0.001, "0.00"),
        (-1234.5, "\N{MINUS SIGN}1,234.50"),
    ],
)
def test_numbers_are_written_one_way(value, expected):
    assert number(value) == expected


def test_points_have_a_sign_and_small_divergences_are_not_zero():
    assert (points(0.0012), points(-0.00001)) == ("+0.12", "0.00")
    assert (nats(1e-6), nats(0), nats(0.25)) == ("< 0.0001", "0.0000", "0.2500")


@pytest.mark.parametrize(
    ("content", "expected"), [("{", "expected JSON"), ("[]", "expected an object"), ('{"model": "m"}', "'contexts'")]
)
def test_a_file_that_is_no_result_is_named(tmp_path, content, expected):
    (tmp_path / "quality-m.json").write_text(content)

    with pytest.raises(ValueError, match=f"quality-m.json.*{expected}"):
        load(tmp_path)


def test_without_matplotlib_the_extra_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        command.main(["--results", str(folder), "--out", str(tmp_path / "out")])

    assert "attnpack-fx[demo]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_ends_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path)])

    assert "expected a folder of result files" in capsys.readouterr().err


def _of(quality, difference):
    """With other differences, and intervals of no width."""
    rows = []
    for row in quality.rows:
        value = difference(row)
        accuracy = quality.dense["accuracy"] + value
        rows.append(replace(row, difference=value, difference_interval=(value, value), accuracy=accuracy))
    return replace(quality, rows=tuple(rows))


def _names(results):
    return [
        "throughput",
        "memory",
        *(f"{kind} {quality.model}" for quality in results.qualities for kind in ("accuracy", "spectra")),
    ]


def test_what_is_committed_says_what_was_measured():
    results = load(results_file.FOLDER)
    assert not results.missing
    root = Path(__file__).parents[2]
    table = brief(results)
    assert table.count("\n") > 8
    for file in ("README.md", "docs/evaluation/table.md"):
        assert table in (root / file).read_text(), f"{file}: run `attnpack bench report` and copy its brief table"
