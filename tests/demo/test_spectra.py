"""Spectra are those of the cached matrices, split by modality."""

import torch

from attnpack_fx import hf
from attnpack_fx.demo.spectra import spectra
from tests.demo.models import tiny_llava
from tests.zoo import IMAGE, ZOO


def test_every_layer_part_and_modality_has_its_singular_values():
    loaded, inputs = tiny_llava(), ZOO["llava-mha"].inputs(2, 3)
    found = {(one.layer, one.part, one.modality): one for one in spectra(loaded, inputs)}
    assert set(found) == {
        (layer, part, name) for layer in (0, 1) for part in ("keys", "values") for name in ("vision", "text")
    }
    cache = hf.empty_cache(loaded.model)
    with torch.no_grad():
        loaded.model(**inputs, past_key_values=cache)
    key, _ = hf.keys_and_values(cache)[1]
    image = inputs["input_ids"][0] == IMAGE
    text = ~image & inputs["attention_mask"][0].bool()
    for name, mask in (("vision", image), ("text", text)):
        values = torch.linalg.svdvals(key[0].transpose(0, 1).flatten(1)[mask])
        one = found[1, "keys", name]
        assert one.tokens == int(mask.sum()) and one.values[0] == 1.0
        torch.testing.assert_close(torch.tensor(one.values), values / values[0], rtol=1e-4, atol=1e-6)
    assert found[0, "keys", "vision"].tokens == 16
    # Sample 0 has three padding tokens.
    assert found[0, "keys", "text"].tokens == inputs["input_ids"].shape[1] - 16 - 3
