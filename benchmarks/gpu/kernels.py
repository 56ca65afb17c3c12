"""Every Triton kernel launched on the device once, in every dtype, through the operator that uses it."""

import functools
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from attnpack_fx.kernels import registering
from attnpack_fx.kernels.parts import RowForm
from benchmarks.gpu import generated
from benchmarks.gpu.apart import Apart, CallFailedError, context_lost, described
from benchmarks.gpu.correctness import DTYPES, check_append_, check_attention, check_compress, short
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.part import Part, Result, Run, WrongResultError, left_out, markdown, measured
from benchmarks.gpu.recorded import launchers, recording
from tests.kernels.inputs import TOLERANCE, Shapes

Check = Callable[[Machine, torch.dtype, int], dict[str, float]]

#: How long one check may take: it compiles a few kernels, or a small model.
_SECONDS = 300.0
#: Few KV heads, so that one launch would leave most of any GPU idle.
_DECODE = Shapes(
    heads=2, group=4, segments=(150,), key_dim=64, value_dim=64, key_rank=16, value_rank=16, kept=20, appended=10
)
_TURNED = replace(_DECODE, rotary=64)
_CODED = replace(_DECODE, key_cuts=((1.0, 4),), value_cuts=((1.0, 4),))
#: Blocks of several formats, one with zero points, and rows as KIVI stores them behind them.
_MIXED = replace(
    _DECODE,
    group=1,
    key_cuts=((1.0, (8, 2, True)), (0.5, 4)),
    value_cuts=((1.0, 2), (0.3, 0)),
    key_rows=((40, RowForm(2, channel=True, zero=True)),),
    value_rows=((40, RowForm(2, group=32, zero=True)),),
    mask="bool",
    ragged=True,
)


def _attending(*shapes: Shapes) -> Check:
    return partial(check_attention, shapes=shapes)


_three = _attending(_DECODE, replace(_DECODE, group=1, segments=(90, 40), mask="bool", ragged=True))
_three_coded = _attending(_CODED, _MIXED)
_by_axis = _attending(replace(_TURNED, axes=3, group=2))
#: Inputs for which the launcher chooses the kernel of that name.
CHECKS: Mapping[str, Check] = {
    "absorb_kernel": _three,
    "tokens_kernel": _three,
    "combine_kernel": _three,
    "fused_kernel": _attending(replace(_DECODE, batch=4, heads=8), replace(_DECODE, queries=3, mask="additive")),
    "rebuilt_kernel": _attending(_TURNED, replace(_TURNED, axes=3, key_rank=64)),
    "tables_kernel": _by_axis,
    "split_kernel": _by_axis,
    "absorb_coded_kernel": _three_coded,
    "tokens_coded_kernel": _three_coded,
    "combine_coded_kernel": _three_coded,
    "rebuilt_coded_kernel": _attending(replace(_CODED, rotary=64), replace(_CODED, rotary=32, axes=3, group=1)),
    "append_kernel": check_append_,
    "gather_kernel": check_compress,
    "jacobi_kernel": check_compress,
}


def names() -> set[str]:
    """Of all kernels that there are, and of those that there are checks for."""
    there = [] if registering.triton is None else registering.triton.KERNELS
    return {kernel.__name__ for kernel in there} | CHECKS.keys()


def cases(run: Run) -> Mapping[str, Callable[[], Result]]:
    kernels = {name: partial(_in_turn, run, check_kernel, name) for name in sorted(names())}
    return kernels | {name: partial(_in_turn, run, generated.check, name) for name in generated.CHECKS}


def _in_turn(run: Run, function: Callable[[str, bool, int], Result], name: str) -> Result:
    """Raises WrongResultError with what failed, whatever it is."""
    seed = secrets.randbits(31) if run.seed is None else run.seed
    try:
        if run.machine.dry:
            return function(name, True, seed)
        return _process().call(function, name, False, seed)
    except CallFailedError as failure:
        raise WrongResultError(f"{failure}; alone: --part kernels --only {name!r} --fresh --seed {seed}") from None


@functools.cache
def _process() -> Apart:
    return Apart(_SECONDS)


def _close() -> None:
    """Its memory is what other parts measure with."""
    _process().close()


@torch.no_grad()
def check_kernel(name: str, dry: bool, seed: int) -> Result:
    """Worst error of a kernel in every dtype. Raises CallFailedError with what failed, after all dtypes."""
    machine, launches = Machine(dry), 0
    worst: dict[str, float] = {}
    failed: list[str] = []
    if name not in CHECKS:
        raise CallFailedError(f"no case launches {name}: benchmarks/gpu/kernels.py has none")
    for dtype in DTYPES:
        try:
            with recording(launchers()) as found:
                worst[short(dtype)] = max(CHECKS[name](machine, dtype, seed).values())
                machine.synchronize()
            there = {launch.kernel for launch in found}
            launches += len(found)
            # On a CPU ATen does the work, unless the kernels are interpreted.
            if name not in there and (there or not dry):
                failed.append(f"{short(dtype)}: no case launches {name}, got {', '.join(sorted(there)) or 'none'}")
        except WrongResultError as error:
            failed.append(f"{short(dtype)}: {error}")
        # Of a compiler or a launch: the other dtypes are of interest all the same.
        except Exception as error:
            failed.append(f"{short(dtype)}: {described(error)}")
            if context_lost():
                break
    if failed:
        raise CallFailedError("; ".join(failed))
    how = "ok" if launches else "ok, of ATen alone"
    return {"worst": worst, "says": f"{how}, worst error " + ", ".join(map(_of_limit, worst, worst.values()))}


def _of_limit(dtype: str, error: float) -> str:
    return f"{error:.1e} of {TOLERANCE[getattr(torch, dtype)]:.1e} in {dtype}"


def table(results: Mapping[str, Result]) -> list[str]:
    rows = [(name, case["says"]) for name, case in measured(results).items()]
    return [*markdown(("check", "result"), rows), "", *left_out(results)]


PART = Part(
    "kernels",
    "Kernels",
    "Every Triton kernel, launched by the operator that uses it on small inputs for which the launcher chooses it, "
    "in fp32, fp16 and bf16, against the float64 reference; a kernel that no input launches has failed. Then tiny "
    "transformers models generate through `attnpack_fx.compile` and Inductor: at full rank the tokens must be those of "
    "the uncompiled model, in 4 bits the logits close to its, at a truncated rank finite. Checks run in a process of "
    "their own, so that one that fails hides no other.",
    cases,
    table,
    close=_close,
)
