"""Steps as TensorRT engines. Tensors are passed by address, on PyTorch's current stream."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.export.manifest import StepFiles
from attnpack_fx.export.runtime.session import Held, Session
from attnpack_fx.export.signature import ArtefactError, TensorSpec
from attnpack_fx.export.tensorrt_library import LIBRARIES, library, logger, told

#: What Torch-TensorRT calls a step's inputs and outputs, by their number; TensorRT's parser keeps their names.
INPUT, OUTPUT = "tensors_{}", "output{}"


class TensorRTSession(Session):
    """versions: of the manifest, which say what library built the engine, in what version."""

    def __init__(
        self, name: str, step: StepFiles, path: Path, device: torch.device, versions: Mapping[str, str]
    ) -> None:
        super().__init__(name, step, device)
        trt = self._trt = _library(path, versions)
        # An engine is not to outlive its runtime.
        self._runtime = trt.Runtime(logger(trt))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ArtefactError(
                f"{path}: {told(trt)} refuses it, an engine of version {versions[trt.__name__]} for compute "
                f"capabilities {versions.get('compute_capabilities', 'unknown')}: {'; '.join(logger(trt).errors)}; "
                "install that version, or export again for this GPU"
            )
        self._inputs = self._names(path, step.inputs, trt.TensorIOMode.INPUT, INPUT)
        self._outputs = self._names(path, step.outputs, trt.TensorIOMode.OUTPUT, OUTPUT)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise RuntimeError(
                f"{path}: {told(trt)} has no room for its activations: {'; '.join(logger(trt).errors)}; "
                "export again with smaller dims"
            )
        # An empty tensor's address is null, which TensorRT takes for one that was not given.
        self._dummy = torch.zeros(64, dtype=torch.uint8, device=device)

    def _run(self, tensors: Mapping[str, Tensor], held: Held | None, sizes: Mapping[str, int]) -> Sequence[Tensor]:
        given = tensors if held is None else {**held.tensors, **tensors}
        context = self._context
        for spec in self.step.inputs:
            name, tensor = self._inputs[spec.name], given[spec.name]
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise self._failed(f"{spec.name}: refuses shape {list(tensor.shape)}")
            self._address(name, tensor)
        made = self.allocated(sizes)
        if made is None:
            made = self._allocated_by_engine()
        for spec, tensor in zip(self.step.outputs, made, strict=True):
            self._address(self._outputs[spec.name], tensor)
        if not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise self._failed("does not run")
        return made

    def _allocated_by_engine(self) -> list[Tensor]:
        """Room for the outputs, whose shapes follow from those of the inputs as TensorRT knows."""
        if unknown := self._context.infer_shapes():
            raise self._failed(f"knows no shape of {', '.join(unknown)}")
        return [
            torch.empty(
                tuple(self._context.get_tensor_shape(self._outputs[spec.name])), dtype=spec.dtype, device=self.device
            )
            for spec in self.step.outputs
        ]

    def _address(self, name: str, tensor: Tensor) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr() or self._dummy.data_ptr()):
            raise self._failed(f"takes no tensor {name}")

    def _names(self, path: Path, specs: Sequence[TensorSpec], mode: Any, numbered: str) -> dict[str, str]:
        """The engine's names of the tensors. Raises `ArtefactError` where they are not the manifest's."""
        engine = self._engine
        every = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        there = {name for name in every if engine.get_tensor_mode(name) == mode}
        own = {spec.name: spec.name for spec in specs}
        if there != set(own):
            own = {spec.name: numbered.format(number) for number, spec in enumerate(specs)}
        dtypes = _dtypes(self._trt)
        if there != set(own.values()) or any(
            dtypes.get(engine.get_tensor_dtype(own[spec.name])) != spec.dtype
            or len(engine.get_tensor_shape(own[spec.name])) != len(spec.shape)
            for spec in specs
        ):
            raise ArtefactError(f"{path}: its inputs and outputs are not those of the manifest; export again")
        return own

    def _failed(self, what: str) -> RuntimeError:
        return RuntimeError(f"{self.name}: {told(self._trt)} {what}: {'; '.join(logger(self._trt).errors)}")


def _library(path: Path, versions: Mapping[str, str]) -> ModuleType:
    found = [name for name in LIBRARIES if name in versions]
    if len(found) != 1:
        raise ArtefactError(f"{path}: its manifest does not say which of {', '.join(LIBRARIES)} built it; export again")
    return library(found[0])


def _dtypes(trt: ModuleType) -> dict[Any, torch.dtype]:
    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT8: torch.int8,
        trt.DataType.UINT8: torch.uint8,
    }
