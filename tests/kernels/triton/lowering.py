"""Prints the code Inductor would run on a GPU for a decode step's append and attention, made where there is none.

    python -m tests.kernels.triton.lowering BATCH TOKENS [plain | 4 bits | rows]

Sizes that change from step to step or prompt to prompt are symbolic. The process pretends to have a GPU and is of no
other use: run it as one of its own.
"""

import contextlib
import sys
from functools import partial
from unittest import mock

import torch
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_function
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

from attnpack_fx.kernels import ops
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import Block, PackedParts, RowForm, Segment, block_of, kind, tensor_names
from benchmarks.ahead.pretend import PROPERTIES, targeting

HEADS, RANK, DIM = 32, 64, 128
#: Rows with scales of channels and groups.
ROWS = RowForm(4, channel=True, zero=True)
#: How the packed tokens are stored: the kind of their block.
KINDS = {"plain": 0, "soft cap and sinks": 0, "4 bits": kind(Block(0, 0, 0, bits=4)), "rows": ROWS.kind}


class LoweredError(Exception):
    """The code is printed; there is nothing to run it on."""


def step(stored, query, key_tail, value_tail, index, new, count, sinks, *tensors):
    length = count.shape[0] - 2
    ops.append_([key_tail, value_tail], [new, new * 2], [length - 1, length - 1])
    names = tensor_names(KINDS[stored])
    blocks = [
        block_of(KINDS[stored], dict(zip(names, each, strict=True)))
        for each in (tensors[: len(names)], tensors[len(names) :])
    ]
    key, value = (
        PackedParts((Segment((block,)),), tail, length, index)
        for block, tail in zip(blocks, (key_tail, value_tail), strict=True)
    )
    packed, layouts = flatten(key, value)
    capped = (30.0, sinks) if stored == "soft cap and sinks" else ()
    return ops.attention(query * 2, packed, *layouts, length, None, 0.1, *capped).relu()


def lower(graph_module, examples):
    graph, shape_env = graph_module.graph, examples[1].shape[0].node.shape_env
    # As compile_fx keeps input mutations: written back inside the graph, which reinplacing then makes unnecessary.
    inputs, output = graph.find_nodes(op="placeholder"), graph.output_node()
    *written, result = output.args[0]
    with graph.inserting_before(output):
        for tail, value in zip(inputs[1:3], written, strict=True):
            graph.call_function(torch.ops.aten.copy_.default, (tail, value)).meta["val"] = tail.meta["val"]
    output.args = ((result,),)
    post_grad_passes(graph_module, True)
    graph_module.recompile()
    lowering = GraphLowering(graph_module, example_inputs=examples, shape_env=shape_env, is_inference=True, graph_id=0)
    with V.set_debug_handler(DebugContext()), V.set_graph_handler(lowering), V.set_real_inputs(examples):
        lowering.run(*examples)
        code, _ = lowering.codegen()
    code = getattr(code, "value", code)
    print(code[code.index("def call(") : code.index("def get_args(")])
    for guard in shape_env.guards:
        print("GUARD", guard.expr)
    raise LoweredError


def main(batch: int, tokens: int, stored: str) -> None:
    cuda = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda *_: PROPERTIES,
        "_get_device_properties": lambda *_: PROPERTIES,
        "get_device_capability": lambda *_: (9, 0),
    }
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with contextlib.ExitStack() as stack:
        for name, function in cuda.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", function, create=True))
        stack.enter_context(mock.patch("torch._functorch.aot_autograd.preserve_rng_state", contextlib.nullcontext))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None))
        stack.enter_context(targeting(GPUTarget("cuda", 90, 32)))
        stack.enter_context(config.patch(compile_threads=1))
        stack.enter_context(torch.no_grad())

        def new(name, *shape, dynamic=None, dtype=torch.bfloat16):
            dims = [DimDynamic.DYNAMIC if dim == dynamic else DimDynamic.STATIC for dim in range(len(shape))]
            meta = torch.empty(shape, dtype=dtype, device="meta")
            source = ConstantSource(name)
            fake = mode.from_tensor(meta, symbolic_context=StatelessSymbolicContext(dims), source=source)
            with mode:
                return torch.empty(fake.shape, dtype=dtype, device="cuda")

        half = 2 if stored == "4 bits" else 1
        dtype = torch.uint8 if stored == "4 bits" else torch.bfloat16
        made = {
            "codes": lambda: new("codes", batch, tokens, HEADS, DIM // 2, dynamic=1, dtype=torch.uint8),
            "zero": lambda: new("zero", batch, tokens // 32, HEADS, DIM, dynamic=1),
            "group_of": lambda: new("group_of", batch, tokens, dynamic=1, dtype=torch.int32),
            "coefficient": lambda: new("coefficient", batch, tokens, RANK // half, dynamic=1, dtype=dtype),
            "basis": lambda: new("basis", batch, HEADS, RANK, DIM // half, dtype=dtype),
            "scale": lambda: (
                new("scale", batch, tokens // 32, HEADS, DIM, dynamic=1)
                if stored == "rows"
                else new("scale", batch, 2, RANK, dtype=torch.float32)
            ),
        }
        arguments = (
            new("query", batch, HEADS, 1, DIM),
            new("key_tail", 80, batch, HEADS, DIM, dynamic=0),
            new("value_tail", 80, batch, HEADS, DIM, dynamic=0),
            new("index", batch, tokens + 40, dynamic=1, dtype=torch.int64),
            new("new", batch, HEADS, 1, DIM),
            new("count", 53, dynamic=0, dtype=torch.uint8),
            new("sinks", 1, HEADS),
            *(made[name]() for _ in range(2) for name in tensor_names(KINDS[stored])),
        )
        with contextlib.suppress(LoweredError):
            aot_function(partial(step, stored), fw_compiler=lower)(*arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *(sys.argv[3:] or ["plain"]))
