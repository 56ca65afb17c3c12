"""The command line: help at once, errors in one sentence, and the two commands end to end."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from attnpack_cli import main as cli
from attnpack_cli import models
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


def test_help_needs_neither_transformers_nor_matplotlib():
    code = (
        "import sys\n"
        "for name in ('transformers', 'matplotlib', 'PIL', 'sklearn', 'tqdm', 'onnx', 'onnxruntime'):\n"
        "    sys.modules[name] = None\n"
        "from attnpack_fx.cli import main\n"
        "for arguments in (['--help'], *([name, '--help'] for name in ('demo', 'explain', 'export', 'run'))):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: attnpack") == 5


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("attnpack-fx 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("pack",), "invalid choice: 'pack'"),
        (("demo", "--questions", "0"), "got '0', expected a whole number from 1 on"),
        (("demo", "--images", "4,17"), "expected numbers from 1 to 16"),
        (("demo", "--images", "4,,"), "got '', expected a whole number"),
        (("demo", "--vision-rank", "0"), "got '0', expected a rank such as 64"),
        (("explain", "some/model", "--vision-rank", "automatic"), "'full', 'none' or 'auto'"),
        (("demo", "--text-rank", "8,4,2"), "expected a rank such as 64"),
        (("demo", "--prompt", "what?"), "--prompt needs --model"),
        (("demo", "--image", "a.png"), "--image needs --model"),
        (("demo", "--dtype", "bfloat16"), "--dtype needs --model"),
        (("demo", "--max-new-tokens", "9"), "--max-new-tokens needs --model"),
        (("demo", "--model", "m", "--prompt", "p", "--quick"), "--quick is for the trained model"),
        (("demo", "--model", "m", "--image", "a.png"), "--prompt TEXT"),
        (("demo", "--model", "m", "--prompt", "p", "--image", "no-such.png"), "--image no-such.png: no such file"),
        (("demo", "--out", "no-such-folder/a.png"), "there is no folder no-such-folder"),
        (("demo", "--out", "a.gif"), "expected a name that ends in .png"),
        (("explain",), "ID_OR_PATH"),
        (("explain", "m", "--image", "no-such.png"), "--image no-such.png: no such file"),
    ],
)
def test_wrong_arguments_end_with_what_to_do(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in failed(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


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


def test_a_folder_that_holds_no_model(capsys, tmp_path):
    assert "cannot load the model" in failed(capsys, "explain", str(tmp_path))


def test_a_rank_the_model_cannot_have(capsys, tmp_path, without_inductor):
    name = save_text_model(tmp_path)
    assert "text_rank=4096 exceeds H * D" in failed(capsys, "explain", name, "--text-rank", "4096")


def test_an_image_for_a_model_without_vision(capsys, tmp_path):
    name = save_text_model(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "takes text only" in failed(capsys, "explain", name, "--image", str(tmp_path / "a.png"))


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
