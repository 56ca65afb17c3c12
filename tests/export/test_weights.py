from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnpack_fx.export.weights import NAME, SharedWeights

RANDOM = np.random.default_rng(0)
SHARED = RANDOM.standard_normal((40, 64)).astype(np.float32)
OWN = [RANDOM.standard_normal((64, 32)).astype(np.float32) for _ in range(2)]
SMALL = RANDOM.standard_normal(32).astype(np.float32)


def model(number: int) -> onnx.ModelProto:
    """`x shared own + small`, with a shape as an initialiser of few bytes."""
    values = {"shared": SHARED, "own": OWN[number], "small": SMALL}
    nodes = [
        helper.make_node("MatMul", ["x", "shared"], ["first"]),
        helper.make_node("MatMul", ["first", "own"], ["second"]),
        helper.make_node("Add", ["second", "small"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def in_a_loop(times: int) -> onnx.ModelProto:
    """A large initialiser within the body of a loop."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["before", "inner"], ["after"]),
            helper.make_node("Identity", ["condition"], ["again"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [40, 64]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [40, 64]),
        ],
        [numpy_helper.from_array(SHARED, "inner")],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [40, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [40, 64])],
        [numpy_helper.from_array(np.array(times, dtype=np.int64), "times")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def saved(folder: Path, models: dict[str, onnx.ModelProto]) -> None:
    weights = SharedWeights(folder)
    for name, each in models.items():
        weights.save(onnx_ir.serde.deserialize_model(each), name)
    weights.close()


def run(made: onnx.ModelProto | str, x: np.ndarray) -> np.ndarray:
    given = made if isinstance(made, str) else made.SerializeToString()
    return onnxruntime.InferenceSession(given, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path, {f"{number}.onnx": model(number) for number in range(2)})
    return tmp_path


def external(path: Path) -> dict[str, dict[str, str]]:
    """Where a model's external tensors lie."""
    graph = onnx.load(path, load_external_data=False).graph
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


def test_models_load_back_equal(folder):
    x = RANDOM.standard_normal((3, 40)).astype(np.float32)
    for number in range(2):
        path = folder / f"{number}.onnx"
        onnx.checker.check_model(path, full_check=True)
        loaded = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        for name, expected in (("shared", SHARED), ("own", OWN[number]), ("small", SMALL)):
            np.testing.assert_array_equal(loaded[name], expected)
        np.testing.assert_array_equal(run(str(path), x), run(model(number), x))


def test_every_tensor_is_written_once(folder):
    first, second = (external(folder / f"{number}.onnx") for number in range(2))
    # Small ones stay in the model.
    assert first.keys() == second.keys() == {"shared", "own"}
    assert first["shared"] == second["shared"] and first["own"]["offset"] != second["own"]["offset"]
    used = {int(place["offset"]): int(place["length"]) for each in (first, second) for place in each.values()}
    assert sorted(used.values()) == sorted([SHARED.nbytes, OWN[0].nbytes, OWN[1].nbytes])
    assert all(offset % 4096 == 0 for offset in used)
    last = max(used)
    assert (folder / NAME).stat().st_size == last + used[last]
    assert {path.name for path in folder.iterdir()} == {"0.onnx", "1.onnx", NAME}


def test_places_are_relative_so_that_a_folder_can_be_moved(folder, tmp_path_factory):
    assert {place["location"] for place in external(folder / "0.onnx").values()} == {NAME}
    moved = folder.rename(tmp_path_factory.mktemp("other") / "place")
    x = np.ones((1, 40), dtype=np.float32)
    np.testing.assert_array_equal(run(str(moved / "0.onnx"), x), run(model(0), x))


def test_tensors_of_loops_are_shared_too(tmp_path):
    saved(tmp_path, {"0.onnx": model(0), "loop.onnx": in_a_loop(3)})
    x = np.zeros((40, 64), dtype=np.float32)
    np.testing.assert_allclose(run(str(tmp_path / "loop.onnx"), x), 3 * SHARED, rtol=1e-6)
    # Nothing beyond what the first model has.
    alone = tmp_path / "alone"
    alone.mkdir()
    saved(alone, {"0.onnx": model(0)})
    assert (alone / NAME).stat().st_size == (tmp_path / NAME).stat().st_size
