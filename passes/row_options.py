"""Options that codes for dense tokens have in common: what they may be, and how many tokens are coded at once."""

from attnpack_fx.kernels.aten.row_codes import INTEGERS
from attnpack_fx.passes.fields import is_count, is_share


def check_bits(method: str, bits: object) -> None:
    """Raise `ValueError` for anything but 2, 4 or 8."""
    if isinstance(bits, bool) or bits not in INTEGERS:
        raise ValueError(f"{method}: bits: got {bits!r}, expected 2, 4 or 8, e.g. {method}(bits=4)")


def check_count(method: str, name: str, count: object, least: int = 1) -> None:
    """Raise `ValueError` for anything but an int of at least `least`."""
    if not is_count(count, least):
        raise ValueError(
            f"{method}: {name}: got {count!r}, expected an int >= {least}, e.g. {method}({name}={max(least, 32)})"
        )


def check_share(method: str, name: str, share: object) -> None:
    """Raise `ValueError` for anything but a number in [0, 1]."""
    if not is_share(share):
        raise ValueError(f"{method}: {name}: got {share!r}, expected a share in [0, 1], e.g. {method}({name}=0.01)")


def steps(rows: int, step: int) -> int:
    """As many of `rows` as make whole steps; none of fewer than 0."""
    return max(rows, 0) // step * step
