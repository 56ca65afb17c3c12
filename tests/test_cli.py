"""The command line: commands of other packages, errors that loading finds, and `demo` and `explain` end to end."""

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from PIL import Image

from attnpack_cli import main as cli
from attnpack_cli import models
from attnpack_cli.errors import UserError
from tests.demo.models import save_text_model, trained


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a failing command prints on stderr."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_commands_of_other_packages_are_entry_points(capsys, monkeypatch):
    def add_weigh(commands):
        commands.add_parser("weigh", help="say what a cache weighs").set_defaults(run=lambda arguments: 7)

    theirs = EntryPoint("weigh", "tests.test_cli:none", "attnpack_fx.commands")
    monkeypatch.setattr(EntryPoint, "load", lambda entry: add_weigh)
    # One of the same name as a command of ours, which metadata of an earlier release may hold, is not even loaded.
    ours = EntryPoint("export", "attnpack_fx.nowhere:add_export", "attnpack_fx.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: [theirs, ours])
    assert cli.main(["weigh"]) == 7
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "say what a cache weighs" in capsys.readouterr().out


def test_an_interrupted_command_ends_without_a_traceback(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("attnpack_fx.demo.command.explain", interrupted)
    monkeypatch.setattr("attnpack_cli.explain.check_model", lambda *_: None)
    assert cli.main(["explain", "any"]) == 130


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("transformers", "tqdm") else object())
    message = failed(capsys, "demo")
    assert "transformers, tqdm" in message and "pip install 'attnpack-fx[demo]'" in message


def test_without_a_checkout_the_demo_says_where_it_looked(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "__file__", str(tmp_path / "site-packages" / "attnpack_cli" / "models.py"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    message = failed(capsys, "demo")
    for place in ("site-packages", "here"):
        assert str(tmp_path / place / models.TRAINED) in message
    assert "--model ID_OR_PATH" in message


def test_a_folder_with_weights_that_are_none(capsys, tmp_path):
    name = save_text_model(tmp_path)
    (Path(name) / "model.safetensors").write_bytes(b"none" * 1024)
    assert f"cannot load the model {name!r}" in failed(capsys, "explain", name)


def test_a_rank_that_only_the_whole_configuration_refuses(capsys, tmp_path):
    name = Path(save_text_model(tmp_path))
    config = json.loads((name / "config.json").read_text())
    del config["hidden_size"], config["head_dim"]
    (name / "config.json").write_text(json.dumps(config))
    # Refused before the weights, which would not fit this configuration.
    message = failed(capsys, "explain", str(name), "--text-rank", "8192")
    assert "text_rank=8192 exceeds H * D = 4096" in message and "expected a rank from 1 to 4096" in message


def test_an_image_for_a_model_without_vision(capsys, tmp_path, monkeypatch):
    name = save_text_model(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    # Where the files do not show it.
    monkeypatch.setattr("attnpack_cli.explain.check_model", lambda *_: None)
    assert "takes text only" in failed(capsys, "explain", name, "--image", str(tmp_path / "a.png"))


def test_answers_are_printed_before_what_comes_after_them(capsys, tmp_path, monkeypatch, without_inductor):
    name = save_text_model(tmp_path)
    capsys.readouterr()

    def stopped(*_):
        raise UserError("stopped")

    monkeypatch.setattr("attnpack_fx.demo.own.explained", stopped)
    arguments = [
        "demo",
        "--model",
        name,
        "--prompt",
        "a b c",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "a.png"),
    ]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    for part in ("question  a b c", "  dense     ", "  packed    ", "Speed"):
        assert part in captured.out
    warning, error = captured.err.splitlines()
    assert warning.startswith("attnpack: no attention site") and error == "attnpack demo: stopped"


def test_explain_prints_the_report_as_json(capsys, tmp_path, without_inductor):
    arguments = ["explain", save_text_model(tmp_path), "--prompt", "a b c d " * 30, "--text-rank", "4", "--json"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert [layer["key_rank"] for layer in report["layers"]] == [{"text": 4}] * 2
    assert report["bytes_after"] < report["bytes_before"]


def test_explain_prints_a_table_of_a_vision_language_model(capsys, tmp_path, without_inductor):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    arguments = ["explain", str(trained()), "--image", str(tmp_path / "a.png"), "--prompt", "read image #1"]
    assert cli.main([*arguments, "--vision-rank", "8"]) == 0
    assert "vision 8/8" in capsys.readouterr().out


def test_demo_with_a_model_of_ones_own(capsys, tmp_path, without_inductor):
    out = tmp_path / "picture.png"
    arguments = ["demo", "--model", save_text_model(tmp_path), "--prompt", "a b c d " * 30, "--text-rank", "full"]
    assert cli.main([*arguments, "--max-new-tokens", "5", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    answers = [line[1:] for line in lines if line and line[0] in ("dense", "packed")]
    assert answers[0] and answers[0] == answers[1]
    assert Image.open(out).size[0] > 1000
