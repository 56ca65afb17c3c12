"""What a packed cache needs between two calls, done with all layers in turn."""

import torch

from attnpack_fx import H2O, PackPolicy, pack
from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.maintenance import maintain
from attnpack_fx.placement import Placement


def test_layers_that_share_a_placement_place_new_tokens_once(monkeypatch):
    made, init = [], Placement.__init__

    def counted(self, *arguments) -> None:
        made.append(1)
        init(self, *arguments)

    dense = torch.randn(1, 2, 12, 4, generator=torch.Generator().manual_seed(0))
    key, value = pack(dense, dense, PackPolicy(vision_rank=None, text_rank=2))
    key = key.attended(torch.zeros(1, 12))
    new = dense[:, :, :1]
    layers = [
        CachedLayer(number, key.append(new), value.append(new), 1, False, observed=torch.ones(1, 13))
        for number in range(3)
    ]
    monkeypatch.setattr(Placement, "__init__", counted)
    maintain(layers, PackPolicy(vision_rank=None, text_rank=2, passes=(H2O(0.5, every=1, heads="together"),)))
    assert all(layer.slots < 13 for layer in layers)
    assert len(made) == 1 + len(layers)  # each layer then keeps tokens of its own
