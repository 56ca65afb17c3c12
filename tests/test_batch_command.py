"""`attnpack batch` around its workers: which rows it asks for, and what it writes."""

import json

import pytest

from attnpack_cli import main as cli
from attnpack_fx import batch_command
from attnpack_fx.ray_workers import Told
from tests.demo.models import trained


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on three rows, with workers that tell what they are made to."""
    asked = []
    rows = [{"id": name, "images": [f"{name}.png"], "prompt": f"about {name}"} for name in "abc"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(told, *more):
        def answered(given, options, **how):
            asked.append(([each["prompt"] for each in given], options, how))
            for batch in told:
                print("Ray says something")
                yield batch

        monkeypatch.setattr(batch_command, "answered", answered)
        arguments = ["batch", str(tmp_path / "rows.jsonl"), "--model", str(trained())]
        return cli.main([*arguments, "--out", str(tmp_path / "out.jsonl"), *more])

    command.asked, command.out = asked, tmp_path / "out.jsonl"
    return command


def told(number: int, answer: str = "", error: str = "", warned: tuple[str, ...] = (), worker: str = "here 1") -> Told:
    return Told(number, answer, error, warned, worker)


def test_rows_that_come_back_twice_are_written_once(run, capsys):
    batches = [[told(2, "C"), told(0, "A")], [told(0, "A", worker="here 2")], [told(1, "B", worker="here 2")]]
    assert run(batches) == 0
    assert run.out.read_text() == '{"id": "c", "answer": "C"}\n{"id": "a", "answer": "A"}\n{"id": "b", "answer": "B"}\n'
    captured = capsys.readouterr()
    assert "out.jsonl: 3 answered, 0 failed, 0 were there; 2 workers, " in captured.out
    # One line, as what Ray prints goes elsewhere.
    assert captured.out.count("\n") == 1 and "Ray says something" in captured.err


def test_what_failed_is_asked_again_and_nothing_twice(run, capsys):
    broken = "no such file: é\udc80"
    assert run([[told(0, "A"), told(1, error=broken, warned=("stays dense",))]], "--batch", "2") == 2
    assert "1 rows did not come back from Ray; run the same command again" in (said := capsys.readouterr().err)
    assert "stays dense" in said
    lines = [json.loads(line) for line in run.out.read_text().splitlines()]
    assert lines == [{"id": "a", "answer": "A"}, {"id": "b", "error": broken}]
    with run.out.open("a") as file:
        file.write('{"id": "c", "ans')
    assert run([[told(1, "C"), told(0, error="still none")]], "--memory", "90", "--workers", "3") == 1
    assert "1 answered, 1 failed, 1 were there; 1 workers" in capsys.readouterr().out
    assert [json.loads(line)["id"] for line in run.out.read_text().splitlines()] == ["a", "c", "b"]
    assert run([[told(0, "B")]]) == 0 and run([]) == 0
    assert [each for each, _, _ in run.asked] == [
        ["about a", "about b", "about c"],
        ["about b", "about c"],
        ["about b"],
    ]
    (_, first, how), (_, second, more), *_ = run.asked
    assert (first["batch"], first["memory"], how["size"], how["workers"]) == (2, None, 2, None)
    assert (second["batch"], second["memory"], more["size"], more["workers"]) == (None, 90, 32, 3)
    assert first["model"] == str(trained().resolve()) and first["policy"]["vision_rank"] == "auto"
