"""ONNX: one model a step, all with one file of weights, and what onnxruntime-genai needs to drive the decode step."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attnpack_fx.export import genai
from attnpack_fx.export.artefact import facts, finish, new_folder
from attnpack_fx.export.program import Program, capture
from attnpack_fx.export.require import require
from attnpack_fx.export.signature import TensorSpec
from attnpack_fx.export.weights import SharedWeights
from attnpack_fx.policy import PackPolicy

if TYPE_CHECKING:
    import onnx_ir

#: The first with RMSNormalization, RotaryEmbedding and Attention; PyTorch's exporter fuses them at just this one.
OPSET = 23


def export_onnx(
    model: nn.Module,
    policy: PackPolicy,
    path: str | os.PathLike[str],
    *,
    example: Mapping[str, Any] | None = None,
    processor: Any = None,
    dims: Mapping[str, tuple[int, int]] | None = None,
    opset: int = OPSET,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a model and its packed cache as ONNX, for `PackedGenerator`, ONNX Runtime or onnxruntime-genai.

    model: a transformers model, in float32 or float16. policy: what to pack (`export/policies.py` says which can be).
    path: the folder to write; an artefact there is replaced. example: inputs as the processor makes them, images
    included, from which the vision tower is exported; without, hosts give features of images, but for LLaVA and
    VipLLaVA, whose images are of one size. processor: saved beside, for `attnpack run`. dims: smallest and largest
    sizes of dimensions, by name (`program.RANGES`). opset: 18, 20, 21 or 23. progress: called with what comes next.

    Returns the folder. Raises `NotImplementedError` for models and policies that cannot be exported, `ImportError`
    where onnx, onnxscript or onnxruntime's `export` extra is missing, ValueError for a dtype ONNX Runtime lacks.
    """
    told = progress or (lambda text: None)
    prepare(model, "export_onnx")
    if opset not in (18, 20, 21, 23):
        raise ValueError(f"export_onnx: opset: got {opset!r}, expected 18, 20, 21 or 23")
    with new_folder(Path(path)) as folder:
        told("capture")
        programs = capture(model, policy, example, dims)
        files = write_models(programs.steps, folder, opset, told)
        config = genai.config(facts(programs), programs.layout, files["decode"])
        (folder / genai.NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        finish(folder, "onnx", programs, files, "any", processor, "onnx", "onnxscript")
    return Path(path)


def prepare(model: nn.Module, caller: str) -> None:
    """Raises `ImportError` where the libraries that write ONNX are missing, ValueError for a dtype no runtime has."""
    require("onnx", "export")
    require("onnxscript", "export")
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"{caller}: got a model in {dtype}, expected float32 or float16; use model.to(torch.float16)")


def write_models(steps: Sequence[Program], folder: Path, opset: int, told: Callable[[str], None]) -> dict[str, str]:
    """Write one ONNX model a step and their weights, in one file; the models' names by those of steps."""
    weights = SharedWeights(folder)
    files = {}
    for each in steps:
        told(f"{each.step.name} to ONNX")
        files[each.step.name] = f"{each.step.name}.onnx"
        weights.save(_model(each, opset), files[each.step.name])
    weights.close()
    told("check")
    for file in files.values():
        _check(folder / file)
    return files


def _model(each: Program, opset: int) -> "onnx_ir.Model":
    """The model of one step, with our names for tensors and dimensions."""
    step = each.step
    made = torch.onnx.export(
        each.program,
        dynamo=True,
        opset_version=opset,
        input_names=[spec.name for spec in step.inputs],
        output_names=[spec.name for spec in step.outputs],
        verbose=False,
    )
    assert made is not None
    model: onnx_ir.Model = made.model
    model.producer_name = "attnpack-fx"
    _free(model, [spec.name for spec in (*step.inputs, *step.outputs)])
    for values, specs in ((model.graph.inputs, step.inputs), (model.graph.outputs, step.outputs)):
        for value, spec in zip(values, specs, strict=True):
            _named(value, spec)
    return model


def _free(model: "onnx_ir.Model", names: Sequence[str]) -> None:
    """Let no value inside a model have a name of its inputs or outputs: PyTorch names these without a look there."""
    outside = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in names and id(value) not in outside:
                value.name = f"{value.name}.inside"


def _named(value: "onnx_ir.Value", spec: TensorSpec) -> None:
    import onnx_ir

    assert value.name == spec.name, (value.name, spec.name)
    value.shape = onnx_ir.Shape(spec.shape)


def _check(path: Path) -> None:
    """Types and shapes of the whole graph, as onnx itself infers them."""
    import onnx

    onnx.checker.check_model(path, full_check=True)
