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


def test_a_policy_that_only_its_class_refuses(capsys, tmp_path, model):
    (tmp_path / "policy.json").write_text('{"version": 1, "policy": {"vision_rank": "most"}}')
    message = failed(capsys, "export", model, "--to", "onnx", "--out", "o", "--policy", str(tmp_path / "policy.json"))
    assert "vision_rank: got 'most'" in message


def test_a_prompt_for_a_changed_artefact(capsys, tmp_path):
    (tmp_path / "processor").mkdir()
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    assert "got no attnpack-fx artefact" in failed(capsys, "run", str(tmp_path), "--prompt", "a")
