import pytest
import torch
from torch.library import opcheck

from attnpack_fx.kernels import ops, ops_newest
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import E4M3, E5M2, RowForm

from .inputs import Shapes, assert_close, attention_arguments, decompress_arguments, operands

attnpack = torch.ops.attnpack

#: Shapes that differ in what exists at all: segments, their tokens, tail rows, masks, rotation.
SHAPES = {
    "one segment": Shapes(),
    "two segments, GQA, batch": Shapes(
        batch=2, group=2, queries=3, segments=(9, 5), key_dim=32, mask="bool", ragged=True
    ),
    "empty segment": Shapes(segments=(0, 7), mask="additive", mask_shape=(False, True, True, True)),
    "dense rows alone": Shapes(segments=(), dtype=torch.bfloat16),
    "no appended rows": Shapes(kept=0, appended=0, dtype=torch.float16),
    "nothing": Shapes(segments=(), kept=0, appended=0),
    "keys before rotation": Shapes(rotary=16, segments=(5, 6), batch=2),
    "tables of rotary axes": Shapes(rotary=16, segments=(5, 6), batch=2, axes=3, interleaved=True),
    "blocks of columns": Shapes(segments=(9, 5), key_cuts=((1.0, 0), (0.5, 0)), value_cuts=((1.0, 0), (0.3, 0))),
    "codes and shared bases": Shapes(
        batch=2,
        segments=(9, 5),
        key_cuts=((1.0, 8), (0.5, 4), (0.0, 2)),
        value_cuts=((1.0, 2), (0.3, 0)),
        shared=True,
        ragged=True,
        dtype=torch.bfloat16,
    ),
    "coefficients or bases alone in codes": Shapes(
        batch=2,
        segments=(9, 5),
        key_cuts=((1.0, (4, 0, True)), (0.5, (0, E4M3, False))),
        value_cuts=((1.0, (E5M2, 8, True)),),
    ),
    "rows": Shapes(
        batch=2,
        segments=(9,),
        rotary=16,
        ragged=True,
        key_rows=((12, RowForm(4, group=8, zero=True)), (5, RowForm(2, codebook=True, group=16, outliers=True))),
        value_rows=((20, RowForm(2, channel=True, zero=True, rank=2, norm=True)),),
    ),
    "rows alone": Shapes(segments=(), dtype=torch.bfloat16, value_rows=((7, RowForm(E4M3, group=16)),)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    "operator", [attnpack.attention.default, attnpack.attention_weights.default, attnpack.attention_each.default]
)
def test_attention(shape, operator):
    opcheck(operator, operands(attention_arguments(shape)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_decompress(shape):
    parts = decompress_arguments(shape)["parts"]
    tensors, (layout,) = flatten(parts)
    opcheck(attnpack.decompress.default, (tensors, layout, parts.length))


@pytest.mark.parametrize("modality", [None, torch.arange(20)[None] < 12, torch.rand(2, 20) < 0.5])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("gain", [[], [4, 4, 32, 32, 0], [64, 64, 1, 1, 0]])
def test_plan(modality, text, gain):
    opcheck(
        attnpack.plan.default,
        (modality, torch.arange(20)[None] > 1, torch.empty(2, 4, 20, 8), text, gain, gain),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rank"), [(0, 4), (1, 4), (12, 4), (12, 40), (300, 8)])
def test_compress(dtype, tokens, rank):
    x = torch.randn(2, 4, 300, 64).to(dtype)
    opcheck(attnpack.compress.default, (x, torch.arange(tokens).expand(2, -1).clone(), rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rank"), [(1, 4), (12, 4), (12, 40), (300, 8)])
def test_sketch_and_align(dtype, tokens, rank):
    x = [torch.randn(2, 4, 300, 64).to(dtype) for _ in range(2)]
    index = torch.arange(tokens).expand(2, -1).clone()
    opcheck(attnpack.sketch.default, (x, index, rank))
    sketches = [attnpack.sketch(x, index, wanted) for wanted in (rank, 3)]
    coefficients, bases = (list(each) for each in zip(*sketches, strict=True))
    opcheck(attnpack.align.default, (coefficients, bases, [rank, rank - 1, 3, 2]))


@pytest.mark.parametrize(("tokens", "spare"), [(0, 0), (0, 2), (5, 0), (5, 3)])
def test_take_rows(tokens, spare):
    x = torch.randn(2, 9, 4, 8).transpose(1, 2)
    opcheck(attnpack.take_rows.default, (x, torch.arange(-1, tokens - 1).expand(2, -1).clone(), spare))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_append(count):
    tails = [torch.randn(6, 2, 4, 8), torch.randn(7, 2, 4, 16)]
    new = [torch.randn(2, count, 4, tail.shape[3]).transpose(1, 2) for tail in tails]
    opcheck(attnpack.append_.default, (tails, new, [2, 3]))


@pytest.mark.parametrize(("tokens", "old", "added", "rank"), [(9, 4, 3, 5), (0, 0, 3, 5), (9, 4, 0, 2), (9, 4, 3, 40)])
def test_fold(tokens, old, added, rank):
    basis = torch.linalg.qr(torch.randn(2, 16, old)).Q.mT.unflatten(-1, (2, 8)).transpose(1, 2).contiguous()
    opcheck(attnpack.fold.default, (torch.randn(2, tokens, old), basis, torch.randn(added, 2, 2, 8), rank))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("differentiable", ["query", "key tail", "value basis"])
def test_backward_through_the_cache_is_an_error(compiled, differentiable):
    given = attention_arguments(Shapes())
    basis = given["values"].blocks[0].basis
    leaf = {"query": given["query"], "key tail": given["keys"].tail, "value basis": basis}[differentiable]
    leaf.requires_grad_()
    function = torch.compile(ops.attention, fullgraph=True) if compiled else ops.attention
    out = function(*operands(given))
    with pytest.raises(RuntimeError, match=r"not differentiable; run under torch.no_grad\(\) or keep the cache dense"):
        out.sum().backward()


@pytest.mark.parametrize("vision_tokens", [0, 1, 30])
@pytest.mark.parametrize("dynamic", [None, True])
def test_packing_compiles_as_one_graph_with_sizes_that_depend_on_the_data(vision_tokens, dynamic):
    def pack(key, modality):
        vision, text, dense, slot = attnpack.plan(modality, None, key, False, [], [])
        coefficient, basis = attnpack.compress(key * 2.0, vision, 8)
        return (
            coefficient,
            basis,
            attnpack.take_rows(key, dense, 4),
            torch.cat([vision, text, dense], 1),
            slot,
        )

    key, modality = torch.randn(2, 4, 50, 16), (torch.arange(50) < vision_tokens).expand(2, -1).clone()
    torch.compiler.reset()
    compiled = torch.compile(pack, fullgraph=True, dynamic=dynamic)(key, modality)
    for actual, expected in zip(compiled, pack(key, modality), strict=True):
        assert actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-5)


def test_decode_steps_compile_once_and_match_eager():
    keys = attention_arguments(Shapes(kept=3, appended=0))["keys"]
    (_, *fixed), (layout,) = flatten(keys)  # the tail comes first

    def step(query, new, tail, length, *fixed):
        attnpack.append_([tail], [new], [length])
        return torch.relu(attnpack.attention(query, [tail, *fixed], layout, layout, length + 1, None, 0.25))

    tails = [torch.zeros(16, 1, 2, 16), torch.zeros(16, 1, 2, 16)]
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in range(3, 9):
        query, new = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
        outs = [
            function(query, new, tail, length, *fixed) for function, tail in zip((compiled, step), tails, strict=True)
        ]
        assert_close(*outs)
        assert torch.equal(*tails)
    assert counter.frame_count <= 2  # the second, with a length that varies, serves all further steps


def test_operators_explain_themselves():
    names = ("plan", "compress", "sketch", "align", "fold", "take_rows", "append_", "decompress", "attention")
    for name in (*names, "attention_weights", "observe"):
        assert getattr(ops, name).__doc__ == getattr(attnpack, name).__doc__ != ""
    for name in ("attention_each", "observe_newest"):
        assert getattr(ops_newest, name).__doc__ == getattr(attnpack, name).__doc__ != ""


@pytest.mark.parametrize("pivotal", [False, True])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("queries", [3, 40])
def test_observe_newest(pivotal, together, queries):
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 40, 8)
    opcheck(attnpack.observe_newest.default, (query, key, None, 0.3, False, pivotal, together))
