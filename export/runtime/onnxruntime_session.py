"""Steps in ONNX Runtime. Tensors are passed by address: nothing is copied on a CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnpack_fx.export.manifest import StepFiles
from attnpack_fx.export.require import require
from attnpack_fx.export.runtime.session import Held, Session
from attnpack_fx.export.signature import ArtefactError

if TYPE_CHECKING:
    import onnxruntime

_NUMPY = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int8: "int8",
    torch.uint8: "uint8",
}


class OnnxRuntimeSession(Session):
    def __init__(
        self, name: str, step: StepFiles, path: Path, threads: int | None, providers: Sequence[Any] | None
    ) -> None:
        super().__init__(name, step, torch.device("cpu"))
        ort = require("onnxruntime", "export")
        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        # Several sessions of one artefact wait for one another: idle threads are not to keep cores busy.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0" if name != "decode" else "1")
        try:
            self._session: onnxruntime.InferenceSession = ort.InferenceSession(
                path, options, providers=list(providers) if providers else ["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ArtefactError(f"{path}: ONNX Runtime {ort.__version__} refuses it: {error}") from error
        known = {value.name for value in self._session.get_inputs()}
        if known != {spec.name for spec in step.inputs}:
            raise ArtefactError(f"{path}: its inputs are not those of the manifest; export again")
        # What ONNX Runtime wants instead of the null pointer of an empty tensor.
        self._dummy = torch.zeros(64, dtype=torch.uint8)

    def _bind(self, tensors: Mapping[str, Tensor]) -> Any:
        binding = self._session.io_binding()
        self._give(binding, tensors)
        return binding

    def _run(self, tensors: Mapping[str, Tensor], held: Held | None, sizes: Mapping[str, int]) -> Sequence[Tensor]:
        binding = self._session.io_binding() if held is None else held.bound
        self._give(binding, tensors)
        made = self.allocated(sizes)
        for number, spec in enumerate(self.step.outputs):
            if made is None:
                binding.bind_output(spec.name, "cpu")
            else:
                self._bound(binding.bind_output, spec.name, made[number])
        self._session.run_with_iobinding(binding)
        if made is None:
            made = [torch.from_numpy(value.numpy()) for value in binding.get_outputs()]
        return made

    def _give(self, binding: Any, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._bound(binding.bind_input, name, tensor)

    def _bound(self, bind: Any, name: str, tensor: Tensor) -> None:
        pointer = tensor.data_ptr() or self._dummy.data_ptr()
        bind(name, "cpu", 0, _NUMPY[tensor.dtype], list(tensor.shape), pointer)
