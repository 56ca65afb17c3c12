"""The thread that has the model: it takes jobs that wait and generates for them, one batch after another."""

import logging
import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from attnpack_fx import hf
from attnpack_serve.batch import Batch
from attnpack_serve.capacity import Capacity
from attnpack_serve.job import Done, Event, Failed, Job, Sampling, Used
from attnpack_serve.limits import Limits
from attnpack_serve.prefixes import Prefixes
from attnpack_serve.queue import Queue

log = logging.getLogger(__name__)

#: Tokens of an answer that is there to be compiled for.
_WARM = 4


class Engine:
    """Generates for jobs, those of a kind together.

    Args:
        model: a compiled transformers model, called from the engine's thread alone.
        tokenizer: of the model.
        capacity: what prompts take, and how much there is.
        limits: how many may wait, and be answered at once.
    """

    def __init__(self, model: Any, tokenizer: Any, capacity: Capacity, limits: Limits) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.queue = Queue(limits, capacity)
        self.prefixes = Prefixes(model, limits.prefixes)
        self.running = 0
        self._batch = limits.batch
        ends = model.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def warm(self, inputs: dict[str, Tensor]) -> None:
        """Compile what prompts of this kind take, alone and in batches, kept and continued, before `start`.

        Args:
            inputs: of a prompt, as `generate` takes them.
        """
        sizes = [1 << power for power in range(self._batch.bit_length())]
        with torch.no_grad():
            for size in [1, 1, *sizes] if self.prefixes.most else sizes:
                self._generate([Job(inputs, Sampling(), _WARM, (), math.inf, _unheard) for _ in range(size)])
        self.prefixes.clear()

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Take no more jobs, and wait for the answers of those that were taken."""
        self.queue.close()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while jobs := self.queue.take():
            waiting = []
            for job in jobs:
                reason = job.over()
                if reason is None:
                    waiting.append(job)
                else:
                    job.tell(Done(reason, Used(job.tokens, 0, 0, 0, 0, 0.0)))
            if waiting:
                self._answer(waiting)

    def _answer(self, jobs: Sequence[Job]) -> None:
        self.running = len(jobs)
        try:
            with torch.no_grad():
                self._generate(jobs)
        # Whatever a model raises ends these answers, and not the server.
        except Exception as error:
            log.exception("no answer for %d requests", len(jobs))
            for job in jobs:
                job.tell(Failed(type(error).__name__))
        finally:
            self.running = 0

    def _generate(self, jobs: Sequence[Job]) -> None:
        inputs, cached = self._inputs(jobs)
        cache = inputs["cache"] if "cache" in inputs else inputs["past_key_values"]
        batch = Batch(jobs, self._tokenizer, self._ends, cache, cached)
        first = jobs[0].sampling
        if first.seed is not None:
            torch.manual_seed(first.seed)
        drawn: dict[str, Any] = {"temperature": first.temperature, "top_p": first.top_p} if first.temperature else {}
        self._model.generate(
            **inputs,
            max_new_tokens=max(job.new_tokens for job in jobs),
            do_sample=bool(drawn),
            **drawn,
            num_beams=1,
            use_cache=True,
            stopping_criteria=[batch],
        )

    def _inputs(self, jobs: Sequence[Job]) -> tuple[dict[str, Any], int]:
        """What `generate` takes, a cache among it, and how many tokens of each prompt are in the cache already."""
        device = self._model.device
        if len(jobs) == 1:
            found = self.prefixes.get({name: each.to(device) for name, each in jobs[0].inputs.items()})
            if found is not None:
                prefix, ids = found
                return prefix.inputs(ids), prefix.tokens
        inputs: dict[str, Tensor] = {
            name: torch.cat([job.inputs[name] for job in jobs]).to(device) for name in jobs[0].inputs
        }
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return inputs | hf.cache_argument(cache), 0


def _unheard(event: Event) -> None:
    """Nobody asked for what is compiled for."""
