"""How many prompts fit into a memory at once: measured on small batches, and carried on to large ones."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.backend import attnpack_backend
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.compiling import called_through, policy_for
from attnpack_fx.policy import PackPolicy

#: Times the example is repeated at first. One prompt alone takes ways of its own, which larger batches do not.
_FIRST = 2
#: Doubled until the two before foretell a peak this closely: the worst moment of small batches is another one.
_CLOSE = 0.01
#: What a prompt takes is taken for a thousandth more: allocators round sizes up, by the size.
_ROUNDED = 1.001
#: Largest batch that is measured.
_MOST = 64
#: Of the memory, what is left alone: allocators round sizes up, and free blocks that fit nothing stay.
_HEADROOM = 0.05
#: Arguments of `generate` that are given here.
_SET = frozenset(
    ("max_new_tokens", "min_new_tokens", "max_length", "do_sample", "num_beams", "return_dict_in_generate")
)


@dataclass(frozen=True)
class BatchPlan:
    """Bytes that generating takes, by the number of prompts, and how many prompts fit.

    batch: the largest that fits, 0 if none does. memory: what was given. weights: of parameters and buffers.
    fixed, prefill, decode: what is taken beside the weights: by any batch, and per prompt at the peak of prefill and of
    a whole answer. cache: of one prompt, at the end.
    """

    batch: int
    memory: int
    weights: int
    fixed: int
    prefill: int
    decode: int
    cache: int

    def peak(self, batch: int) -> int:
        """Bytes at the worst moment of generating for so many prompts, weights included."""
        return self.weights + self.fixed + batch * max(self.prefill, self.decode)

    def __str__(self) -> str:
        rows = (
            ("memory", self.memory),
            ("weights", self.weights),
            ("any batch", self.fixed),
            ("a prompt at prefill", self.prefill),
            ("a prompt with answer", self.decode),
            ("  of that its cache", self.cache),
            (f"batch {self.batch} at its peak", self.peak(self.batch)),
        )
        return "\n".join(f"{name:<24}{size / 1e6:>14,.3f} MB" for name, size in rows)


def plan_batch(
    model: Any,
    policy: PackPolicy | None,
    example: Mapping[str, Any],
    *,
    memory: int | None = None,
    new_tokens: int = 128,
) -> BatchPlan:
    """Find the largest batch of prompts like `example` that a model can answer in a memory.

    The example is generated for in batches of 2, 4, ... until a straight line foretells what the next one takes at its
    peak, and the line is carried on. The model is as before afterwards; what was compiled stays in Dynamo's caches.

    Args:
        model: a transformers model.
        policy: what it is compiled with; None measures the model as it is, compiled or not.
        example: arguments of `model.generate` for one prompt or more, tensors with the prompts of a batch along dim 0
            (or what belongs to them, in the same order, as the image patches of Qwen-VL models).
        memory: in bytes, weights included; all that is free on the model's GPU unless given.
        new_tokens: of every answer.

    Returns:
        The plan; five hundredths of the memory are left alone.

    Raises:
        ValueError: on a CPU without `memory`, for a model that several processes share, and for other wrong arguments.
    """
    model = getattr(model, "_orig_mod", model)
    ids = _checked(model, policy, example, memory, new_tokens)
    device = next(model.parameters()).device
    if memory is None:
        if device.type != "cuda":
            raise ValueError(f"memory: got none for a model on {device}, expected a number of bytes")
        torch.cuda.empty_cache()
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    weights = sum(
        {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in _held(model)}.values()
    )
    prompts = ids.shape[0]
    if policy is None:
        found = _line(model, example, prompts, new_tokens, memory - weights)
    else:
        with called_through(model, functools.partial(attnpack_backend, options={"policy": policy_for(model, policy)})):
            found = _line(model, example, prompts, new_tokens, memory - weights)
    (few, less), (many, more) = found
    prefill, decode, cache = (
        math.ceil((most - least) / (many - few) * _ROUNDED) for least, most in zip(less, more, strict=True)
    )
    # Of a batch, beyond what its prompts take; the line is not below the peaks that were measured.
    fixed = max(0, *(peak - batch * max(prefill, decode) for batch, peaks in found for peak in peaks[:2]))
    room = int(memory * (1 - _HEADROOM)) - weights - fixed
    return BatchPlan(max(0, room // max(prefill, decode, 1)), memory, weights, fixed, prefill, decode, cache)


def _checked(model: Any, policy: Any, example: Any, memory: Any, new_tokens: Any) -> Tensor:
    """The example's token ids. Raises ValueError for an argument that is none."""
    if not isinstance(model, torch.nn.Module) or not callable(getattr(model, "generate", None)):
        raise ValueError(f"model: got {type(model).__name__}, expected a transformers model with generate")
    hf.check_whole(model, "plan_batch", "plan in one process: each of several takes about its share of the bytes")
    if policy is not None and not isinstance(policy, PackPolicy):
        raise ValueError(f"policy: got {type(policy).__name__}, expected a PackPolicy, or None for the model as it is")
    ids = example.get("input_ids") if isinstance(example, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(
            f"example: got {sorted(example) if isinstance(example, Mapping) else type(example).__name__}, expected the "
            "arguments of generate by name, input_ids [B, T] among them"
        )
    taken = sorted(_SET.intersection(example))
    if taken:
        raise ValueError(
            f"example: got {', '.join(taken)}, which plan_batch sets itself; leave out, and give new_tokens"
        )
    if memory is not None and (not isinstance(memory, int) or isinstance(memory, bool) or memory < 1):
        raise ValueError(f"memory: got {memory!r}, expected a number of bytes, e.g. 80 * 10**9")
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or new_tokens < 2:
        raise ValueError(f"new_tokens: got {new_tokens!r}, expected an int of at least 2")
    return ids


def _line(
    model: Any, example: Mapping[str, Any], prompts: int, new_tokens: int, room: int
) -> list[tuple[int, tuple[int, int, int]]]:
    """Two batches, and what they take, from which larger ones follow."""
    device, times = next(model.parameters()).device, _FIRST
    found: list[tuple[int, tuple[int, int, int]]] = []
    while True:
        taken = _measured(model, _repeated(example, times), new_tokens, device)
        found.append((times * prompts, taken))
        peak = max(taken[:2])
        if len(found) > 2:
            (few, less), (many, more) = found[-3:-1]
            slope = (max(more[:2]) - max(less[:2])) / (many - few)
            if abs(peak - max(more[:2]) - slope * (times * prompts - many)) <= _CLOSE * peak:
                break
        if len(found) > 1 and (2 * times * prompts > _MOST or 2 * peak > room):
            break
        times *= 2
    return found[-2:]


def _held(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _repeated(example: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The prompts of an example, so many times."""
    return {
        name: each.repeat(times, *[1] * (each.dim() - 1)) if isinstance(each, Tensor) and each.dim() else each
        for name, each in example.items()
    }


def _measured(model: Any, inputs: dict[str, Any], new_tokens: int, device: torch.device) -> tuple[int, int, int]:
    """Bytes beyond what is held before, at the peak of prefill and of a whole answer; bytes of the cache at its end."""

    def generate(tokens: int) -> Any:
        with torch.no_grad():
            return model.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
            )

    generate(new_tokens)  # compiles, which takes memory of its own
    prefill = _peak(lambda: generate(1), device)
    kept: list[Any] = []
    decode = _peak(lambda: kept.append(generate(new_tokens)), device)  # with prefill, where that is more
    return prefill, decode, cache_bytes(hf.cache_of(kept.pop()))


def _peak(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes on a device at once while `call` runs, beyond those before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
