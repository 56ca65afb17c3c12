"""Engines are built by TensorRT-RTX, which needs no GPU for it; nothing runs them here."""

import ctypes
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from attnpack_fx import PackPolicy
from attnpack_fx.export import (
    ArtefactError,
    PackedGenerator,
    engines,
    export_tensorrt,
    factorize,
    manifest,
    profiles,
    tensorrt_library,
    torch_tensorrt_engines,
)
from attnpack_fx.export.manifest import Manifest, StepFiles
from attnpack_fx.export.program import Program
from attnpack_fx.export.runtime import tensorrt_session
from attnpack_fx.export.runtime.loading import load
from attnpack_fx.export.runtime.tensorrt_session import TensorRTSession
from attnpack_fx.export.signature import Range, TensorSpec
from attnpack_fx.export.steps import AnglesStep, DecodeStep
from attnpack_fx.export.to_onnx import OPSET, write_models
from tests.export.tiny import captured, coded_llava, folding_llama

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Built:
    """A folder of files, steps, and the networks that their ONNX models were parsed to, by name."""

    folder: Path
    steps: dict[str, Program]
    networks: dict[str, engines.Parsed]


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def llava(trt: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The artefact of a model with images."""
    folder = tmp_path_factory.mktemp("llava") / "artefact"
    parse, build, networks, steps = engines.parse, engines.build, {}, {}

    def parsing(trt: Any, path: Path) -> engines.Parsed:
        networks[path.stem] = parse(trt, path)
        return networks[path.stem]

    def building(trt: Any, parsed: engines.Parsed, each: Program, capabilities: Any) -> Any:
        steps[each.step.name] = each
        return build(trt, parsed, each, capabilities)

    model, policy, example = coded_llava()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "parse", parsing)
        patch.setattr(engines, "build", building)
        # One iteration of the subspace instead of three: the same operators, in a shorter program.
        patch.setattr(factorize, "_SUBSPACE", 1)
        export_tensorrt(
            model,
            policy,
            folder,
            example=example,
            dims={"sequence_length": (1, 256), "vision_length": (0, 128), "batch_size": (1, 4)},
            library="tensorrt_rtx",
            compute_capabilities=("80", "86", "89", "120"),
        )
    return Built(folder, steps, networks)


@pytest.fixture(scope="module")
def llama(trt: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Decode and angles of a model of text, as export_tensorrt parses them."""
    folder = tmp_path_factory.mktemp("llama")
    steps = {each.step.name: each for each in captured(folding_llama(), DecodeStep, AnglesStep)}
    files = write_models(list(steps.values()), folder, OPSET, lambda text: None)
    return Built(folder, steps, {name: engines.parse(trt, folder / file) for name, file in files.items()})


@pytest.fixture(scope="module")
def artefact(llava: Built) -> Manifest:
    return manifest.read(llava.folder)


@pytest.mark.slow
def test_every_step_is_an_engine(llava: Built, artefact: Manifest) -> None:
    assert set(artefact.steps) == {"vision", "prefill", "decode"}
    assert {path.name for path in llava.folder.iterdir()} == {
        "manifest.json",
        "vision.engine",
        "prefill.engine",
        "decode.engine",
    }
    assert all((llava.folder / step.file).stat().st_size > 100_000 for step in artefact.steps.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision", "prefill", "decode"])
def test_networks_of_a_model_with_images(trt: Any, llava: Built, name: str) -> None:
    check_network(trt, llava, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "angles"])
def test_networks_of_a_model_of_text(trt: Any, llama: Built, name: str) -> None:
    check_network(trt, llama, name)


def check_network(trt: Any, built: Built, name: str) -> None:
    """Inputs and outputs are those of the step."""
    step, network = built.steps[name].step, built.networks[name].network
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    dtypes = {
        torch.float32: trt.float32,
        torch.float16: trt.float16,
        torch.int64: trt.int64,
        torch.int8: trt.int8,
        torch.uint8: trt.uint8,
    }
    inputs = [network.get_input(number) for number in range(network.num_inputs)]
    outputs = [network.get_output(number) for number in range(network.num_outputs)]
    for tensors, specs in ((inputs, step.inputs), (outputs, step.outputs)):
        assert [tensor.name for tensor in tensors] == [spec.name for spec in specs]
        assert [tensor.dtype for tensor in tensors] == [dtypes[spec.dtype] for spec in specs]
    for tensor, spec in zip(inputs, step.inputs, strict=True):
        assert tuple(tensor.shape) == tuple(size if isinstance(size, int) else -1 for size in spec.shape)
    for tensor, spec in zip(outputs, step.outputs, strict=True):
        # Some sizes are known only when it runs: those of attention, whose keys may be as many as queries.
        assert len(tensor.shape) == len(spec.shape)
        assert all(found in (-1, size) for found, size in zip(tensor.shape, spec.shape, strict=True))


@pytest.mark.slow
def test_codes_of_8_and_4_bits_go_in_and_out(artefact: Manifest) -> None:
    for tensors in (artefact.steps["prefill"].outputs, artefact.steps["decode"].inputs):
        found = {spec.name: spec.dtype for spec in tensors}
        assert found["packed.0.key"] == torch.int8
        assert found["packed.0.key.1"] == found["basis.0.key.1"] == torch.uint8


@pytest.mark.slow
def test_attention_may_be_decomposed(trt: Any, llava: Built) -> None:
    network = llava.networks["prefill"].network
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    found = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    assert len(found) == 1
    for layer in found:
        layer.__class__ = trt.IAttentionInputLayer
        assert layer.attention.decomposable


@pytest.mark.slow
def test_manifest_says_what_built_it(trt: Any, artefact: Manifest) -> None:
    assert (artefact.target, artefact.device) == ("tensorrt", "cuda")
    assert artefact.versions["tensorrt_rtx"] == trt.__version__
    assert artefact.versions["compute_capabilities"] == "80 86 89 120"


@pytest.mark.slow
def test_ranges_are_those_of_the_profiles(llava: Built, artefact: Manifest) -> None:
    decode, prefill = artefact.steps["decode"].ranges, artefact.steps["prefill"].ranges
    assert prefill["sequence_length"] == Range(1, 256)
    assert decode["sequence_length"] == Range(1, 16)
    assert decode["vision_length"] == Range(0, 128)
    assert decode["past_sequence_length"] == Range(*profiles.RANGES["past_sequence_length"])
    mask = llava.steps["decode"].step.inputs[1]
    assert mask.name == "attention_mask"
    assert profiles.shapes(llava.steps["decode"], mask) == ([1, 1], [1, 129], [4, 2064])


@pytest.mark.slow
def test_angles_build(trt: Any, llama: Built) -> None:
    assert engines.build(trt, llama.networks["angles"], llama.steps["angles"], engines.CAPABILITIES).nbytes > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "86", "89", "120"])
