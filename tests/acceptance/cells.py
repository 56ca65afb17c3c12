"""One cell of the acceptance grid: a family's model generates under a setting, as a user would have it generate.

A real transformers model, `attnpack_fx.compile` and `generate`, real Inductor, `strict`. `run` says what came of it and
asserts nothing; `problems` says what of it is wrong.
"""

import functools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters

import attnpack_fx
from attnpack_fx import PackedTensor, PackPolicy, cache_bytes, compiling, hf
from attnpack_fx.compiling import called_through
from attnpack_fx.passes.state import SiteReport
from tests.acceptance.families import FAMILIES, LAYERS, Family
from tests.acceptance.promises import Shape
from tests.acceptance.settings import CALIBRATED, NEW_TOKENS, NOTHING, PREFILL, SETTINGS, Setting

#: Largest difference of a logit where nothing is lost, as a part of the largest logit.
TOLERANCE = 1e-4
#: Graphs that decode steps may be made of: Dynamo learns at the second that lengths change.
DECODE_GRAPHS = 2
#: Warnings that are no part of this package and that every compiled call of such a model gives.
_ELSEWHERE = ("torch.jit.script_method",)


@dataclass
class Record:
    """What came of a cell.

    packed: decoder layers whose keys and values are packed tensors. dense: reasons reported for sites that are dense;
    unpruned, unmerged: why no tokens were pruned, and layers not merged. warned: every warning, once.
    bytes, dense_bytes: of the cache, packed and dense. promised: the most it may be.
    decode_graphs, later_graphs: made by decode steps, and by a second call alike.
    finite: logits; repeats: whether the second call gave the same. error: largest difference of a logit to the dense
    model's, as a part of the largest; same: whether all tokens are the dense model's.
    raised: what a user would get instead.
    """

    family: str
    setting: str
    packed: tuple[int, ...] = ()
    dense: frozenset[str] = frozenset()
    unpruned: frozenset[str] = frozenset()
    unmerged: frozenset[str] = frozenset()
    warned: frozenset[str] = frozenset()
    bytes: int = 0
    dense_bytes: int = 0
    promised: float | None = None
    decode_graphs: int = 0
    later_graphs: int = 0
    finite: bool = False
    repeats: bool = False
    error: float = 0.0
    same: bool = False
    raised: str | None = None
    seconds: float = 0.0
    sites: list[SiteReport] = field(default_factory=list, repr=False)

    @property
    def ratio(self) -> float:
        """Of the dense cache's bytes."""
        return self.bytes / self.dense_bytes if self.dense_bytes else float("nan")


class Subject:
    """One family's model, and what its cells share: a prompt, what the dense model makes of it, a calibrated policy."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model: Any = family.build()
        self.inputs = family.inputs(0)
        self.eager, _ = generated(self.model, self.inputs)

    @functools.cached_property
    def calibrated(self) -> PackPolicy:
        samples = [self.family.inputs(seed) for seed in (1, 2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the plans it tries; those of the policy itself show in the cell
            found = attnpack_fx.calibrate(self.model, samples, budget=CALIBRATED, text=True)
        return replace(found, strict=True)


@functools.lru_cache(maxsize=1)
def subject(family: str) -> Subject:
    """Cells come family by family, and one model is held at a time."""
    return Subject(FAMILIES[family])


class _Graphs(transformers.StoppingCriteria):
    """Stops nothing; notes after each step how many graphs exist."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.made.append(counters["stats"]["unique_graphs"])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def generated(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, list[int]]:
    """Greedy, and how many graphs there were after each step."""
    graphs = _Graphs()
    out = model.generate(
        **inputs,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        max_new_tokens=NEW_TOKENS,
        stopping_criteria=transformers.StoppingCriteriaList([graphs]),
    )
    return out, graphs.made


def run(family: str, setting: str) -> Record:
    """Run one cell. Whatever is raised becomes part of the record: it is what a user would get."""
    record, began = Record(family, setting), time.perf_counter()
    torch._dynamo.reset()
    counters.clear()
    try:
        _fill(record, subject(family), SETTINGS[setting])
    except Exception as error:
        record.raised = f"{type(error).__name__}: {error}"
    finally:
        torch._dynamo.reset()
    record.seconds = time.perf_counter() - began
    return record


