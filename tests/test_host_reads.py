"""What decode steps read from the device, where a GPU would make them wait: nothing, but what methods must know.

Numbers are read by operators of PyTorch that a dispatch mode sees, inside and between the graphs. They run op by op:
what Inductor makes of a graph reads nothing that the graph does not.
"""

import sys
from collections.abc import Iterator
from types import FrameType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attnpack_fx
from attnpack_fx import H2O, KIVI, KVQuant, MiniCache, PackPolicy, Partial, Quantize, StreamingLLM
from attnpack_fx.runtime import Runtime
from tests.zoo import ZOO

_READS = (
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_dim",
)
_INDEXING = ("index", "index_put", "index_put_")
#: Enough for a group of 32 tokens to be coded behind those that wait.
_TOKENS = 48
#: Checks that wait on a CPU alone; on a GPU they are assertions on the device.
_ON_A_CPU = {"require_finite", "_check_mask"}

#: Where eviction reads how many tokens samples have lost and keep: they may differ, and sizes follow.
_EVICTION = {"derive", "evict", "positions", "_zeroed"}
#: By policy, the functions that read in decode steps, and why there is no other way.
DECODE: dict[str, tuple[PackPolicy, set[str]]] = {
    "default": (PackPolicy(), set()),
    "folds": (PackPolicy(vision_rank=8, text_rank=8, fold_every=4, recent=2), set()),
    "factors in 4 bits": (PackPolicy(vision_rank=8, passes=(Quantize(4),)), set()),
    "partial reading": (PackPolicy(vision_rank=8, partial=Partial(regroup_every=4)), set()),
    "KIVI": (PackPolicy(vision_rank=None, passes=(KIVI(2, residual=32),)), set()),
    "MiniCache": (PackPolicy(vision_rank=None, passes=(MiniCache(),)), set()),
    # How many outliers there are, which are stored one by one; and whether their places are in order.
    "KVQuant": (PackPolicy(vision_rank=None, passes=(KVQuant(4, residual=32),)), {"keep_outliers", "_ascending"}),
    "H2O": (PackPolicy(vision_rank=8, passes=(H2O(0.5),)), _EVICTION),
    "StreamingLLM": (
        PackPolicy(vision_rank=None, passes=(StreamingLLM(recent=16),)),
        _EVICTION,
    ),
}


class _Reads(TorchDispatchMode):
    """The functions of the package in which numbers are read, innermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        boolean = name in _INDEXING and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in _READS or boolean:
            self.found.add(next(_own(sys._getframe(1)), "elsewhere"))
        return func(*args, **(kwargs or {}))


def _own(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("attnpack_fx.") and not frame.f_code.co_name.startswith("<"):
            yield frame.f_code.co_name
        frame = frame.f_back


#: What no other policy here does.
_FIRST = ("default", "folds", "partial reading", "KVQuant", "H2O")


@pytest.mark.parametrize(
    "name", [name if name in _FIRST else pytest.param(name, marks=pytest.mark.slow) for name in DECODE]
)
def test_decode_steps_read_nothing_from_the_device(name, without_inductor, monkeypatch):
    policy, allowed = DECODE[name]
    reads, run = [], Runtime.__call__

    def watched(self, *arguments, **named):
        with _Reads() as mode:
            reads.append(mode.found)
            return run(self, *arguments, **named)

    monkeypatch.setattr(Runtime, "__call__", watched)
    model, prompt = ZOO["llava-gqa"].build("sdpa"), ZOO["llava-gqa"].inputs(2, 3)
    attnpack_fx.compile(model, policy=policy)
    model.generate(**prompt, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False)
    before = len(reads) - (_TOKENS - 1)
    assert before >= 0 and set().union(*reads[: before + 1]) - _ON_A_CPU, "the prompt's tokens are counted at prefill"
    found = set().union(*reads[before + 1 :]) - _ON_A_CPU
    assert found <= allowed