def test_decode_builds_for_one_gpu(trt: Any, llama: Built, capability: str) -> None:
    engine = engines.build(trt, llama.networks["decode"], llama.steps["decode"], (capability,))
    assert engine.nbytes > 100_000


@pytest.mark.slow
def test_loading_needs_a_gpu(llava: Built) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ArtefactError, match="made for a CUDA device, and there is none here"):
        PackedGenerator(llava.folder)


@pytest.mark.slow
def test_prefill_is_not_for_torch_tensorrt(llava: Built) -> None:
    with pytest.raises(NotImplementedError, match=r"prefill: Torch-TensorRT converts no loops.*builder='onnx'"):
        torch_tensorrt_engines.refuse_loops(llava.steps["prefill"])
    torch_tensorrt_engines.refuse_loops(llava.steps["decode"])


@pytest.mark.slow
def test_torch_tensorrt_converts_all_of_decode(trt: Any) -> None:
    if importlib.util.find_spec("torch_tensorrt") is None:
        pytest.skip("Torch-TensorRT is not installed")
    command = [sys.executable, "-m", "tests.export.convert_decode"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["unsupported"] == []
    assert found["supported"] == found["total"] > 100
    assert found["bytes"] > 100_000
    assert found["vision_length"] == 1
    assert "not self-consistent" not in done.stderr


# ---- errors ------------------------------------------------------------------------------------------------


def test_unsupported_nodes_are_listed(trt: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, integer = onnx.helper, onnx.TensorProto.INT32
    nodes = [
        helper.make_node("BitwiseAnd", ["a", "b"], ["c"], name="first"),
        helper.make_node("BitwiseXor", ["c", "b"], ["d"], name="second"),
    ]
    ends = [[helper.make_tensor_value_info(name, integer, [2]) for name in names] for names in ("ab", "d")]
    graph = helper.make_graph(nodes, "graph", *ends)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "model.onnx")
    with pytest.raises(NotImplementedError) as caught:
        engines.parse(trt, tmp_path / "model.onnx")
    text = str(caught.value)
    assert "model.onnx: TensorRT-RTX" in text and "refuses 2 nodes" in text
    assert "BitwiseAnd (first): UNSUPPORTED_NODE" in text and "BitwiseXor (second): UNSUPPORTED_NODE" in text
    assert "take export_onnx or export_aoti" in text


@pytest.mark.slow
def test_impossible_sizes_say_so(trt: Any, llama: Built) -> None:
    angles = llama.steps["angles"]
    wrong = Program(angles.step, angles.program, {**angles.ranges, "batch_size": Range(4, 1)})
    with pytest.raises((RuntimeError, ValueError)):
        engines.build(trt, llama.networks["angles"], wrong, ("89",))


@pytest.mark.parametrize("given", [("90",), ("8.6",), ("86", "86"), (), "86"])
def test_wrong_compute_capabilities(trt: Any, given: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compute_capabilities: got .*expected some of '75', '80'.*TensorRT-RTX"):
        export(tmp_path, library="tensorrt_rtx", compute_capabilities=given)


def test_tensorrt_takes_no_compute_capabilities() -> None:
    standard = types.ModuleType("tensorrt")
    standard.__version__ = "11.0.0"  # type: ignore[attr-defined]
    assert engines.checked_capabilities(standard, None) is None
    with pytest.raises(ValueError, match=r"TensorRT 11\.0\.0 builds for the GPU that is there"):
        engines.checked_capabilities(standard, ("80",))


def test_torch_tensorrt_takes_no_compute_capabilities(
    trt: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch_tensorrt_engines, "module", lambda trt: None)
    with pytest.raises(ValueError, match="Torch-TensorRT takes none"):
        export(tmp_path, library="tensorrt_rtx", builder="torch_tensorrt", compute_capabilities=("89",))


@pytest.mark.parametrize("builder", ["tvm", {"decode": "tvm"}, {"encode": "onnx"}])
def test_unknown_builders(builder: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"builder: got .*expected 'onnx' or 'torch_tensorrt'"):
        export(tmp_path, builder=builder)


def test_unknown_libraries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="library: got 'openvino', expected one of tensorrt, tensorrt_rtx"):
        export(tmp_path, library="openvino")


def test_other_dtypes_are_refused(trt: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"export_tensorrt: got a model in torch\.bfloat16"):
        export_tensorrt(torch.nn.Linear(2, 2).bfloat16(), PackPolicy(), tmp_path / "artefact", library="tensorrt_rtx")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Call with the name of a library that is to be missing."""
    imported, missing = importlib.import_module, set()

    def importing(name: str) -> Any:
        if name in missing:
            # As libraries fail that miss a driver: not with an ImportError.
            raise RuntimeError("libnvinfer.so is not there")
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", importing)
    yield missing.add


def test_missing_libraries(without: Callable[[str], None], tmp_path: Path) -> None:
    without("tensorrt")
    with pytest.raises(ImportError, match=r"libnvinfer.*attnpack-fx\[tensorrt\].*--extra-index-url"):
        export(tmp_path, library="tensorrt")
    without("tensorrt_rtx")
    with pytest.raises(ImportError, match=r"attnpack-fx\[tensorrt\].*attnpack-fx\[tensorrt-rtx\]"):
        export(tmp_path)


def test_missing_torch_tensorrt(trt: Any, without: Callable[[str], None], tmp_path: Path) -> None:
    without("torch_tensorrt")
    with pytest.raises(ImportError, match=r"torch_tensorrt is needed.*attnpack-fx\[tensorrt-rtx\]"):
        export(tmp_path, library="tensorrt_rtx", builder="torch_tensorrt")


def test_torch_tensorrt_of_the_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("torch_tensorrt")
    other.ENABLED_FEATURES = types.SimpleNamespace(tensorrt_rtx=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", other)
    with pytest.raises(ImportError, match="got a build on tensorrt, expected one on tensorrt_rtx"):
        torch_tensorrt_engines.module(types.ModuleType("tensorrt_rtx"))


def export(folder: Path, **options: Any) -> None:
    export_tensorrt(torch.nn.Linear(2, 2), PackPolicy(), folder / "artefact", **options)


# ---- the session, over a library that is made up -----------------------------------------------------------


class MadeUp(types.ModuleType):
    """A TensorRT whose one engine copies each input to the output of the same number, twice as long for `features`."""

    def __init__(self, ends: dict[str, tuple[str, Any, int]]) -> None:
        super().__init__("tensorrt_rtx")
        self.__version__ = "0.0"
        names = ("FLOAT", "HALF", "BF16", "INT64", "INT8", "UINT8")
        self.DataType = types.SimpleNamespace(**{name: name for name in names})
        self.TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
        severity = types.SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)
        self.ILogger = type("ILogger", (), {"Severity": severity})
        self.ends, self.runs = ends, True
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        names = list(self.ends)
        engine = types.SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            get_tensor_mode=lambda name: self.ends[name][0],
            get_tensor_dtype=lambda name: self.ends[name][1],
            get_tensor_shape=lambda name: (-1,) * self.ends[name][2],
            create_execution_context=lambda: self,
        )
        return types.SimpleNamespace(deserialize_cuda_engine=lambda content: engine if content == b"good" else None)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (given,) = self.shapes.values()
        return (2 * given[0], *given[1:])

    def execute_async_v3(self, stream: int) -> bool:
        sides = [[name for name, end in self.ends.items() if end[0] == side] for side in ("in", "out")]
        for source, target in zip(*sides, strict=True):
            count = torch.Size(self.shapes[source]).numel() * 4
            ctypes.memmove(self.addresses[target], self.addresses[source], count)
        return self.runs


def session(monkeypatch: pytest.MonkeyPatch, folder: Path, trt: MadeUp, step: StepFiles) -> TensorRTSession:
    monkeypatch.setattr(tensorrt_session, "library", lambda name: trt)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    (folder / "step.engine").write_bytes(b"good")
    versions = {"tensorrt_rtx": "0.0"}
    return TensorRTSession("step", step, folder / "step.engine", torch.device("cpu"), versions)


def a_step(dtype: torch.dtype = torch.float32, output: str = "length") -> StepFiles:
    inputs = (TensorSpec("first", dtype, ("batch", 2)), TensorSpec("second", dtype, ("length", 3)))
    outputs = (TensorSpec("one", dtype, ("batch", 2)), TensorSpec("two", dtype, (output, 3)))
    return StepFiles("step.engine", inputs, outputs, {"batch": Range(1, 8), "length": Range(0, 8)})


NAMED = {
    "first": ("in", "FLOAT", 2),
    "second": ("in", "FLOAT", 2),
    "two": ("out", "FLOAT", 2),
    "one": ("out", "FLOAT", 2),
}


@pytest.mark.parametrize("length", [0, 2])
def test_session_passes_tensors_by_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: int) -> None:
    # Torch-TensorRT's names, whose order is that of the step.
    numbered = {"tensors_0": NAMED["first"], "tensors_1": NAMED["second"], "output0": NAMED["one"]}
    numbered["output1"] = NAMED["two"]
    trt = MadeUp(numbered)
    loaded = session(monkeypatch, tmp_path, trt, a_step())
    first, second = torch.randn(3, 2), torch.randn(length, 3)
    held = loaded.hold({"second": second})
    made = loaded.run({"first": first}, held)
    assert torch.equal(made["one"], first) and torch.equal(made["two"], second)
    assert trt.shapes == {"tensors_0": (3, 2), "tensors_1": (length, 3)}


def test_session_takes_shapes_from_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = StepFiles(
        "step.engine",
        (TensorSpec("pixels", torch.float32, ("count", 3)),),
        (TensorSpec("features", torch.float32, ("feature_length", 3)),),
        {"count": Range(1, 8)},
    )
    trt = MadeUp({"pixels": ("in", "FLOAT", 2), "features": ("out", "FLOAT", 2)})
    made = session(monkeypatch, tmp_path, trt, step).run({"pixels": torch.ones(2, 3)})
    assert made["features"].shape == (4, 3) and bool((made["features"][:2] == 1).all())


@pytest.mark.parametrize(
    "ends",
    [
        {name: end for name, end in NAMED.items() if name != "second"},
        {**NAMED, "second": ("in", "HALF", 2)},
        {**NAMED, "one": ("out", "FLOAT", 3)},
    ],
)
def test_session_refuses_another_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: Any) -> None:
    with pytest.raises(ArtefactError, match="its inputs and outputs are not those of the manifest"):
        session(monkeypatch, tmp_path, MadeUp(ends), a_step())


def test_session_says_what_the_engine_is_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt_session, "library", lambda name: MadeUp(NAMED))
    (tmp_path / "step.engine").write_bytes(b"bad")
    versions = {"tensorrt_rtx": "1.5", "compute_capabilities": "86 89"}
    with pytest.raises(ArtefactError, match=r"an engine of version 1\.5 for compute capabilities 86 89"):
        TensorRTSession("step", a_step(), tmp_path / "step.engine", torch.device("cpu"), versions)


def test_session_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trt = MadeUp(NAMED)
    loaded = session(monkeypatch, tmp_path, trt, a_step())
    trt.runs = False
    with pytest.raises(RuntimeError, match=r"step: TensorRT-RTX 0\.0 does not run"):
        loaded.run({"first": torch.ones(1, 2), "second": torch.ones(1, 3)})
    with pytest.raises(ArtefactError, match="length: got 9, expected 0 to 8"):
        loaded.run({"first": torch.ones(1, 2), "second": torch.ones(9, 3)})


def test_manifest_without_a_library(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="does not say which of tensorrt, tensorrt_rtx built it"):
        TensorRTSession("step", a_step(), tmp_path / "step.engine", torch.device("cpu"), {})


def test_loading_knows_the_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(tensorrt_session, "TensorRTSession", lambda *args: made.append(args))
    steps = {"prefill": a_step(), "decode": a_step()}
    versions = {"tensorrt": "11.0"}
    load(tmp_path, Manifest("tensorrt", steps, PackPolicy(), {}, "cuda", versions), None, None)
    assert [each[0] for each in made] == ["prefill", "decode"]
    assert all(each[3:] == (torch.device("cuda", 1), versions) for each in made)


def test_log_of_the_library_is_ours(caplog: pytest.LogCaptureFixture) -> None:
    trt = MadeUp(NAMED)
    log = tensorrt_library.logger(trt)
    with caplog.at_level("DEBUG", tensorrt_library.__name__):
        for severity, message in ((1, "an error"), (2, "a warning"), (4, "chatter")):
            log.log(severity, message)
    assert log.errors == ["an error"]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
