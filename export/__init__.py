"""Artefacts: a model and its packed cache as ONNX, TensorRT engines or AOTInductor packages, and what runs them.

    model, policy -> program.py (steps.py captured, portable.py instead of `attnpack::` operators) -> to_onnx.py ...
    artefact -> runtime/ -> tokens

Nothing here imports onnx, onnxruntime, TensorRT or transformers before it is needed.
"""

from attnpack_fx.export.model import features
from attnpack_fx.export.runtime import PackedGenerator
from attnpack_fx.export.signature import ArtefactError
from attnpack_fx.export.to_aoti import export_aoti
from attnpack_fx.export.to_onnx import export_onnx
from attnpack_fx.export.to_tensorrt import export_tensorrt

__all__ = [
    "ArtefactError",
    "PackedGenerator",
    "export_aoti",
    "export_onnx",
    "export_tensorrt",
    "features",
]
