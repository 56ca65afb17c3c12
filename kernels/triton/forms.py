"""Entries of forms (`blocks.py`), which kernels get as nested tuples of constants."""

from typing import Any

import triton


@triton.constexpr_function
def pick(forms, first, second=None, third=None):
    """`forms[first]`, `forms[first][second]` or `forms[first][second][third]`.

    Triton 3.6 makes tensors' tuples of what `forms[first]` gives, and knows none that hold tuples.
    """
    found: Any = forms[first]
    if second is not None:
        found = found[second]
    return found if third is None else found[third]
