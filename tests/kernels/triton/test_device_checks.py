"""The checks of kernels on a device, `benchmarks/gpu/kernels.py`, with Triton's interpreter in its place."""

import json
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map_only

pytest.importorskip("transformers")

from attnpack_fx.kernels import ops
from benchmarks.gpu import command, kernels, machine, recorded
from benchmarks.gpu.apart import CallFailedError

from ..inputs import attention_arguments
from . import interpreted

_MODULES = list(interpreted._MODULES.values())


@pytest.fixture
def on_a_device(monkeypatch):
    """Operators launch interpreted kernels, as they would on an H200."""
    package = interpreted._MODULES[interpreted._PACKAGE]
    monkeypatch.setattr(ops, "triton", package)
    monkeypatch.setattr(ops, "_implementation", lambda tensor: package)
    monkeypatch.setattr(kernels, "launchers", lambda: _MODULES)
    monkeypatch.setattr(machine, "_digest", lambda: "")  # sources may change while this runs
    for module in recorded._having("processors", _MODULES):
        monkeypatch.setattr(module, "processors", lambda device: 132)


class Changed:
    """A kernel after which something happens to an argument, or before which it fails."""

    def __init__(self, kernel, change):
        self.fn, self._kernel, self._change = kernel.fn, kernel, change

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self._kernel[grid](*args, **kwargs)
            self._change(kwargs)

        return launch


def some(monkeypatch, *names):
    monkeypatch.setattr(kernels, "names", lambda: set(names))
    monkeypatch.setattr(kernels.generated, "CHECKS", {})


def run(tmp_path, *arguments):
    status = command.main(["--dry", "--part", "kernels", "--out", str(tmp_path), *arguments])
    return status, json.loads((tmp_path / "kernels.json").read_text())["cases"]


def test_every_kernel_has_inputs_and_no_other_has():
    from attnpack_fx.kernels.triton import KERNELS

    assert kernels.CHECKS.keys() == {kernel.__name__ for kernel in KERNELS}


@pytest.mark.parametrize("processors", [20, 58, 108, 132, 188])
@pytest.mark.parametrize("name", [name for name, check in kernels.CHECKS.items() if isinstance(check, partial)])
def test_the_launcher_chooses_the_kernel_on_every_gpu(name, processors):
    from attnpack_fx.kernels.triton.attend import attention, takes

    found = set()
    for shape in kernels.CHECKS[name].keywords["shapes"]:
        arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), attention_arguments(shape))
        assert takes(arguments["query"], arguments["keys"], arguments["values"])
        found |= {launch.kernel for launch in recorded.launched(partial(attention, **arguments), processors)}
    assert name in found


@pytest.mark.slow
@pytest.mark.parametrize("name", kernels.CHECKS)
def test_kernels_pass(name, on_a_device):
    result = kernels.check_kernel(name, dry=True, seed=3)
    assert result["worst"].keys() == {"float32", "float16", "bfloat16"} and result["says"].startswith("ok, worst")


def test_a_wrong_kernel_is_reported_and_hides_no_other(on_a_device, monkeypatch, tmp_path, capsys):
    some(monkeypatch, "append_kernel", "rebuilt_kernel", "tokens_kernel")
    wrong = Changed(interpreted.attend.tokens_kernel, lambda given: given["partial"].mul_(1.5))
    monkeypatch.setattr(interpreted.attend, "tokens_kernel", wrong)
    broken = Changed(interpreted.append.append_kernel, lambda given: 1 // 0)
    monkeypatch.setattr(interpreted.append, "append_kernel", broken)
    status, cases = run(tmp_path, "--seed", "7")
    assert status == 1 and cases["rebuilt_kernel"]["says"].startswith("ok, worst error")
    told = cases["tokens_kernel"]["wrong"]
    for dtype in ("float32", "float16", "bfloat16"):
        assert f"{dtype}: attention Shapes(seed=7, dtype=torch.{dtype}" in told
    assert "expected at most" in told and "--part kernels --only 'tokens_kernel' --fresh --seed 7" in told
    assert cases["append_kernel"]["wrong"].startswith("float32: ZeroDivisionError: integer division")
    printed = capsys.readouterr().out
    assert "rebuilt_kernel: ok, worst error" in printed
    assert printed.partition("2 failed:")[2].count("kernels, ") == 2
    # What failed stays, and alone it is measured again.
    monkeypatch.setattr(interpreted.append, "append_kernel", broken._kernel)
    status, again = run(tmp_path, "--only", "append", "--fresh")
    assert status == 0 and "says" in again["append_kernel"] and again["tokens_kernel"] == cases["tokens_kernel"]


def test_a_kernel_that_is_never_launched_is_reported(on_a_device, monkeypatch, tmp_path):
    some(monkeypatch, "fused_kernel", "new_kernel")
    monkeypatch.setattr(kernels, "CHECKS", {"fused_kernel": kernels.CHECKS["append_kernel"]})
    status, cases = run(tmp_path)
    assert status == 1 and "no case launches fused_kernel, got append_kernel" in cases["fused_kernel"]["wrong"]
    assert cases["new_kernel"]["wrong"].startswith("no case launches new_kernel")


def test_new_kernels_are_asked_about(monkeypatch):
    from attnpack_fx.kernels import triton

    class Kernel:
        __name__ = "new_kernel"

    monkeypatch.setattr(triton, "KERNELS", (*triton.KERNELS, Kernel()))
    assert kernels.names() == {*kernels.CHECKS, "new_kernel"}
    with pytest.raises(CallFailedError, match="no case launches new_kernel"):
        kernels.check_kernel("new_kernel", dry=True, seed=0)
