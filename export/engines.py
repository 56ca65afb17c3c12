"""ONNX models to TensorRT engines. A strongly typed network: every tensor has the dtype that the model says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from attnpack_fx.export import profiles
from attnpack_fx.export.program import Program
from attnpack_fx.export.tensorrt_library import logger, told

#: Compute capabilities of GPUs that a TensorRT-RTX engine is for, unless the caller says otherwise: its own default.
CAPABILITIES = ("80", "86", "89", "120")
#: How many of a parser's or builder's errors an exception quotes.
_QUOTED = 8


@dataclass(frozen=True)
class Parsed:
    """A network, and what has to live as long as it does."""

    builder: Any
    parser: Any
    network: Any


def parse(trt: ModuleType, path: Path) -> Parsed:
    """The network of an ONNX model. Raises `NotImplementedError` that lists all nodes that the parser refuses."""
    log = logger(trt)
    log.errors.clear()
    builder = trt.Builder(log)
    # TensorRT 11 has no other networks, and may have dropped the flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        raise NotImplementedError(
            f"export_tensorrt: {path.name}: {told(trt)} refuses {len(errors)} nodes of the ONNX model: "
            f"{_listed([_refused(error) for error in errors])}; take export_onnx or export_aoti for this model"
        )
    for number in range(network.num_layers):
        _allow_decomposition(trt, network.get_layer(number))
    return Parsed(builder, parser, network)


def build(trt: ModuleType, parsed: Parsed, each: Program, compute_capabilities: Sequence[str] | None) -> Any:
    """The serialised engine of a step, a buffer of bytes.

    compute_capabilities: as `checked_capabilities` returns them. Raises `RuntimeError` with TensorRT's errors.
    """
    log = logger(trt)
    log.errors.clear()
    config = parsed.builder.create_builder_config()
    # On by default; its products have three digits, of which the factorisation of a prefill makes none.
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = parsed.builder.create_optimization_profile()
    for spec in each.step.inputs:
        if spec.dims:
            profile.set_shape(spec.name, *profiles.shapes(each, spec))
    config.add_optimization_profile(profile)
    if compute_capabilities is not None:
        config.num_compute_capabilities = len(compute_capabilities)
        for number, name in enumerate(compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{name}"), number)
    engine = parsed.builder.build_serialized_network(parsed.network, config)
    if engine is None:
        raise RuntimeError(
            f"export_tensorrt: {each.step.name}: {told(trt)} builds no engine: "
            f"{_listed(log.errors) or 'its log says why'}; where memory is short, give smaller dims"
        )
    return engine


def checked_capabilities(trt: ModuleType, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The compute capabilities to build for; None for TensorRT, which builds for the GPU that is there.

    given: such as ("80", "89"), None for `CAPABILITIES`. Raises ValueError for those that TensorRT-RTX does not have,
    and for any of TensorRT.
    """
    if trt.__name__ != "tensorrt_rtx":
        if given is None:
            return None
        raise ValueError(
            f"compute_capabilities: got {given!r}, but {told(trt)} builds for the GPU that is there; leave it out, or "
            "give library='tensorrt_rtx'"
        )
    names = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    chosen = CAPABILITIES if given is None else given
    valid = not isinstance(chosen, str) and len(chosen) > 0 and len(set(chosen)) == len(chosen)
    if not valid or any(name not in names for name in chosen):
        raise ValueError(
            f"compute_capabilities: got {given!r}, expected some of {', '.join(map(repr, names))}, which {told(trt)} "
            "has; for other GPUs take library='tensorrt' on one of them, export_onnx or export_aoti"
        )
    return tuple(chosen)


def _allow_decomposition(trt: ModuleType, layer: Any) -> None:
    """Let attention be several kernels where no fused one has its sizes; the build fails otherwise."""
    boundary = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if boundary is None or layer.type != boundary:
        return
    if not hasattr(layer, "attention"):
        # The bindings hand out the base class of this layer: what its type is has to be said, as with all such layers.
        layer.__class__ = trt.IAttentionInputLayer
    layer.attention.decomposable = True


def _refused(error: Any) -> str:
    return f"{error.node_operator() or 'model'} ({error.node_name()}): {error.code().name}, {error.desc()}"


def _listed(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _QUOTED} more" if len(texts) > _QUOTED else ""
    return "; ".join(texts[:_QUOTED]) + more
