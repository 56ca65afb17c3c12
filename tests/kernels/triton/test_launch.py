"""How launchers split work."""

import pytest
import torch

from attnpack_fx.kernels.triton import launch


@pytest.mark.parametrize(
    ("total", "others", "least", "expected"),
    [
        (132 * 4 * 64, 1, 0, 64),  # four programs to a multiprocessor
        (132 * 4 * 64, 2, 0, 128),  # which share them
        (100, 1, 0, 32),  # no program without a tile
        (132 * 4 * 64, 1, 200, 224),  # fewer programs, of whole tiles
        (132 * 64, 1, 200, 64),  # as long as every multiprocessor has one
        (132 * 4 * 64, 1, 16, 64),  # enough as it is
    ],
)
def test_tokens_of_one_program(total, others, least, expected, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    assert launch.per_program(total, others, 32, torch.device("cuda"), least) == expected
