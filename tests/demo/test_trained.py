"""The demo on the trained model, end to end, with few questions."""

import pytest
from PIL import Image

from attnpack_fx.demo import digits, trained
from attnpack_fx.demo.steps import Steps
from attnpack_fx.policy import PackPolicy
from tests.demo.models import loaded_trained


@pytest.mark.slow
def test_lossless_packing_answers_as_the_dense_cache_does(tmp_path, fresh_dynamo, monkeypatch, capsys):
    monkeypatch.setattr(trained, "_PATIENCE", 0)
    out = tmp_path / "a.png"
    settings = trained.Settings(images=(1, 2), questions=2, new_tokens=4)
    trained.run(loaded_trained(), settings, PackPolicy(vision_rank="full"), out, Steps(1, disable=True))
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    scores = [row for row in rows if row and row[0] in digits.TASKS]
    assert [(row[0], row[1]) for row in scores] == [(task, images) for images in "12" for task in digits.TASKS]
    assert "Plain Inductor was not timed" in text and "dense, Inductor  " not in text
    assert all(row[3] == row[4] for row in scores)
    reading = next(row for row in scores if row[:2] == ["read", "1"])
    assert float(reading[3].rstrip("%")) > 90
    answers = [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(("  dense  ", "  packed  "))]
    # The dense ones alone, as soon as they are there, and both side by side.
    assert len(answers) == 12 and answers[:4] == answers[4::2] == answers[5::2]
    assert Image.open(out).size[0] > 1000
