"""`attnpack export` and `attnpack run`."""

from pathlib import Path

import pytest

from attnpack_cli import main as cli
from attnpack_fx import PackPolicy
from attnpack_fx.export import PackedGenerator
from tests.demo.models import save_text_model
from tests.test_cli import failed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_text_model(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
def test_a_model_of_text_is_exported_and_run(model, tmp_path, capsys):
    out = tmp_path / "artefact"
    PackPolicy(text_rank=4, key_space="rotated").save(tmp_path / "policy.json")
    arguments = ["--policy", str(tmp_path / "policy.json"), "--dim", "batch_size=1:4"]
    assert cli.main(["export", model, "--to", "onnx", "--out", str(out), *arguments]) == 0
    assert f"attnpack run {out}" in capsys.readouterr().out
    generator = PackedGenerator(out)
    assert generator.manifest.policy == PackPolicy(text_rank=4, key_space="rotated")
    assert generator.manifest.steps["decode"].ranges["batch_size"].most == 4
    run = ["run", str(out), "--prompt", "a b c d", "--max-new-tokens", "5"]
    printed = []
    for more in ([], ["--sample", "--seed", "1", "--top-k", "3"], ["--sample", "--seed", "1", "--top-k", "3"]):
        assert cli.main([*run, *more]) == 0
        printed.append(capsys.readouterr())
    assert "tokens in" in printed[0].err and "after a prompt of 4" in printed[0].err
    assert printed[1].out == printed[2].out
    assert "takes text only" in failed(capsys, *run, "--image", str(_picture(tmp_path)))


def _picture(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "a.png")
    return folder / "a.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "onnx"), "--out"),
        (("--to", "coreml", "--out", "o"), "invalid choice: 'coreml'"),
        (("--to", "onnx", "--out", "o", "--dim", "batch_size"), "expected NAME=LEAST:MOST"),
        (("--to", "onnx", "--out", "o", "--bits", "3"), "invalid choice: 3"),
        (("--to", "onnx", "--out", "o", "--policy", "p.json", "--bits", "4"), "leave --vision-rank"),
        (("--to", "onnx", "--out", "o", "--policy", "nowhere.json"), "nowhere.json"),
        (("--to", "onnx", "--out", "o", "--dtype", "bfloat16"), "expected float32 or float16"),
        (("--to", "onnx", "--out", "o", "--dim", "length=1:8"), "dims: got 'length'"),
        (("--to", "aoti", "--out", "o", "--dim", "batch_size=4:2"), "dims: batch_size"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, tmp_path, model, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in failed(capsys, "export", model, *arguments)


def test_an_artefact_that_is_none(capsys, tmp_path):
    assert "no manifest.json there" in failed(capsys, "run", str(tmp_path), "--prompt", "a")
    assert "needs a question" in failed(capsys, "run", str(tmp_path))


def test_what_is_no_artefact_is_not_replaced(capsys, tmp_path, model):
    (tmp_path / "mine").write_text("mine")
    assert "is there already" in failed(capsys, "export", model, "--to", "onnx", "--out", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
