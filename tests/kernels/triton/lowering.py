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
from attnpack_fx.kernels.parts import Block, RowForm, kind
from benchmarks.ahead.pretend import PROPERTIES, targeting

HEADS, RANK, DIM = 32, 64, 128
#: How the packed tokens are stored: layout, and what is added to a factor's dims. Rows: scales of channels and groups.
ROWS = RowForm(4, channel=True, zero=True)
BLOCKS = {"plain": [], "soft cap and sinks": [], "4 bits": [0, kind(Block(0, 0, 0, bits=4))], "rows": [0, ROWS.kind]}


class LoweredError(Exception):
    """The code is printed; there is nothing to run it on."""


def step(
    blocks,
    cap,
    query,
    key_coefficient,
    key_basis,
    value_coefficient,
    value_basis,
    key_tail,
    value_tail,
    index,
    new,
    count,
    *scales,
):
    length = count.shape[0] - 2
    ops.append_([key_tail, value_tail], [new, new * 2], [length - 1, length - 1])
    factors = [key_coefficient], [key_basis], [value_coefficient], [value_basis]
    sinks = scales[0] if cap else None
    scales = [] if cap else list(scales)
    unrotated, more = (None, None, False, None), (blocks, blocks, scales, scales, [], [], cap, sinks)
    attended = ops.attention(
        query * 2, *factors, key_tail, value_tail, length, index, None, 0.1, False, *unrotated, *more
    )
    return attended.relu()


def lower(graph_module, examples):
    graph, shape_env = graph_module.graph, examples[1].shape[1].node.shape_env
    # As compile_fx keeps input mutations: written back inside the graph, which reinplacing then makes unnecessary.
    inputs, output = graph.find_nodes(op="placeholder"), graph.output_node()
    *written, result = output.args[0]
    with graph.inserting_before(output):
        for tail, value in zip(inputs[5:7], written, strict=True):
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

        def packed(name):
            """Coefficient and basis, or codes and scale."""
            if stored == "rows":
                codes = new(f"{name}_codes", batch, tokens, HEADS, DIM // 2, dynamic=1, dtype=torch.uint8)
                return codes, new(f"{name}_scale", batch, tokens // 32, HEADS, DIM, dynamic=1)
            dtype, together = (torch.uint8, 2) if stored == "4 bits" else (torch.bfloat16, 1)
            coefficient = new(f"{name}_coefficient", batch, tokens, RANK // together, dynamic=1, dtype=dtype)
            return coefficient, new(f"{name}_basis", batch, HEADS, RANK, DIM // together, dtype=dtype)

        scales = {
            "plain": lambda: (),
            "soft cap and sinks": lambda: (new("sinks", 1, HEADS),),
            "4 bits": lambda: (new("scale", batch, 2, RANK, dtype=torch.float32),),
            "rows": lambda: (
                new("zero", batch, tokens // 32, HEADS, DIM, dynamic=1),
                new("group_of", batch, tokens, dynamic=1, dtype=torch.int32),
            ),
        }
        arguments = (
            new("query", batch, HEADS, 1, DIM),
            *packed("key"),
            *packed("value"),
            new("key_tail", 80, batch, HEADS, DIM, dynamic=0),
            new("value_tail", 80, batch, HEADS, DIM, dynamic=0),
            new("index", batch, tokens + 40, dynamic=1, dtype=torch.int64),
            new("new", batch, HEADS, 1, DIM),
            new("count", 53, dynamic=0, dtype=torch.uint8),
            *scales[stored](),
        )
        with contextlib.suppress(LoweredError):
            aot_function(partial(step, BLOCKS[stored], 30.0 if "cap" in stored else 0.0), fw_compiler=lower)(*arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *(sys.argv[3:] or ["plain"]))
