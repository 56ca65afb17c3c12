"""Exported programs to TensorRT engines by Torch-TensorRT, and how much of a program it converts.

Its converters know ATen operators, which the steps are made of once `attnpack::attention` is decomposed. Loops
(`while_loop`, in a prefill's factorisation) they do not.
"""

import operator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import fx

from attnpack_fx.export import profiles
from attnpack_fx.export.program import Program
from attnpack_fx.export.require import require
from attnpack_fx.export.runtime.tensorrt_session import INPUT

#: attn_bias_is_causal: our masks are not those of causal attention alone, which it is taken for by default.
#: disable_tf32: as `engines.build` has it. decompose_attention: its own attention layer has no grouped heads.
_OPTIONS: dict[str, Any] = {
    "min_block_size": 1,
    "attn_bias_is_causal": False,
    "decompose_attention": True,
    "disable_tf32": True,
}
_PACKED = ("vision_length", "text_length")


@dataclass(frozen=True)
class Coverage:
    """How many operators a program has once Torch-TensorRT has lowered it, and how many of those its engines take.

    unsupported: names of the others, each once.
    """

    total: int
    supported: int
    unsupported: tuple[str, ...]


def module(trt: ModuleType | None = None) -> ModuleType:
    """torch_tensorrt; trt: the library that its engines have to be of.

    Raises `ImportError` that says what to install, also where it is built on the other library.
    """
    found = require("torch_tensorrt", "tensorrt", "tensorrt-rtx")
    features: Any = found.ENABLED_FEATURES
    own = "tensorrt_rtx" if features.tensorrt_rtx else "tensorrt"
    if trt is not None and trt.__name__ != own:
        raise ImportError(
            f"torch_tensorrt: got a build on {own}, expected one on {trt.__name__}; give library={own!r}, or install "
            f"{'torch-tensorrt' if own == 'tensorrt_rtx' else 'torch-tensorrt-rtx'}",
            name="torch_tensorrt",
        )
    return found


def within(each: Program) -> Program:
    """A step for fewer sizes: in a reshape, Torch-TensorRT takes a size of 0 for that of the input's dimension.

    Low-rank segments, whose weights are reshaped, are therefore never empty; other tensors may be.
    """
    ranges = {
        name: replace(allowed, least=max(1, allowed.least)) if name in _PACKED else allowed
        for name, allowed in each.ranges.items()
    }
    return replace(each, ranges=ranges)


def refuse_loops(each: Program) -> None:
    """Raises `NotImplementedError` for a program with a loop."""
    loops = {str(node.target) for node in each.program.graph.nodes if "while_loop" in str(node.target)}
    if loops:
        raise NotImplementedError(
            f"export_tensorrt: {each.step.name}: Torch-TensorRT converts no loops ({', '.join(loops)}); leave this "
            "step to TensorRT's ONNX parser: builder={'decode': 'torch_tensorrt'}, or builder='onnx' for all"
        )


def engine(trt: ModuleType, each: Program) -> bytes:
    """The serialised engine of a step; its inputs and outputs are called `tensors_0`, `output0` and so on.

    Raises `RuntimeError` where an operator is not converted, or no engine is built.
    """
    found = module(trt)
    refuse_loops(each)
    expected = [INPUT.format(number) for number in range(len(each.step.inputs))]
    assert list(each.program.graph_signature.user_inputs) == expected, "of `Step.forward`"
    try:
        made: bytes = found.dynamo.convert_exported_program_to_serialized_trt_engine(
            each.program, arg_inputs=_inputs(found, each), require_full_compilation=True, **_OPTIONS
        )
    except Exception as error:
        raise RuntimeError(
            f"export_tensorrt: {each.step.name}: Torch-TensorRT {found.__version__} builds no engine: {error}; "
            "take builder='onnx'"
        ) from error
    return made


def coverage(each: Program) -> Coverage:
    """What Torch-TensorRT would convert of a step; nothing is built.

    Raises `ImportError` where it is missing.
    """
    found = module()
    partitioned = found.dynamo.compile(each.program, arg_inputs=_inputs(found, each), dryrun=True, **_OPTIONS)
    inside, outside = 0, []
    for name, part in [("", partitioned), *partitioned.named_children()]:
        if not isinstance(part, fx.GraphModule):
            continue
        called = [node.target for node in part.graph.nodes if node.op == "call_function"]
        if "_run_on_acc" in name:
            inside += len(called)
        else:
            # Between parts, outputs are taken from tuples.
            outside += [str(target) for target in called if target != operator.getitem]
    return Coverage(inside + len(outside), inside, tuple(sorted(set(outside))))


def _inputs(found: ModuleType, each: Program) -> list[list[Any]]:
    """As the steps take them: one list of tensors."""
    made = []
    for spec in each.step.inputs:
        least, typical, most = profiles.shapes(each, spec)
        if not spec.dims:
            made.append(found.Input(shape=least, dtype=spec.dtype, name=spec.name))
            continue
        made.append(found.Input(min_shape=least, opt_shape=typical, max_shape=most, dtype=spec.dtype, name=spec.name))
    return [made]
