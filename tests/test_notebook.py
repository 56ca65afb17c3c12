"""Reports show themselves in notebooks, whatever is in their text."""

import json
import pickle

import pytest

from attnpack_fx.calibration.report import Calibration, Candidate
from attnpack_fx.explain import Report

SITE = {"layer": "<b>layer</b>", "action": "dense", "reason": "a & b"}
REPORT = Report(graphs=[[SITE]], layers=[], fastest=[], bytes_before=4, bytes_after=2, processes=1, policy={})
CANDIDATES = (Candidate("<b>layer</b> & b", 0.1, 0.1, 2),)
CALIBRATION = Calibration((), (), 0.1, CANDIDATES, "none", 2, 4, 1, samples=1, queries=1, notes=("a & b",))


@pytest.mark.parametrize("report", [REPORT, CALIBRATION])
def test_text_is_escaped_and_keeps_its_columns(report):
    shown = report._repr_html_()
    assert shown.startswith("<pre ") and shown.endswith("</pre>") and "white-space: pre;" in shown
    assert "<b>" not in shown and "&lt;b&gt;layer&lt;/b&gt;" in shown and "a &amp; b" in shown
    assert len(shown.splitlines()) == len(str(report).splitlines())


def test_a_report_is_still_a_dict():
    assert json.loads(json.dumps(REPORT)) == REPORT == pickle.loads(pickle.dumps(REPORT))
