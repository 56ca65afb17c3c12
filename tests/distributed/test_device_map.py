"""Layers placed on devices by accelerate, as `device_map` does it: hooks around every module, and still all packed."""

import accelerate
import pytest
import torch

import attnpack_fx
from attnpack_fx import PackPolicy
from tests.distributed.ranks import generated
from tests.zoo import ZOO

LOSSLESS = PackPolicy(vision_rank="full", text_rank="full", strict=True)


def placed(family: str):
    """A model whose layers each move what they are given to a device of their own: here all to the only one."""
    model = ZOO[family].build("sdpa")
    layers = [name for name, _ in model.named_modules() if name.endswith(("layers.0", "layers.1"))]
    model = accelerate.dispatch_model(model, dict.fromkeys(["", *layers], "cpu"), main_device="cpu", force_hooks=True)
    assert all(hasattr(model.get_submodule(name), "_hf_hook") for name in layers)
    return model


def check(family: str) -> None:
    inputs = ZOO[family].inputs(2, 3)
    dense = generated(placed(family), inputs)
    lossless = generated(attnpack_fx.compile(placed(family), policy=LOSSLESS), inputs)
    assert lossless["tokens"] == dense["tokens"] and not dense["packed"]
    torch._dynamo.reset()
    packed = generated(attnpack_fx.compile(placed(family), vision_rank=4), inputs)
    torch._dynamo.reset()
    assert packed["packed"] and packed == generated(
        attnpack_fx.compile(ZOO[family].build("sdpa"), vision_rank=4), inputs
    )


@pytest.mark.slow
def test_every_layer_is_packed(without_inductor):
    check("qwen2.5-vl")


@pytest.mark.slow
def test_every_layer_is_packed_through_inductor(fresh_dynamo):
    check("llava-gqa")
