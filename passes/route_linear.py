"""Send the linear layers of a packed decode step on a CPU to oneDNN.

Once attention reads a few megabytes, the weights are nearly all a decode step reads, and PyTorch's own choice for fp32
(MKL's sgemm)
repacks each weight at every call with a few rows: two to three times slower than streaming it. Inductor itself uses
oneDNN only for
frozen weights. This has nothing to do with the packed cache, and a dense model would gain as much.
"""

import math

import torch
from torch.fx import Node

from attnpack_fx.kernels import ops  # noqa: F401  (registers torch.ops.attnpack)
from attnpack_fx.passes.patterns import argument, is_call
from attnpack_fx.passes.state import GraphState

#: Most rows for which oneDNN was faster.
MOST_ROWS = 32


def route_linear(state: GraphState) -> int:
    """Replace `F.linear` by `attnpack::linear` where that pays; returns how many.

    Only in graphs that read a packed cache (decode steps), without gradients, for plain fp32 weights.
    """
    if not state.pairs or torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
        return 0
    if torch._inductor.config.freezing:
        return 0
    found = [node for node in state.graph.nodes if is_call(node, "linear") and _pays(node)]
    for node in found:
        arguments = tuple(argument(node, position, name) for position, name in enumerate(("input", "weight", "bias")))
        with state.graph.inserting_before(node):
            routed = state.graph.call_function(torch.ops.attnpack.linear.default, arguments)
        routed.meta["example_value"] = node.meta["example_value"]
        node.replace_all_uses_with(routed)
    return len(found)


def _pays(node: Node) -> bool:
    x, weight = (argument(node, position, name) for position, name in enumerate(("input", "weight")))
    if not isinstance(x, Node) or not isinstance(weight, Node) or node.op != "call_function":
        return False
    values = [item.meta.get("example_value") for item in (x, weight)]
    for value in values:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.device.type != "cpu":
            return False
    leading = values[0].shape[:-1]  # type: ignore[union-attr]
    return all(isinstance(size, int) for size in leading) and 1 <= math.prod(leading) <= MOST_ROWS
