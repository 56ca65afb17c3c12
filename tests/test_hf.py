"""The adapter to transformers' caches packs what grows and leaves the rest."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from attnpack_fx import PackedTensor, cache_bytes, pack_cache
from attnpack_fx.hf import keys_and_values
from tests.decoder import close
from tests.packing_inputs import FULL, VISION_ONLY, dense_pair, vision_mask


def filled_cache(layers: int = 2) -> transformers.DynamicCache:
    cache = transformers.DynamicCache()
    for layer in range(layers):
        cache.update(*dense_pair(seed=layer), layer)
    return cache


def test_the_installed_version_is_one_the_adapter_was_written_for():
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    assert (5, 10) <= (major, minor) < (6, 0)
    layer = filled_cache().layers[0]
    assert isinstance(layer.keys, torch.Tensor) and isinstance(layer.values, torch.Tensor)
    assert layer.is_sliding is False


def test_every_growing_layer_is_packed_in_place():
    cache = filled_cache()
    assert pack_cache(cache, FULL) is cache
    for number, layer in enumerate(cache.layers):
        key, value = dense_pair(seed=number)
        assert isinstance(layer.keys, PackedTensor) and isinstance(layer.values, PackedTensor)
        close(layer.keys.dense(), key)
        close(layer.values.dense(), value)
    assert cache.get_seq_length() == 12


def test_vision_tokens_and_padding_are_passed_on():
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 0] = False
    cache = pack_cache(filled_cache(), VISION_ONLY, modality=vision_mask(12, 2, 6), real=real)
    assert cache.layers[0].keys.tokens == {"vision": 6, "dense": 6}
    assert not cache.layers[0].keys.dense()[0, :, 0].any()


def test_a_packed_cache_goes_on_growing_as_transformers_grows_it():
    cache = pack_cache(filled_cache(), FULL)
    key, value = dense_pair(tokens=1, seed=9)
    keys, _ = cache.update(key, value, 0)
    assert isinstance(keys, PackedTensor)
    close(keys.dense(), torch.cat([dense_pair(seed=0)[0], key], dim=2))
    cache.update(key, value, 1)
    cache.crop(-1)
    assert cache.get_seq_length() == 12
    cache.reorder_cache(torch.tensor([1, 0]))
    close(cache.layers[1].values.dense(), dense_pair(seed=1)[1].flip(0))


def test_what_is_packed_already_stays():
    cache = pack_cache(filled_cache(), FULL)
    before = [layer.keys for layer in cache.layers]
    pack_cache(cache, VISION_ONLY)
    assert all(layer.keys is key for layer, key in zip(cache.layers, before, strict=True))


def test_sliding_layers_stay_dense():
    config = transformers.MistralConfig(num_hidden_layers=1, sliding_window=4, num_attention_heads=2, hidden_size=16)
    cache = transformers.DynamicCache(config=config)
    cache.update(*dense_pair(), 0)
    assert cache.layers[0].is_sliding
    pack_cache(cache, FULL)
    assert type(cache.layers[0].keys) is torch.Tensor


def test_an_empty_cache_stays_empty():
    cache = pack_cache(transformers.DynamicCache(), FULL)
    assert keys_and_values(cache) == []


def test_only_the_self_attention_of_an_encoder_decoder_cache_is_packed():
    cache = transformers.EncoderDecoderCache(filled_cache(1), filled_cache(1))
    pack_cache(cache, FULL)
    assert isinstance(cache.self_attention_cache.layers[0].keys, PackedTensor)
    assert type(cache.cross_attention_cache.layers[0].keys) is torch.Tensor


def test_bytes_of_the_packed_cache_are_counted():
    assert cache_bytes(pack_cache(filled_cache(), FULL)) > 0


@pytest.mark.parametrize("wrong", [(), SimpleNamespace(keys=1), torch.zeros(1)])
def test_what_is_no_cache_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a transformers Cache"):
        pack_cache(wrong, FULL)
