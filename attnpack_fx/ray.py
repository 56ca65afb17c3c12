"""Rows of prompts and pictures, answered by a model that is loaded and compiled once: a class for Ray Data's actors.

Ray shares rows among actors, starts those again that were killed, and hands their rows out once more. The class needs
none of it, and nothing here imports Ray.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from attnpack_cli.errors import UserError
from attnpack_fx.compiling import compile
from attnpack_fx.demo.generation import without_checks
from attnpack_fx.demo.load import load, model_inputs
from attnpack_fx.pictures import pictures
from attnpack_fx.plan_batch import BatchPlan, plan_batch
from attnpack_fx.policy import PackPolicy, PolicyError

#: Of prompts that are generated for at once, where neither a batch nor a memory is given.
_BATCH = 8
#: What is wrong with the model or its policy, and not with a row.
NOT_A_ROW = (PolicyError, TorchDynamoException)

Inputs = dict[str, Any]


class Answers:
    """Answer batches of rows with one model, for `ray.data.Dataset.map_batches` and for calls of your own.

    The model is loaded and compiled when an object is made, on the GPU that Ray gives the actor, if it gives one. A row
    that fails has its reason in `error` and an empty answer, and the others of its batch have theirs.

        dataset.map_batches(Answers, fn_constructor_kwargs={"model": "owner/name"}, batch_size=64,
                            compute=ray.data.ActorPoolStrategy(size=2))
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        policy: PackPolicy | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        dtype: str = "float32",
        max_new_tokens: int = 64,
        batch: int | None = None,
        memory: int | None = None,
    ) -> None:
        """Load and compile the model.

        Args:
            model: a folder, or a model id of the Hugging Face hub.
            policy: a `PackPolicy`, its fields, or a file that `PackPolicy.save` wrote; None is the default one.
            dtype: torch's name of one, of the weights.
            max_new_tokens: the longest answer.
            batch: the most prompts that are generated for at once; 8 unless it or `memory` is given.
            memory: bytes that generating may take, weights included: `attnpack_fx.plan_batch` then finds the batch.

        Raises:
            ValueError: for wrong arguments, a wrong policy among them.
            UserError: where the model cannot be loaded.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("batch", batch), ("memory", memory)):
            wrong = not isinstance(value, int) or isinstance(value, bool) or value < 1
            if wrong and not (value is None and name != "max_new_tokens"):
                raise ValueError(f"{name}: got {value!r}, expected a whole number from 1 on")
        if batch is not None and memory is not None:
            raise ValueError(f"batch and memory: got {batch} and {memory}, expected one of them; leave the other out")
        self._policy = _policy(policy)
        self._loaded = load(os.fspath(model), dtype)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded.model.to(self._device)
        compile(self._loaded.model, policy=self._policy)
        self._new_tokens, self._memory = max_new_tokens, memory
        self._batch = batch or (None if memory else _BATCH)
        self._plans: list[tuple[dict[str, int], BatchPlan]] = []

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a batch of rows.

        Args:
            rows: columns by name: `prompt`, texts, and `images`, the pictures of each (`attnpack_fx.pictures` has the
                forms). Without that column, prompts have no pictures.

        Returns:
            The columns given, `answer`, and `error`, which is empty where there is an answer.

        Raises:
            ValueError: without a column `prompt`.
            PolicyError: where the model cannot have the policy.
        """
        if "prompt" not in rows:
            raise ValueError(f"rows: got the columns {sorted(rows)}, expected prompt, and images where there are any")
        prompts = list(rows["prompt"])
        images = list(rows["images"]) if "images" in rows else [None] * len(prompts)
        found: list[tuple[str, str]] = [("", "")] * len(prompts)
        alike: dict[Any, list[tuple[int, Inputs]]] = {}
        for number, (prompt, shown) in enumerate(zip(prompts, images, strict=True)):
            # Whatever a row meets is its own affair, and the others are answered.
            try:
                inputs = self._inputs(prompt, shown)
            except Exception as error:
                found[number] = ("", _told(error))
            else:
                alike.setdefault(_shape(inputs), []).append((number, inputs))
        for members in alike.values():
            answers = self._answers([inputs for _, inputs in members])
            for (number, _), answer in zip(members, answers, strict=True):
                found[number] = answer
        return {**rows, "answer": [answer for answer, _ in found], "error": [error for _, error in found]}

    def _inputs(self, prompt: Any, images: Any) -> Inputs:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt: got {prompt!r}, expected a text")
        inputs = model_inputs(self._loaded, prompt, pictures(images))
        return {name: each.to(self._device) if isinstance(each, Tensor) else each for name, each in inputs.items()}

    def _answers(self, prompts: Sequence[Inputs]) -> Iterator[tuple[str, str]]:
        """Answers and errors of prompts of one shape."""
        try:
            batch = self._batch or self._fitting(prompts[0])
        except NOT_A_ROW:
            raise
        except Exception as error:
            yield from [("", _told(error))] * len(prompts)
            return
        for first in range(0, len(prompts), batch):
            yield from self._tried(prompts[first : first + batch])

    def _tried(self, prompts: Sequence[Inputs]) -> list[tuple[str, str]]:
        try:
            return [(text, "") for text in self._generated(prompts)]
        except NOT_A_ROW:
            raise
        except Exception as error:
            if len(prompts) == 1:
                return [("", _told(error))]
        # One of them spoils the batch, or all together take too much memory.
        return [answer for each in prompts for answer in self._tried([each])]

    def _generated(self, prompts: Sequence[Inputs]) -> list[str]:
        inputs = {name: _joined([each[name] for each in prompts]) for name in prompts[0]}
        with torch.no_grad(), without_checks():
            found = self._loaded.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self._new_tokens)
        new = found[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._loaded.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _fitting(self, example: Inputs) -> int:
        """How many prompts of this shape fit, by a plan for this or a larger one. Raises ValueError for none."""
        sizes = {name: each.numel() for name, each in example.items() if isinstance(each, Tensor)}
        for larger, plan in self._plans:
            # Where a larger one does not fit, this one still may.
            if plan.batch and all(size <= larger.get(name, 0) for name, size in sizes.items()):
                return plan.batch
        plan = next((plan for same, plan in self._plans if same == sizes), None) or self._planned(sizes, example)
        if plan.batch < 1:
            raise ValueError(
                f"memory: got {self._memory:,} bytes, expected more than the {plan.peak(1):,} that a prompt of this "
                "size takes; give more, or fewer or smaller images"
            )
        return plan.batch

    def _planned(self, sizes: dict[str, int], example: Inputs) -> BatchPlan:
        with without_checks():
            tokens = max(2, self._new_tokens)
            plan = plan_batch(self._loaded.model, None, example, memory=self._memory, new_tokens=tokens)
        self._plans.append((sizes, plan))
        return plan


def _policy(given: PackPolicy | Mapping[str, Any] | str | os.PathLike[str] | None) -> PackPolicy:
    if given is None or isinstance(given, PackPolicy):
        return given or PackPolicy()
    return PackPolicy.load(Path(given)) if isinstance(given, (str, os.PathLike)) else PackPolicy.from_dict(given)


def _shape(inputs: Inputs) -> tuple[Any, ...]:
    """What must be equal for prompts to be put into one batch."""
    told = {name: (each.shape, each.dtype) if isinstance(each, Tensor) else repr(each) for name, each in inputs.items()}
    return tuple(sorted(told.items()))


def _joined(values: Sequence[Any]) -> Any:
    """Prompts of a batch along dim 0, or what belongs to them, as the patches of Qwen-VL models do."""
    return torch.cat(list(values)) if isinstance(values[0], Tensor) and values[0].dim() else values[0]


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, (UserError, ValueError)) else f"{type(error).__name__}: {error}"
