"""What `attnpack doctor` asks of PyTorch: the machine as it sees it, and whether a small model comes out right.

`python -m attnpack_fx.selftest` prints it as JSON; a fault that ends that process does not end the command.
"""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config, cpp_builder

from attnpack_fx.backend import attnpack_backend
from attnpack_fx.packed_tensor import PackedTensor

_HEADS, _DIM = 2, 16
_WIDTH = _HEADS * _DIM
_TOKENS = 24
_TOLERANCE = 1e-4
#: Without what takes longer than the little there is to compile: a pool of processes, a precompiled header, and trials
#: of vector instructions. The last is kept as long as the process lives: hence `attnpack doctor` starts one for this.
_QUICK = {"compile_threads": 1, "cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False}


def compiler() -> dict[str, str]:
    """The C++ compiler that Inductor takes, and its version. Raises what Inductor or the compiler raise."""
    path = cpp_builder.get_cpp_compiler()
    asked = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=60)
    return {"path": path, "version": (asked.stdout.splitlines() or ["unknown"])[0]}


def devices() -> dict[str, Any]:
    """The CPU's vector instructions and threads; name, compute capability and bytes of memory of every CUDA device."""
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "cuda": [
            {"name": each.name, "capability": f"{each.major}.{each.minor}", "memory": each.total_memory}
            for each in found
        ],
    }


def registered() -> bool:
    """Whether `torch.compile(backend="attnpack")` finds this package's backend."""
    return "attnpack" in torch._dynamo.list_backends(exclude_tags=()) and (
        torch._dynamo.lookup_backend("attnpack") is attnpack_backend
    )


def selftest() -> dict[str, float]:
    """Compile a layer of attention by the backend's name, its cache packed at the full rank, and compare with eager.

    Returns the largest difference of a prompt's outputs and a decode step's. Raises RuntimeError for what is not as it
    must be, and whatever compiling raises.
    """
    torch.manual_seed(0)
    layer = _Layer().requires_grad_(False).eval()
    hidden = torch.randn(1, _TOKENS, _WIDTH)
    with torch.no_grad(), config.patch(_QUICK):
        step = torch.compile(layer, backend="attnpack", options={"text_rank": "full", "strict": True})
        dense: Any = None
        packed: Any = None
        differences: list[float] = []
        for chunk in (hidden[:, :-1], hidden[:, -1:]):
            expected, dense = layer(chunk, dense)
            got, packed = step(chunk, packed)
            differences.append(float((got - expected).abs().max()))
    if not all(isinstance(each, PackedTensor) for each in packed):
        raise RuntimeError("the cache that came back is dense, expected packed keys and values")
    # NaN is in no order.
    if not all(each <= _TOLERANCE for each in differences):
        shown = " and ".join(f"{each:.1e}" for each in differences)
        raise RuntimeError(f"outputs differ from eager by {shown}, expected at most {_TOLERANCE:.0e}")
    return {"difference": max(differences)}


class _Layer(nn.Module):
    """Causal self-attention that returns its cache, `[1, H, T, D]` keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.Linear(_WIDTH, 3 * _WIDTH)

    def forward(self, hidden: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        new = hidden.shape[1]
        query, key, value = (
            part.view(1, new, _HEADS, _DIM).transpose(1, 2) for part in self.joint(hidden).chunk(3, dim=-1)
        )
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        # One token after a prompt sees all of it.
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=past is None)
        return hidden + attended.transpose(1, 2).reshape(1, new, _WIDTH), (key, value)


def _main() -> None:
    """One line of JSON for each part, as soon as it is there: its name, and what it found or what went wrong."""
    parts: tuple[Callable[[], Any], ...] = (compiler, devices, registered, selftest)
    for part in parts:
        try:
            told: dict[str, Any] = {"found": part()}
        except Exception as error:  # whatever it is: what is asked is whether there is any
            told = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        print(json.dumps({"part": part.__name__, **told}), flush=True)


if __name__ == "__main__":
    _main()
