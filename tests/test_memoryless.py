"""Every way from a packed tensor to memory gives the dense contents or an error that names `.dense()`."""

import copy
import io
import json
import multiprocessing
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from attnpack_fx import PackedTensor
from tests.packing_inputs import packed_pair
from tests.ways_out import GUARDED, THROWN


def saved_by_numpy(packed: Tensor) -> Any:
    file = io.BytesIO()
    np.save(file, packed)
    file.seek(0)
    return np.load(file)


def saved_by_torch(packed: Tensor, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(packed, file, **options)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved_by_checkpoint(packed: Tensor) -> Tensor:
    import torch.distributed.checkpoint as checkpoint

    loaded = {"cache": torch.zeros(packed.shape)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save({"cache": packed}, checkpoint_id=folder, no_dist=True)
        checkpoint.load(loaded, checkpoint_id=folder, no_dist=True)
    return loaded["cache"]


def saved_by_safetensors(packed: Tensor) -> Tensor:
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load(safetensors.save({"cache": packed}))["cache"]


def sent_through_a_queue(packed: Tensor) -> Any:
    queue = multiprocessing.get_context("fork").SimpleQueue()
    queue.put(packed)
    return queue.get()


def collective(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Called in a process group of one."""

    def way(packed: Tensor) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
            try:
                call(packed)
            finally:
                dist.destroy_process_group()
        return packed

    return way


def gathered(packed: Tensor) -> Tensor:
    received = torch.zeros(packed.shape)
    collective(lambda packed: dist.all_gather_into_tensor(received, packed))(packed)
    return received


def written(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Zeros into which the packed tensor was written."""

    def way(packed: Tensor) -> Tensor:
        target = torch.zeros(packed.shape)
        write(target, packed)
        return target

    return way


def assigned_data(packed: Tensor) -> None:
    packed.data = torch.zeros(packed.shape)


def loaded_by_a_module(packed: Tensor) -> Tensor:
    module = torch.nn.Module()
    module.register_buffer("cache", torch.zeros(packed.shape))
    module.load_state_dict({"cache": packed})
    return module.cache  # type: ignore[return-value]


WAYS: dict[str, Callable[[Tensor], Any]] = {
    # to NumPy and Python
    "numpy": lambda packed: packed.numpy(),
    "numpy by force": lambda packed: packed.numpy(force=True),
    "numpy of another subclass": lambda packed: packed.as_subclass(torch.Tensor).numpy(),
    "__array__": lambda packed: packed.__array__(),
    "np.asarray": np.asarray,
    "np.asarray of a dtype": lambda packed: np.asarray(packed, dtype=np.float64),
    "np.array": np.array,
    "np.array without a copy": lambda packed: np.array(packed, copy=False),
    "np.stack": lambda packed: np.stack([packed])[0],
    "np.add": lambda packed: np.add(packed, 0),
    "np.save": saved_by_numpy,
    "np.ctypeslib": np.ctypeslib.as_array,
    "tolist": lambda packed: packed.tolist(),
    "iteration": lambda packed: torch.stack(list(packed)),
    "unbind": lambda packed: torch.stack(packed.unbind(2), 2),
    # to an address
    "const_data_ptr": lambda packed: packed.const_data_ptr(),
    "storage": lambda packed: packed.storage(),
    "_typed_storage": lambda packed: packed._typed_storage(),
    "resized storage": lambda packed: packed.untyped_storage().resize_(0),
    "safetensors": saved_by_safetensors,
    # to tensors
    "torch.tensor": lambda packed: torch.tensor(packed),
    "torch.as_tensor": torch.as_tensor,
    "torch.asarray": lambda packed: torch.asarray(packed, copy=True),
    "torch.Tensor": lambda packed: torch.Tensor(packed),
    "torch.FloatTensor": lambda packed: torch.FloatTensor(packed),
    "Parameter": lambda packed: torch.nn.Parameter(packed, requires_grad=False),
    "data": lambda packed: packed.data,
    "contiguous": lambda packed: packed.contiguous(),
    "view": lambda packed: packed.view(-1).view(packed.shape),
    "view as another dtype": lambda packed: packed.view(torch.int32).view(torch.float32),
    "as_strided": lambda packed: packed.as_strided(packed.shape, packed.stride()),
    "double": lambda packed: packed.double(),
    # to files and processes
    "pickle": lambda packed: pickle.loads(pickle.dumps(packed)),
    "copy": copy.copy,
    "torch.save": saved_by_torch,
    "torch.save as before 1.6": lambda packed: saved_by_torch(packed, _use_new_zipfile_serialization=False),
    "ForkingPickler": lambda packed: pickle.loads(ForkingPickler.dumps(packed)),
    "queue": sent_through_a_queue,
    "distributed checkpoint": saved_by_checkpoint,
    "default_collate": lambda packed: default_collate([packed])[0],
    "DataLoader": lambda packed: next(iter(DataLoader(TensorDataset(packed), batch_size=packed.shape[0])))[0],
    # to other tensors
    "copy_ to": written(lambda target, packed: target.copy_(packed)),
    "item assignment to": written(lambda target, packed: target.__setitem__(slice(None), packed)),
    "add_ to": written(lambda target, packed: target.add_(packed)),
    "out": written(lambda target, packed: torch.add(packed, 0, out=target)),
    "cat out": written(lambda target, packed: torch.cat([packed], out=target)),
    "foreach copy to": written(lambda target, packed: torch._foreach_copy_([target], [packed])),
    "set_ to": written(lambda target, packed: target.set_(packed)),
    "load_state_dict": loaded_by_a_module,
    "all_gather of": gathered,
    # into the packed tensor
    "copy_ into": lambda packed: packed.copy_(torch.zeros(packed.shape)),
    "out into": lambda packed: torch.neg(torch.zeros(packed.shape), out=packed),
    "foreach add_ into": lambda packed: torch._foreach_add_([packed], 1),
    "set_": lambda packed: packed.set_(torch.zeros(3)),
    "resize_": lambda packed: packed.resize_(3),
    "data assignment": assigned_data,
    "map_": lambda packed: packed.map_(torch.zeros(packed.shape), lambda *numbers: numbers[1]),
    "all_reduce into": collective(dist.all_reduce),
    "broadcast into": collective(lambda packed: dist.broadcast(packed, 0)),
}
REFUSED = {
    *("np.array without a copy", "const_data_ptr", "storage", "_typed_storage", "resized storage", "safetensors"),
    *("copy_ into", "out into", "foreach add_ into", "set_", "resize_", "data assignment", "map_"),
    *("all_reduce into", "broadcast into"),
}
REFUSED_APART = {
    "__dlpack__ without a copy",
    "data_ptr",
    "untyped_storage",
    "shared file of the storage",
    "apply_",
    "map2_",
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_memory_gives_the_dense_contents_or_says_how(way):
    packed = packed_pair()[0]
    expected = packed.dense()
    if way in REFUSED:
        with pytest.raises(
            (RuntimeError, NotImplementedError, ValueError), match=r"[Gg]ot .* expected .*`\.dense\(\)`"
        ):
            WAYS[way](packed)
    else:
        result = WAYS[way](packed)
        dense = result.dense() if isinstance(result, PackedTensor) else torch.as_tensor(result)
        torch.testing.assert_close(dense, expected.to(dense.dtype))
    torch.testing.assert_close(packed.dense(), expected)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What came of every way that may end its process."""
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-m", "tests.ways_out"], cwd=root, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


@pytest.mark.parametrize("way", GUARDED)
def test_no_way_ends_the_process(way, outcomes):
    if way in REFUSED_APART:
        assert "expected" in outcomes[way] and "`.dense()`" in outcomes[way]
    else:
        assert outcomes[way] == "equal"


@pytest.mark.parametrize("way", THROWN)
def test_code_that_asks_nothing_of_the_tensor_throws(way, outcomes):
    assert outcomes[way].startswith("RuntimeError: Cannot access data pointer")


def test_what_is_written_into_a_copy_is_not_lost_without_a_word():
    packed = packed_pair()[0]
    for shared in (packed.numpy(), np.asarray(packed), np.asarray(packed, dtype=np.float32)):
        with pytest.raises(ValueError, match="read-only"):
            shared[0] = 1.0
    for copied in (packed.numpy(force=True), np.array(packed), np.asarray(packed, dtype=np.float64)):
        copied[0] = 1.0


def test_shared_memory_holds_every_part():
    packed = packed_pair()[0]
    assert not packed.is_shared()
    packed.share_memory_()
    assert packed.is_shared() and all(part.is_shared() for part in packed.tensors)


def _total(packed: Tensor, results: Any) -> None:
    results.put((type(packed).__name__, float(packed.sum())))


@pytest.mark.slow
def test_a_process_that_starts_takes_one_as_an_argument():
    packed = packed_pair()[0]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_total, args=(packed, results))
    process.start()
    process.join()
    assert process.exitcode == 0
    name, total = results.get()
    assert name == "PackedTensor" and abs(total - float(packed.dense().sum())) < 1e-3


def test_methods_and_masks_mean_what_they_mean_for_any_tensor():
    packed = packed_pair()[0]
    assert torch.equal(packed.select(2, 3), packed.dense().select(2, 3))
    mask = torch.zeros(packed.shape[0], dtype=torch.uint8)
    mask[0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch wants bool instead
        assert torch.equal(packed[mask].dense(), packed.dense()[mask])


COMPILED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "numpy": lambda packed, x: torch.from_numpy(packed.numpy() * 2) + x,
    "asarray": lambda packed, x: torch.from_numpy(np.asarray(packed) * 2) + x,
    "contiguous": lambda packed, x: packed.contiguous() + x,
    "data": lambda packed, x: packed.data + x,
    "tolist": lambda packed, x: torch.tensor(packed.tolist()) + x,
    "dlpack": lambda packed, x: torch.from_dlpack(packed) + x,
    "copy_": lambda packed, x: torch.zeros(packed.shape).copy_(packed) + x,
    "out": lambda packed, x: torch.add(packed, x, out=torch.empty(packed.shape)),
    "storage": lambda packed, x: x + packed.untyped_storage().nbytes(),
    "data_ptr": lambda packed, x: x + float(packed.data_ptr()),
}


@pytest.mark.filterwarnings("ignore:attnpack", "ignore:Dynamo does not know")
@pytest.mark.parametrize("way", COMPILED)
def test_compiled_code_reads_the_dense_contents_too(way, without_inductor):
    packed = packed_pair()[0]
    x = torch.ones(packed.shape)
    compiled = torch.compile(COMPILED[way], backend="attnpack")
    with torch.no_grad():
        if way in ("storage", "data_ptr"):
            with pytest.raises(RuntimeError, match=r"`\.dense\(\)`"):
                compiled(packed, x)
        else:
            torch.testing.assert_close(compiled(packed, x), COMPILED[way](packed.dense(), x))


@pytest.mark.filterwarnings("ignore:attnpack")
def test_a_graph_may_ask_for_the_dense_contents(without_inductor):
    packed = packed_pair()[0]
    compiled = torch.compile(lambda packed: packed.dense() * 2 + packed, backend="attnpack", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(packed), packed.dense() * 3)


def test_a_file_says_what_to_import_before_it_is_loaded(tmp_path):
    torch.save(packed_pair()[0], tmp_path / "cache.pt")
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cache.pt"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "import_attnpack_fx_before_loading" in ran.stderr
    code = f"import attnpack_fx; {code}"
    subprocess.run([sys.executable, "-c", code, tmp_path / "cache.pt"], check=True, cwd=tmp_path)
