"""What is read from the device, where a GPU would be waited for: of a prompt what sizes follow from, in decode steps
nothing, but what methods must know.

Numbers are read by operators of PyTorch that a dispatch mode sees, inside the graphs, inside the operators
`attnpack::`, and between the graphs. They run op by op: what Inductor makes of a graph reads nothing that the graph
does not. On a GPU, kernels of its own pack, which read nothing: see `tests/kernels/triton/test_factorize.py`.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from types import FrameType

import pytest
import torch
import transformers
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
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
)
_INDEXING = ("index", "index_put", "index_put_")
#: Enough for a group of 32 tokens to be coded behind those that wait.
_TOKENS = 48
#: Reads once for each layer would come in threes.
_LAYERS = 3
#: What reads on a CPU alone. On a GPU these are assertions on the device, do without what they would find, or read a
#: copy on the host (the axes of rotary embedding).
_ON_A_CPU = {"_check_mask", "_runs", "_start_of_run", "_with_outliers", "_zeroed", "require_finite"} | {
    *("_axes", "_count", "_follows")
}

#: What every prompt reads: how many tokens of two kinds there are, since sizes follow; whether samples differ in that;
#: and once, before the first step, whether any token was padding, which later masks must not show.
_SIZES = {"positions": 2, "_has_filler": 1, "most_missing": 1}
#: Without vision tokens of their own.
_ONE_KIND = _SIZES | {"positions": 1}
#: Where keys are packed before rotary embedding: whether samples share cos and sin.
_ANGLES = {"_one_for_all": 1}
#: Where eviction reads, in every layer: how many tokens samples have lost and keep. They may differ, and sizes follow.
_EVICTION = {"evict", "least_missing", "positions"}
#: Twice: of the prompt, and in the first step, when the budget is full again.
_EVICTED = {"evict": 2 * _LAYERS, "least_missing": 1 + _LAYERS, "most_missing": 1}
#: By policy: what a prompt reads, how often (with the first step, in which methods act on it for the first time), and
#: the functions that read in later steps; there is no other way.
READS: dict[str, tuple[PackPolicy, dict[str, int], set[str]]] = {
    "default": (PackPolicy(), _SIZES, set()),
    "rotated": (PackPolicy(vision_rank=8, key_space="rotated"), _SIZES, set()),
    "folds": (PackPolicy(vision_rank=8, text_rank=8, fold_every=4, recent=2), _SIZES | _ANGLES, set()),
    "factors in 4 bits": (PackPolicy(vision_rank=8, passes=(Quantize(4),)), _SIZES | _ANGLES, set()),
    "partial reading": (PackPolicy(vision_rank=8, partial=Partial(regroup_every=4)), _SIZES | _ANGLES, set()),
    "KIVI": (PackPolicy(vision_rank=None, passes=(KIVI(2, residual=32),)), _ONE_KIND, set()),
    # Tokens will leave: samples are taken to differ.
    "MiniCache": (PackPolicy(vision_rank=None, passes=(MiniCache(),)), {"positions": 1, "most_missing": 1}, set()),
    # How many outliers there are, of keys and of values, which are stored one by one, with their places in order.
    "KVQuant": (
        PackPolicy(vision_rank=None, passes=(KVQuant(4, residual=32, outliers=0.1),)),
        _ONE_KIND | _ANGLES | {"keep_outliers": 4 * _LAYERS},
        {"keep_outliers", "_ascending"},
    ),
    "H2O": (
        PackPolicy(vision_rank=8, passes=(H2O(0.5),)),
        _ANGLES | _EVICTED | {"positions": 2 + 2 * 2 * _LAYERS},
        _EVICTION,
    ),
    "StreamingLLM": (
        PackPolicy(vision_rank=None, passes=(StreamingLLM(recent=16),)),
        _EVICTED | {"positions": 1 + 2 * _LAYERS},
        _EVICTION,
    ),
}


class _Reads(TorchDispatchMode):
    """Counts the functions of the package in which numbers are read, innermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "attnpack":
            with self:  # as they are registered, which a mode does not see into by itself
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        name = func.__name__.split(".")[0]
        boolean = name in _INDEXING and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in _READS or boolean:
            function = next(_own(sys._getframe(1)), "elsewhere")
            if function not in _ON_A_CPU:
                self.found[function] += 1
        return func(*args, **kwargs)


def _own(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        name = frame.f_code.co_name
        ours = frame.f_globals.get("__name__", "").startswith("attnpack_fx.")
        if ours and not name.startswith("<") and name != "derive":  # a memo derives what another function asks for
            yield name
        frame = frame.f_back


def _model():
    config = ZOO["llava-gqa"].build("sdpa").config
    config.text_config.num_hidden_layers = _LAYERS
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


#: What no other policy here does.
_FIRST = ("folds", "KVQuant", "H2O")


@pytest.mark.parametrize(
    "name", [name if name in _FIRST else pytest.param(name, marks=pytest.mark.slow) for name in READS]
)
def test_the_host_reads_what_is_listed_and_nothing_else(name, without_inductor, monkeypatch):
    policy, of_prompt, of_steps = READS[name]
    reads, run = [], Runtime.__call__

    def watched(self, *arguments, **named):
        with _Reads() as mode:
            reads.append(mode.found)
            return run(self, *arguments, **named)

    monkeypatch.setattr(Runtime, "__call__", watched)
    model, prompt = _model(), ZOO["llava-gqa"].inputs(2, 3)
    attnpack_fx.compile(model, policy=policy)
    model.generate(**prompt, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False)
    first = len(reads) - (_TOKENS - 1)
    assert first >= 1
    assert sum(reads[: first + 1], Counter()) == of_prompt
    assert set().union(*reads[first + 1 :]) == of_steps
