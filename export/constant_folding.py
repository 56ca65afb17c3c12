"""Work on values that are known while a step is captured: done then, its results constants of the program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves


class ConstantFolding(TorchFunctionMode):
    """Within it, functions of real tensors and numbers run at once, and are not captured.

    Vision towers loop over the grids and sizes of images, and cut tensors into as many pieces. Where these are real
    tensors of a module that is neither parameter nor buffer, which capturing leaves as they are, so are the loops.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # What is captured is of a subclass.
        if any(isinstance(leaf, Tensor) and type(leaf) is not Tensor for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return func(*args, **kwargs)
