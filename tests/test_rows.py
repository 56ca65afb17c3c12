"""Rows that are asked for, and a file of answers that is continued."""

import json
from pathlib import Path

import pytest
from PIL import Image

from attnpack_cli.errors import UserError
from attnpack_cli.rows import Row, continue_answers, read_answers, read_rows


def line(**content) -> str:
    return json.dumps(content) + "\n"


def continued(out: Path) -> list[str]:
    continue_answers(out, read_answers(out))
    assert [each.name for each in out.parent.iterdir()] == [out.name]
    return out.read_text().splitlines()


def test_a_folder_is_one_question_about_every_picture(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    (tmp_path / "c.png").mkdir()
    assert read_rows(tmp_path, "what?") == [
        Row("a.jpg", (str(tmp_path / "a.jpg"),), "what?"),
        Row("b.PNG", (str(tmp_path / "b.PNG"),), "what?"),
    ]


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "rows.jsonl"
    file.write_text(line(id=1, images=["a.png", "/b.png"], prompt="p", more=[]) + "\n" + line(id="1", prompt="é"))
    monkeypatch.chdir(tmp_path)
    rows = [Row(1, (str(tmp_path / "here" / "a.png"), "/b.png"), "p"), Row("1", (), "é")]
    assert read_rows(file, None) == read_rows(Path("here/rows.jsonl"), None) == rows


def test_answers_stay_and_errors_go(tmp_path):
    out = tmp_path / "out.jsonl"
    whole = [line(id="a", answer="1"), line(id=2, answer=""), line(id="é", answer="3")]
    out.write_text(whole[0] + line(id="b", error="no such file") + whole[1] + whole[2])
    kept = read_answers(out)
    assert kept.answered == {"a", 2, "é"} and kept.left_out == 1
    assert continued(out) == [each.rstrip() for each in whole]


def test_a_file_with_answers_alone_is_not_touched(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text(line(id="a", answer="1"))
    before = out.stat()
    continued(out)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_every_place_where_a_line_may_have_been_cut(tmp_path):
    first, last = line(id="a", answer="1"), json.dumps({"id": "b", "answer": "zwölf"}, ensure_ascii=False) + "\n"
    content = (first + last).encode()
    out = tmp_path / "out.jsonl"
    for end in range(len(first), len(content) + 1):
        out.write_bytes(content[:end])
        whole = end >= len(content) - 1
        assert read_answers(out).answered == ({"a", "b"} if whole else {"a"})
        lines = continued(out)
        assert lines == [each.rstrip() for each in ([first, last] if whole else [first])]
        assert out.read_bytes().endswith(b"\n")


def test_an_id_that_is_there_twice_is_left_once(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text(line(id="a", answer="1") + line(id="a", answer="2") + line(id="b", answer="3"))
    assert continued(out) == ['{"id": "a", "answer": "1"}', '{"id": "b", "answer": "3"}']


def test_nothing_is_kept_of_no_file(tmp_path):
    kept = read_answers(tmp_path / "none.jsonl")
    continue_answers(tmp_path / "none.jsonl", kept)
    assert kept.answered == set() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["{\n", "[]\n", "null\n", '{"id": true, "answer": ""}\n', '{"id": 1}\n', "[1]"])
def test_a_file_of_something_else_is_refused(tmp_path, wrong):
    out = tmp_path / "out.jsonl"
    out.write_text(line(id="a", answer="1") + wrong)
    with pytest.raises(UserError, match=r"line 2: not an answer; expected .* choose another place"):
        read_answers(out)