def _fill(record: Record, made: Subject, setting: Setting) -> None:
    family, model = made.family, made.model
    policy = made.calibrated if setting.policy is None else setting.policy(family)
    record.promised = promised(made, setting)
    record.dense_bytes = cache_bytes(made.eager.past_key_values)
    # The backend as `attnpack_fx.compile` uses it, reporting what it did.
    backend = functools.partial(compiling.attnpack_backend, observer=record.sites.extend)
    with (
        called_through(model, None),
        mock.patch.object(compiling, "attnpack_backend", backend),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        attnpack_fx.compile(model, policy=policy)
        first, graphs = generated(model, made.inputs)
        record.bytes = cache_bytes(first.past_key_values)
        record.decode_graphs = graphs[-1] - graphs[0]
        second, later = generated(model, made.inputs)
        record.later_graphs = later[-1] - graphs[-1]
    messages = [str(each.message) for each in caught]
    record.warned = frozenset(text for text in messages if not any(word in text for word in _ELSEWHERE))
    record.dense = frozenset(site.reason for site in record.sites if _left_dense(site))
    record.unpruned = frozenset(site.reason for site in record.sites if site.action == "unpruned")
    record.unmerged = frozenset(site.reason for site in record.sites if site.action == "compressed" and site.reason)
    record.packed = tuple(
        number
        for number, pair in enumerate(hf.keys_and_values(first.past_key_values))
        if all(isinstance(each, PackedTensor) for each in pair)
    )
    _compare(record, first, second, made.eager)


def _left_dense(site: SiteReport) -> bool:
    return site.action == "dense" or (site.action == "uncached" and site.causal)


def _compare(record: Record, first: Any, second: Any, eager: Any) -> None:
    logits, again, expected = (torch.stack(out.logits) for out in (first, second, eager))
    record.finite = bool(logits.isfinite().all())
    record.repeats = torch.equal(logits, again) and torch.equal(first.sequences, second.sequences)
    record.same = torch.equal(first.sequences, eager.sequences)
    record.error = float((logits - expected).abs().max() / expected.abs().max())


def shape(family: Family, setting: Setting) -> Shape:
    """Of one sample, and the layers that are packed. The last token is not fed back: its keys are never made."""
    dense = setting.dense(family)
    layers = [number for number in range(LAYERS) if number not in dense]
    can = family.unpruned is None, family.unmerged is None
    return Shape(layers, family.heads, family.dim, family.vision, family.text, NEW_TOKENS - 1, *can)


def promised(made: Subject, setting: Setting) -> float | None:
    """The most bytes that the cache of all samples may hold, layers that stay dense included."""
    if setting.promise is None:
        return None
    layers, dense = hf.keys_and_values(made.eager.past_key_values), setting.dense(made.family)
    stay = cache_bytes([layers[number] for number in dense]) if dense else 0
    return made.family.batch * setting.promise(shape(made.family, setting)) + stay


def problems(record: Record) -> list[str]:
    """What is wrong with a cell, in words; empty where nothing is."""
    refused = SETTINGS[record.setting].refused.get(record.family)
    if refused is not None:
        told = record.raised or "nothing"
        expected = told.startswith("NotImplementedError") and refused in told
        return [] if expected else [f"raises {told}, expected a NotImplementedError about {refused!r}"]
    if record.raised is not None:
        return [f"raises {record.raised}"]
    return [*_wrong_sites(record), *_wrong_bytes(record), *_wrong_results(record), *_wrong_graphs(record)]


def _wrong_sites(record: Record) -> Iterator[str]:
    family, setting = FAMILIES[record.family], SETTINGS[record.setting]
    dense, unpruned = setting.dense(family), setting.unpruned(family)
    expected = tuple(number for number in range(LAYERS) if number not in dense)
    if record.packed != expected:
        yield f"layers {record.packed} are packed, expected {expected}"
    allowed = {*dense.values(), *([unpruned] if unpruned else [])}
    for word in sorted(allowed):
        if not any(word in reason for reason in record.dense | record.unpruned):
            yield f"{word!r} is not among the reasons reported: {sorted(record.dense | record.unpruned)}"
        if not any(word in text for text in record.warned):
            yield f"{word!r} is in no warning"
    unmerged = setting.unmerged(family)
    if unmerged and not any(unmerged in reason for reason in record.unmerged):
        yield f"{unmerged!r} is not among the reasons reported: {sorted(record.unmerged)}"
    for text in sorted(() if unmerged else record.unmerged):
        yield f"unexpected: {text}"
    for text in sorted(record.dense | record.unpruned | record.warned):
        if not any(word in text for word in allowed | ({PREFILL, NOTHING} if allowed & {PREFILL, NOTHING} else set())):
            yield f"unexpected: {text}"


def _wrong_bytes(record: Record) -> Iterator[str]:
    if record.promised is not None and record.bytes > record.promised:
        yield (
            f"holds {record.bytes} bytes, {record.ratio:.3f} of the dense cache's; promised are "
            f"{record.promised:.0f}, {record.promised / record.dense_bytes:.3f}"
        )


def _wrong_results(record: Record) -> Iterator[str]:
    if not record.finite:
        yield "logits are not finite"
    if not record.repeats:
        yield "a second call generates something else"
    if SETTINGS[record.setting].exact and not (record.same and record.error <= TOLERANCE):
        tokens = "the same tokens" if record.same else "other tokens"
        yield f"{tokens} as the dense model, logits differ by {record.error:.1e} of their scale"


def _wrong_graphs(record: Record) -> Iterator[str]:
    if record.decode_graphs > DECODE_GRAPHS:
        yield f"decode steps made {record.decode_graphs} graphs, at most {DECODE_GRAPHS} are expected"
    if record.later_graphs:
        yield f"a second call like the first made {record.later_graphs} more graphs"
