"""A model compiled with a policy whose rewritten graphs run op by op: what is computed, without Inductor's time."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from attnpack_fx import PackPolicy, backend


def compiled(model: Any, policy: PackPolicy) -> Callable[..., Any]:
    """The model's forward with the backend, alone in its caches."""
    options: dict[str, Any] = {"policy": policy}
    alone = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    return torch.compile(model, backend=backend.attnpack_backend, options=options, **alone)


@contextmanager
def op_by_op() -> Iterator[None]:
    """Rewritten graphs run as they are, without Inductor; any number of them."""
    torch._dynamo.reset()
    try:
        with (
            mock.patch.object(backend, "_inductor", lambda module, examples, patches: module),
            # A check of transformers reads a tensor's value, which would break the graph in two.
            mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"),
            torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096),
        ):
            yield
    finally:
        torch._dynamo.reset()
