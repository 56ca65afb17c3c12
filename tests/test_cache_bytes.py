import collections
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnpack_fx.cache_bytes import cache_bytes


class Opaque(torch.Tensor):
    """A wrapper subclass with a large logical shape and no memory of its own, silent about its parts."""

    @staticmethod
    def __new__(cls, small, other):
        return torch.Tensor._make_wrapper_subclass(cls, (1, 4, 1000, 64), dtype=small.dtype)

    def __init__(self, small, other):
        self.small, self.other = small, other

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"counting bytes must not compute: {func}")


class Wrapped(Opaque):
    """The same with its parts named, in the manner of PackedTensor."""

    def __tensor_flatten__(self):
        return ["small", "other"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return Wrapped(inner["small"], inner["other"])


def test_bare_tensor_and_containers():
    a, b, c = torch.zeros(10), torch.zeros(5, dtype=torch.float16), torch.zeros(3, dtype=torch.int64)
    assert cache_bytes(a) == 40
    assert cache_bytes(((a, b), (c, None))) == 40 + 10 + 24
    assert cache_bytes([a, {"k": b, "v": [c]}]) == 40 + 10 + 24
    assert cache_bytes(collections.OrderedDict(k=a)) == 40


def test_a_view_costs_what_it_keeps_alive():
    whole = torch.zeros(2, 4, 100, 8)
    assert cache_bytes(whole[:, :, :3]) == whole.numel() * 4
    assert cache_bytes(torch.zeros(1, 8).expand(1000, 8)) == 32


def test_each_storage_counts_once():
    whole = torch.zeros(100)
    assert cache_bytes([whole, whole, whole[:10], whole[50:], whole.view(10, 10), whole.detach()]) == 400
    assert cache_bytes([whole, whole.clone()]) == 800


def test_storages_without_bytes():
    assert cache_bytes([torch.tensor([]), torch.zeros(2, 0, 4), torch.zeros(3)]) == 12
    assert cache_bytes(torch.tensor([])) == 0


def test_wrapper_subclass_counts_as_its_parts():
    tail = torch.zeros(64, 8)
    packed = Wrapped(torch.zeros(10), tail[:2])
    assert cache_bytes(packed) == 40 + tail.numel() * 4
    assert cache_bytes([(packed, Wrapped(packed.small, torch.zeros(1)))]) == 40 + tail.numel() * 4 + 4
    assert cache_bytes(Wrapped(packed, torch.zeros(1))) == 40 + tail.numel() * 4 + 4


def test_wrapper_with_hidden_parts_is_refused():
    with pytest.raises(ValueError, match="got a Opaque, whose parts are hidden"):
        cache_bytes(Opaque(torch.zeros(1), torch.zeros(1)))


def test_hand_written_cache_objects():
    class Slotted:
        __slots__ = ("keys", "unset")

    slotted = Slotted()
    slotted.keys = torch.zeros(6)
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=torch.zeros(4), values=torch.zeros(5)), slotted], step=3)
    cache.itself = cache
    assert cache_bytes(cache) == (4 + 5 + 6) * 4


def test_models_inside_a_cache_are_not_cache():
    assert cache_bytes(SimpleNamespace(keys=torch.zeros(4), owner=torch.nn.Linear(9, 9), kind=torch.nn.Linear)) == 16


@pytest.mark.parametrize(
    "empty", [[], (), {}, [None, (None, [])], SimpleNamespace(layers=[]), SimpleNamespace(keys=None)]
)
def test_empty_cache_is_zero(empty):
    assert cache_bytes(empty) == 0


@pytest.mark.parametrize(
    "other", [None, 3, "cache", ["k", "v"], [3], object(), SimpleNamespace(step=1), torch, dict, len]
)
def test_what_is_no_cache_is_refused(other):
    with pytest.raises(ValueError, match=r"cache_bytes: got .*, expected a cache"):
        cache_bytes(other)


def test_models_and_model_outputs_are_refused():
    with pytest.raises(ValueError, match="got Linear, expected a cache"):
        cache_bytes(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pass the past_key_values of a model output"):
        cache_bytes(SimpleNamespace(logits=torch.zeros(9), past_key_values=[torch.zeros(1)]))


def test_tensors_without_memory_are_refused():
    with pytest.raises(ValueError, match=r"got a meta tensor of shape \(3,\)"):
        cache_bytes([torch.zeros(3, device="meta")])
    with FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(ValueError, match="got a fake tensor"):
        cache_bytes([fake])
    with pytest.raises(ValueError, match=r"expected torch\.strided"):
        cache_bytes(torch.eye(3).to_sparse())


def test_does_not_import_transformers():
    code = "import sys, attnpack_fx.cache_bytes; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


class TestTransformersCaches:
    shape = (2, 4, 6, 8)
    full = 2 * 4 * 6 * 8 * 4

    @pytest.fixture
    def transformers(self):
        return pytest.importorskip("transformers")

    def fill(self, cache, layers=3, tokens=6):
        for layer in range(layers):
            cache.update(torch.zeros(2, 4, tokens, 8), torch.zeros(2, 4, tokens, 8), layer)
        return cache

    def test_dynamic(self, transformers):
        cache = transformers.DynamicCache()
        assert cache_bytes(cache) == 0
        assert cache_bytes(self.fill(cache)) == 3 * 2 * self.full
        self.fill(cache, tokens=1)
        assert cache_bytes(cache) == 3 * 2 * self.full * 7 // 6

    def test_static_counts_its_whole_room(self, transformers):
        config = transformers.LlamaConfig(num_hidden_layers=3, num_attention_heads=4, hidden_size=32)
        cache = self.fill(transformers.StaticCache(config=config, max_cache_len=12))
        assert cache_bytes(cache) >= 3 * 2 * self.full * 2
        assert cache_bytes(cache) < 3 * 2 * self.full * 2 + 200  # Beside the room: counters of a few bytes a layer.

    def test_encoder_decoder(self, transformers):
        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        assert cache_bytes(cache) == 0
        self.fill(cache.self_attention_cache)
        self.fill(cache.cross_attention_cache, layers=1)
        assert cache_bytes(cache) == 4 * 2 * self.full

    def test_quantized_internals(self, transformers):
        from transformers.cache_utils import Cache, QuantizedLayer

        class HalvingLayer(QuantizedLayer):
            def _quantize(self, tensor, axis):
                return tensor.half(), {"scale": torch.ones(5), "zero": None}

            def _dequantize(self, quantized):
                return quantized[0].float()

        cache = Cache(layers=[HalvingLayer()])
        self.fill(cache, layers=1)
        assert cache_bytes(cache) == 2 * (self.full // 2 + 20)
        self.fill(cache, layers=1)
        assert cache_bytes(cache) == 2 * (self.full // 2 + 20) + 2 * self.full

    def test_model_output_is_refused(self, transformers):
        output = transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=torch.zeros(3), past_key_values=self.fill(transformers.DynamicCache())
        )
        with pytest.raises(ValueError, match="pass the past_key_values"):
            cache_bytes(output)
