"""What a user hands to `torch.compile(..., options=...)`: names made uniform, Inductor's own options checked."""

from collections.abc import Mapping
from typing import Any

from attnpack_fx.checks import PolicyError, hint


def normalised(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """`options` as a new dict with `_` for `-` in its keys, as in `torch.compile`."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise PolicyError(
            f"options: got {type(options).__name__}, expected a mapping such as {{'vision_rank': 64}}; "
            "a ready policy goes in as options={'policy': policy}"
        )
    given: dict[str, Any] = {}
    for key, value in options.items():
        if not isinstance(key, str):
            raise PolicyError(f"options: got the key {key!r}, expected names as str")
        name = key.replace("-", "_")
        if name in given:
            raise PolicyError(f"options: got {name!r} twice, spelled with '-' and with '_'; give it once")
        given[name] = value
    return given


def mode_patches(mode: str | None, dynamic: bool | None) -> dict[str, Any]:
    """The Inductor configuration that `mode` stands for."""
    if mode is None:
        return {}
    # Imported when needed, not with the package: Inductor is slow to import.
    from torch._inductor import list_mode_options

    known = tuple(list_mode_options())
    if not isinstance(mode, str) or mode not in known:
        raise PolicyError(f"mode: got {mode!r}, expected one of {', '.join(map(repr, known))}{hint(mode, known)}")
    return dict(list_mode_options(mode, dynamic))


def inductor_patches(given: Mapping[str, Any], policy_keys: tuple[str, ...]) -> dict[str, Any]:
    """`given` as Inductor config patches, checked the way `torch.compile` checks its own options.

    policy_keys: what else could have been meant by a key Inductor does not know.
    """
    if not given:
        return {}
    from torch._inductor import config

    current = config.get_config_copy()
    for name, value in given.items():
        if name not in current:
            raise PolicyError(unknown(name, (*policy_keys, "mode"), (*policy_keys, "mode", *current)))
        expected = config.get_type(name)  # type: ignore[attr-defined]  # installed at import
        # Unions and subscripted types have no isinstance; torch.compile lets them pass as well.
        if isinstance(expected, type) and not isinstance(value, expected):
            raise PolicyError(
                f"Inductor option {name!r}: got {value!r} ({type(value).__name__}), "
                f"expected {expected.__name__}; its default is {current[name]!r}"
            )
    return dict(given)


def unknown(key: Any, allowed: tuple[str, ...], candidates: tuple[str, ...]) -> str:
    """The message for an option nobody knows."""
    more = " or any torch._inductor.config key" if len(candidates) > len(allowed) else ""
    return f"unknown option: got {key!r}, expected one of {', '.join(allowed)}{more}{hint(key, candidates)}"
