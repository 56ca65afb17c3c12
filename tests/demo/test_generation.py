"""Runs are timed without what is compiled during them, and the model is left as it was."""

import os

import pytest
import torch

from attnpack_fx.demo import generation
from attnpack_fx.demo.generation import DENSE, PACKED, Run, compiled, timed
from attnpack_fx.policy import PackPolicy
from tests.demo.models import tiny_llava
from tests.zoo import ZOO

FULL = PackPolicy(vision_rank="full", text_rank="full")


def test_dense_and_lossless_packed_runs_agree(either_way):
    loaded, inputs = tiny_llava(), ZOO["llava-mha"].inputs(2, 0)
    with compiled(loaded.model, DENSE, FULL):
        dense = timed(loaded, inputs, 6, exactly=True)
    with compiled(loaded.model, PACKED, PackPolicy(vision_rank=4)):
        packed = timed(loaded, inputs, 6, exactly=True)
    with compiled(loaded.model, PACKED, FULL):
        assert torch.equal(timed(loaded, inputs, 6, exactly=True).tokens, dense.tokens)
    assert dense.tokens.shape == packed.tokens.shape == (2, 6)
    assert len(packed.steps) == 5 and len(packed.held) == 6
    assert dense.held == sorted(dense.held) and dense.held[0] < dense.held[-1]
    # Two layers of keys and values, fp32, `tokens - 1` of them cached after the last.
    tokens = inputs["input_ids"].shape[1] + 5
    config = loaded.model.config.text_config
    assert dense.cache_bytes == 2 * 2 * 2 * tokens * config.num_key_value_heads * config.head_dim * 4


def test_a_run_is_repeated_until_nothing_is_compiled(monkeypatch):
    counts = iter([0, 2, 2, 3, 3, 3])
    runs = iter("abc")
    monkeypatch.setattr(generation, "_graphs", lambda: next(counts))
    monkeypatch.setattr(generation, "_generate", lambda *_: next(runs))
    assert timed(tiny_llava(), {}, 3) == "c"


def test_speed_is_that_of_the_batch_after_the_first_token():
    run = Run(torch.zeros(4, 3, dtype=torch.long), prefill=9.0, steps=[0.5, 1.5], held=[1, 2, 3])
    assert run.tokens_per_second == 4.0
    assert Run(torch.zeros(4, 1), 9.0, [], [1]).tokens_per_second == 0.0


@pytest.mark.parametrize("before", [None, "0"])
def test_the_model_and_the_environment_are_left_as_they_were(monkeypatch, before):
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError), compiled(model, PACKED, FULL):
        assert model._compiled_call_impl is not None and os.environ[name] == "1"
        raise KeyError
    assert model._compiled_call_impl is None
    assert os.environ.get(name) == before
    with compiled(model, DENSE, FULL):
        assert model._compiled_call_impl is None and os.environ.get(name) == before
