"""The line of progress: of how many steps, where there is a terminal, and gone at the end."""

import warnings

import pytest

from attnpack_fx.demo.steps import Steps
from attnpack_fx.warning import warn


def test_without_a_terminal_nothing_but_what_is_printed(capsys):
    with Steps(2) as steps:
        steps.begin("loading")
        steps.print("an answer")
        steps.expect(3)
    assert capsys.readouterr() == ("an answer\n", "")


def test_the_line_has_the_step_and_the_total(capsys):
    with pytest.raises(KeyError), Steps(1, disable=False) as steps:
        steps.begin("loading")
        steps.expect(2)
        steps.begin("answering")
        steps.print("an answer")
        raise KeyError
    captured = capsys.readouterr()
    lines = captured.err.split("\r")
    assert captured.out == "an answer\n"
    assert any(line.startswith("answering") and "1/3" in line for line in lines)
    # What is left of it is blank.
    assert lines[-1] == "" and lines[-2].strip() == ""


def test_warnings_of_this_package_alone_are_shown_and_in_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr("sys.warnoptions", [])
    before = warnings.showwarning
    with Steps(1) as steps:
        steps.begin("loading")
        for _ in range(2):
            warn("everything stays dense")
            warnings.filterwarnings("always")
        warnings.warn("soon gone", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "attnpack: everything stays dense\n"
    assert warnings.showwarning is before
