"""All compressions of a graph on a GPU become sketches and one alignment; these tests take the CPU for that GPU."""

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx import PackPolicy, backend, modality
from attnpack_fx.passes import pipeline
from attnpack_fx.passes.batch_compress import batch_compress, why_not
from attnpack_fx.passes.cleanup import cleanup
from attnpack_fx.passes.find_attention import find_attention
from attnpack_fx.passes.find_modality import find_modality
from attnpack_fx.passes.pack_cache import pack_cache
from tests.packing_inputs import vision_mask
from tests.passes.capture import capture, operations

# The function has the module's name.
implementation = import_module("attnpack_fx.passes.batch_compress")

B, H, T, D = 2, 2, 24, 8
#: No more tokens of a kind than a sketch of these ranks has columns: it is exact, as `compress` is.
POLICY = PackPolicy(vision_rank=(4, 2), text_rank=3)
VISION = vision_mask(T, 2, 12)


def layers(count: int, x: Tensor, value_heads_dim: int = D) -> list[Tensor]:
    """A model of `count` layers at prefill: its last hidden state, then all keys and values."""
    kept = []
    for number in range(count):
        key, value = torch.sin(x * (number + 1)), torch.cos(x * (number + 2))[..., :value_heads_dim]
        x = x + F.pad(F.scaled_dot_product_attention(x, key, value, is_causal=True), (0, D - value_heads_dim))
        kept += [key, value]
    return [x, *kept]


def hidden(seed: int = 0) -> Tensor:
    return torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(seed))


def packed_graph(function, *arguments):
    with modality(VISION):
        state = capture(function, *arguments, policy=POLICY)
    for step in (find_attention, find_modality, pack_cache):
        step(state)
    return state


def names(state) -> list[str]:
    return [name.removesuffix(".default") for name in operations(state)]


def results(state, *arguments: Tensor) -> list[Tensor]:
    """What a graph returns; its placeholders in order are the arguments, then the mask of vision tokens."""
    with torch.no_grad():
        return torch.fx.GraphModule(torch.nn.Module(), state.graph)(*arguments, VISION.expand(B, -1))


def assert_same_factors(actual: list[Tensor], expected: list[Tensor], state) -> None:
    held = [each for spec in state.outputs if hasattr(spec, "factors") for each in spec.factors]
    pairs = [(each.coefficient, each.basis) for each in held]
    factors = {number for pair in pairs for number in pair}
    for number, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert left.shape == right.shape and left.dtype == right.dtype
        if number not in factors:
            assert torch.equal(left, right)
    for coefficient, basis in pairs:
        left, right = (factored[coefficient][:, None] @ factored[basis] for factored in (actual, expected))
        # Rounding, as large as singular values near the cut are close.
        assert right.numel() and (left - right).norm() < 1e-4 * right.norm()


#: Bytes of one of their cache tensors.
EACH = B * H * T * D * 4


@pytest.mark.parametrize(("held", "sketches"), [(6, 2), (5, 4), (2, 6), (1, 12), (0, 12)])
def test_every_compression_becomes_part_of_one_alignment(held, sketches, monkeypatch):
    monkeypatch.setattr(implementation, "GROUP_BYTES", held * EACH)
    function = partial(layers, 3)
    before, after = packed_graph(function, hidden()), packed_graph(function, hidden())
    # Three layers, keys and values, two modalities.
    assert names(before).count("compress") == 12
    assert batch_compress(after, "cpu") == 12
    cleanup(before), cleanup(after)
    ops = names(after)
    # Of vision and of text tokens, as many tensors share a sketch as may be held back.
    assert (ops.count("compress"), ops.count("sketch"), ops.count("align")) == (0, sketches, 1)
    assert max(number for number, name in enumerate(ops) if name == "sketch") < ops.index("align")
    assert set(ops[ops.index("align") + 1 :]) == {"getitem"}
    # What may not be held back is sketched in its layer.
    if held <= 2:
        assert ops.index("sketch") < ops.index("sin", ops.index("sin") + 1)
    assert before.outputs == after.outputs
    assert_same_factors(results(after, hidden(1)), results(before, hidden(1)), after)


def test_values_of_another_head_dim_have_sketches_of_their_own():
    function = partial(layers, 2, value_heads_dim=4)
    before, after = packed_graph(function, hidden()), packed_graph(function, hidden())
    assert batch_compress(after, "cpu") == 8
    assert names(after).count("sketch") == 4 and names(after).count("align") == 1
    cleanup(before), cleanup(after)
    assert_same_factors(results(after, hidden(1)), results(before, hidden(1)), after)


def test_what_is_written_to_later_is_not_held_back():
    def function(x):
        x, key, value = layers(1, x)
        key, value = key.clone(), value.clone()
        x = x + F.scaled_dot_product_attention(x, key, value, is_causal=True)
        held = key.clone()
        x.mul_(2)
        return x, key, value, held, *layers(1, x)[1:]

    before, after = packed_graph(function, hidden()), packed_graph(function, hidden())
    count = names(before).count("compress")
    assert count and batch_compress(after, "cpu") == count
    order = names(after)
    assert order.index("sketch") < order.index("mul_")
    cleanup(before), cleanup(after)
    assert_same_factors(results(after, hidden(1)), results(before, hidden(1)), after)


def test_other_devices_keep_their_compressions():
    state = packed_graph(partial(layers, 2), hidden())
    ops = names(state)
    assert batch_compress(state) == 0
    assert names(state) == ops
    node = next(node for node in state.graph.nodes if node.target is torch.ops.attnpack.compress.default)
    assert why_not(node, "cuda") == "the cache is not on cuda"
    assert why_not(node, "cpu") is None


def test_factors_that_the_graph_reads_stay():
    state = packed_graph(partial(layers, 1), hidden())
    node = next(node for node in state.graph.nodes if node.target is torch.ops.attnpack.compress.default)
    factor = next(iter(node.users))
    with state.graph.inserting_after(factor):
        state.graph.call_function(torch.neg, (factor,))
    assert why_not(node, "cpu") == "the factors are read in this graph"
    assert batch_compress(state, "cpu") == 3
    assert names(state).count("compress") == 1


def test_a_graph_without_compressions_is_left():
    state = capture(lambda x: x + 1, hidden())
    assert batch_compress(state, "cpu") == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_inductor(monkeypatch, fresh_dynamo, dtype):
    """Symbolic sizes, an unknown number of vision tokens, and the runtime that wraps the factors."""
    passes = [step for step in pipeline.PASSES if step.__name__ != "batch_compress"]
    place = next(number for number, step in enumerate(passes) if step.__name__ == "pack_cache") + 1
    counts = []

    def forced(state):
        counts.append(batch_compress(state, "cpu"))
        return counts[-1]

    monkeypatch.setattr(pipeline, "PASSES", (*passes[:place], forced, *passes[place:]))
    options = {"policy": PackPolicy(vision_rank="full", text_rank="full", strict=True)}
    function = partial(layers, 2)
    compiled = torch.compile(function, backend=backend.attnpack_backend, options=options)
    x = hidden().to(dtype)
    torch._dynamo.mark_dynamic(x, 2)
    with torch.no_grad(), modality(VISION):
        actual, expected = compiled(x), function(x)
    assert counts == [8]
    for left, right in zip(actual[1:], expected[1:], strict=True):
        assert (left.dense() - right).norm() < (3e-6 if dtype == torch.float32 else 1e-2) * right.norm()
