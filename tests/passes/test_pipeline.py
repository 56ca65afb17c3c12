"""The passes run in their order, report their counts, and there is a way out that rewrites nothing."""

import torch
import torch.nn.functional as F

from attnpack_fx import PackedTensor
from attnpack_fx.backend import _module, _state_of
from attnpack_fx.passes import pipeline
from attnpack_fx.passes.state import Plain
from attnpack_fx.runtime import Runtime
from tests.decoder import close
from tests.packing_inputs import VISION_ONLY, packed_pair
from tests.passes.capture import capture, operations


def step(past_key, past_value, query, key, value):
    key = torch.cat([past_key, key], dim=2)
    value = torch.cat([past_value, value], dim=2)
    return F.scaled_dot_product_attention(query, key, value), key, value


def arguments():
    key, value, *_ = packed_pair(VISION_ONLY)
    return key, value, *torch.randn((3, 2, 2, 1, 8), generator=torch.Generator().manual_seed(0))


def names(state):
    return [name.removesuffix(".default") for name in operations(state)]


def run(rewrite, *given):
    """Call `step` through its rewritten graph as the backend would, without Inductor."""

    def backend(gm, example_inputs):
        state = _state_of(gm, example_inputs, VISION_ONLY)
        rewrite(state)
        return Runtime(_module(gm, state.graph), state, VISION_ONLY)

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(step, backend=backend, fullgraph=True)(*given)


def test_every_pass_reports_its_count():
    counts = pipeline.run(capture(step, *arguments()))
    assert list(counts) == [
        "find_attention",
        "find_windows",
        "find_modality",
        "prune_tokens",
        "pack_cache",
        "batch_compress",
        "merge_appends",
        "route_linear",
        "cleanup",
    ]
    assert (counts["find_attention"], counts["find_modality"], counts["pack_cache"]) == (1, 0, 1)
    assert counts["cleanup"] > 0


def test_the_fallback_decompresses_and_rewrites_nothing_else():
    given = arguments()
    state = capture(step, *given)
    before = names(state)
    pipeline.run_fallback(state)
    after = names(state)
    assert after.count("decompress") == 2
    assert [name for name in after if name in before] == [name for name in before if name in after]
    assert not {"append_", "attention", "compress"} & set(after)
    assert state.outputs == [Plain(0), Plain(1), Plain(2)]
    assert not state.packed.keys() & state.inputs.keys()


def test_the_fallback_computes_what_eager_does():
    given = arguments()
    dense = [item.dense() if isinstance(item, PackedTensor) else item for item in given]
    for actual, expected in zip(run(pipeline.run_fallback, *given), step(*dense), strict=True):
        assert not isinstance(actual, PackedTensor)
        close(actual, expected)


def test_the_rewritten_graph_computes_what_eager_does():
    given = arguments()
    dense = [item.dense() if isinstance(item, PackedTensor) else item for item in given]
    out, key, _ = run(pipeline.run, *given)
    expected, dense_key, _ = step(*dense)
    close(out, expected)
    assert isinstance(key, PackedTensor)
    close(key.dense(), dense_key)
