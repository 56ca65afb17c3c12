"""AOTInductor: one compiled package a step, weights inside, which PyTorch's C++ runtime loads without Python."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnpack_fx.export.artefact import finish, new_folder
from attnpack_fx.export.program import capture
from attnpack_fx.policy import PackPolicy

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def export_aoti(
    model: nn.Module,
    policy: PackPolicy,
    path: str | os.PathLike[str],
    *,
    example: Mapping[str, Any] | None = None,
    processor: Any = None,
    dims: Mapping[str, tuple[int, int]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a model and its packed cache as packages of AOTInductor (`.pt2`), for `PackedGenerator` or PyTorch's C++.

    They run on the kind of device that the model is on, and on processors that have the instructions of this one. No
    `attnpack::` operator is in them. A C++ compiler is needed, and for CUDA a GPU.

    model: a transformers model, in float32, float16 or bfloat16. policy: what to pack (`export/policies.py` says which
    can be). path: the folder to write; an artefact there is replaced. example: inputs as the processor makes them,
    images included, from which the vision tower is exported; without, hosts give features of images, but for LLaVA and
    VipLLaVA, whose images are of one size. processor: saved beside, for `attnpack run`. dims: smallest and largest
    sizes of dimensions, by name (`program.RANGES`), from 1 on. progress: called with what comes next.

    Returns the folder. Raises `NotImplementedError` for models and policies that cannot be exported, ValueError for
    other dtypes and bad sizes, and what Inductor raises where no compiler works.
    """
    told = progress or (lambda text: None)
    first = next(model.parameters())
    if first.dtype not in _DTYPES:
        raise ValueError(
            f"export_aoti: got a model in {first.dtype}, expected float32, float16 or bfloat16; "
            "use model.to(torch.float32)"
        )
    if first.device.type not in ("cpu", "cuda"):
        raise ValueError(f"export_aoti: got a model on {first.device}, expected the CPU or CUDA; use model.to('cpu')")
    with new_folder(Path(path)) as folder:
        told("capture")
        # Kernels for a CPU run on empty tensors, those for CUDA may not: hosts fill them up (`runtime/filler.py`).
        programs = capture(model, policy, example, dims, least=1)
        files = {}
        for each in programs.steps:
            told(f"{each.step.name} by AOTInductor")
            files[each.step.name] = f"{each.step.name}.pt2"
            torch._inductor.aoti_compile_and_package(
                each.program, package_path=str((folder / files[each.step.name]).absolute())
            )
        finish(folder, "aoti", programs, files, first.device.type, processor)
    return Path(path)
