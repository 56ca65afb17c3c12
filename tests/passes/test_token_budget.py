import pytest
import torch
import transformers
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from attnpack_fx import PackPolicy, modality
from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.find_attention import find_attention
from attnpack_fx.passes.find_modality import find_modality
from attnpack_fx.passes.prune_tokens import prune_tokens
from attnpack_fx.passes.token_budget import DecoderSize
from tests.passes.capture import capture_graphs

LLAVA_7B = DecoderSize(layers=32, width=4096, inner=11008)
LLAVA_13B = DecoderSize(layers=40, width=5120, inner=13824)
SYSTEM, IMAGE = 36, 576


def test_the_published_share_of_fastv():
    """K = 3, R = 50 %: 57 % of LLaVA-1.5's prefill, as the authors' evaluation says."""
    assert round(100 * LLAVA_7B.share_left(3, SYSTEM + IMAGE, SYSTEM + IMAGE // 2)) == 57


@pytest.mark.parametrize("size", [LLAVA_7B, LLAVA_13B])
def test_shares_at_the_ends(size):
    assert size.share_left(2, 612, 612) == 1.0
    assert size.share_left(size.layers, 612, 36) == 1.0
    assert size.share_left(2, 612, 324) > size.share_left(1, 612, 324) > size.share_left(1, 612, 180)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_what_is_counted_is_the_formula():
    """LLaVA-1.5-7B with all sizes but the number of layers divided by 32: the same share of attention."""
    vision, text, vocabulary = IMAGE // 32, 4, 40
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(vision + text)[None]
    seen = (ids > 0) & (ids <= vision)
    with modality(seen):
        (graph,) = capture_graphs(model, input_ids=ids, logits_to_keep=1)
    state = graph.state
    state.policy = PackPolicy(passes=(FastV(2, 0.5),))

    def counted(*more: Tensor) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            GraphModule(graph.module, state.graph)(*graph.arguments, *more)
        return counter.get_total_flops() // 2 - 128 * vocabulary  # pairs, without the head

    dense = counted()
    find_attention(state)
    find_modality(state)
    assert prune_tokens(state) == 1
    fewer = counted(seen)
    size = DecoderSize(layers=32, width=128, inner=344, kv_width=64, gated=True)
    assert dense == 32 * size.layer_cost(vision + text)
    assert fewer == 2 * size.layer_cost(vision + text) + 30 * size.layer_cost(vision // 2 + text)
    assert fewer / dense == pytest.approx(size.share_left(2, vision + text, vision // 2 + text))
