"""What to pack, and how much: `PackPolicy`, the one place where options are named, defaulted and checked.

A policy is a value: frozen, hashable, equal to any policy with the same fields. `PackPolicy.from_options`
splits what a user hands to `torch.compile(..., options=...)` into a policy and plain Inductor configuration;
nothing later validates it again.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

#: One rank: a number of columns, or `"full"` for as many as the matrix has.
Rank = int | Literal["full"]
#: A rank for keys and values alike, a `(key, value)` pair of ranks, or `None` for "leave dense".
RankSpec = Rank | tuple[Rank, Rank] | None
Modality = Literal["vision", "text"]

DEFAULT_VISION_RANK = 64

_RANK_EXPECTED = "an int >= 1, a (key, value) pair of such ranks, 'full' (lossless) or None (leave dense)"
_KEY_SPACES = ("rotated", "unrotated", "auto")


class PolicyError(ValueError):
    """An option has a value no policy can have, or one this model cannot honour."""


@dataclass(frozen=True)
class PackPolicy:
    """Which cached keys and values are packed, and at which rank.

    The defaults are the setting of AttentionPack (CVPR 2026, arXiv 2603.23914): vision tokens at rank 64 for
    keys and values, text tokens dense.

    vision_rank: columns kept per layer of the `[T, H * D]` matrix of vision tokens: an int, a `(key, value)`
        pair, `"full"` (as many as the matrix has: lossless) or `None` (dense). A pair may mix ints and
        `"full"`. The default, exactly 64, means "64, or what exists": where `H * D < 64` it is clipped.
    text_rank: the same for all other tokens, and for every token of a graph that shows no modality. Default
        `None`. Never clipped.
    key_space: `"rotated"`: keys are stored as they are attended, after rotary embedding, and never rebuilt.
        `"unrotated"` and `"auto"` are reserved and raise `NotImplementedError`.
    strict: a rewrite that fails raises; otherwise the untouched graph is compiled and the reason is logged.

    Raises `ValueError` for any field of a wrong type or value.
    """

    vision_rank: RankSpec = DEFAULT_VISION_RANK
    text_rank: RankSpec = None
    key_space: Literal["rotated", "unrotated", "auto"] = "rotated"
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("vision_rank", "text_rank"):
            object.__setattr__(self, name, _checked_rank(name, getattr(self, name)))
        if self.key_space not in _KEY_SPACES:
            raise PolicyError(
                f"key_space: got {self.key_space!r}, expected one of {', '.join(map(repr, _KEY_SPACES))}; "
                "use 'rotated', the default"
            )
        if self.key_space != "rotated":
            raise NotImplementedError(
                f"key_space={self.key_space!r} is not available: 'rotated' is the only key space in this "
                "release; set key_space='rotated' or leave it out"
            )
        if not isinstance(self.strict, bool):
            raise PolicyError(f"strict: got {self.strict!r}, expected a bool; use True or False")

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any] | None, mode: str | None = None, dynamic: bool | None = None
    ) -> tuple["PackPolicy", dict[str, Any]]:
        """Split `torch.compile` options into a policy and Inductor configuration patches.

        options: policy fields by name, or a ready policy under `"policy"`; besides them any
            `torch._inductor.config` key, and `"mode"` (`torch.compile` takes mode or options but not both, so
            a mode can ride along here).
        mode, dynamic: as given to `torch.compile`. Explicit options win over those a mode brings.

        A `-` in a key counts as `_`, as in `torch.compile`. Raises `ValueError` for anything unknown or of a
        wrong type.
        """
        given = _normalised(options)
        policy = given.pop("policy", None)
        inner_mode = given.pop("mode", None)
        own = {name: given.pop(name) for name in _field_names(cls) if name in given}
        if policy is None:
            policy = cls(**own)
        elif not isinstance(policy, PackPolicy):
            raise PolicyError(
                f"policy: got {type(policy).__name__}, expected a PackPolicy; "
                "give its fields as options of their own, or build it with PackPolicy(...)"
            )
        elif own:
            raise PolicyError(
                f"options: got 'policy' and {', '.join(map(repr, own))}, expected one or the other; "
                "set the fields in the policy, e.g. with dataclasses.replace"
            )
        if mode is not None and inner_mode is not None and mode != inner_mode:
            raise PolicyError(f"mode: got {mode!r} and, in options, {inner_mode!r}, expected one; drop one of them")
        chosen = inner_mode if mode is None else mode
        return policy, {
            **_mode_patches(chosen, dynamic),
            **_inductor_patches(given, (*_field_names(cls), "policy")),
        }

    def ranks(self, modality: Modality, key_width: int, value_width: int) -> tuple[int, int] | None:
        """`(key rank, value rank)` for tokens of `modality`, or `None` if they stay dense.

        key_width, value_width: `H * D` of the cached keys and values. The number of tokens, which limits a
        rank too, is not known here. Raises `ValueError` if a rank exceeds its width.
        """
        spec = self._spec(modality)
        if spec is None:
            return None
        key, value = spec if isinstance(spec, tuple) else (spec, spec)
        clip = modality == "vision" and spec == DEFAULT_VISION_RANK
        name = f"{modality}_rank"
        return _resolved(name, "key", key, key_width, clip), _resolved(name, "value", value, value_width, clip)

    def lossless(self, modality: Modality) -> bool:
        """Whether keys and values of `modality` are both packed at full rank."""
        return self._spec(modality) in ("full", ("full", "full"))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON-able values; `from_dict` is the inverse."""
        values = {name: getattr(self, name) for name in _field_names(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PackPolicy":
        """The policy with these fields, defaults elsewhere. Raises `ValueError` for an unknown field."""
        names = _field_names(cls)
        for key in values:
            if key not in names:
                raise PolicyError(_unknown(key, names, names))
        return cls(**values)

    def _spec(self, modality: str) -> RankSpec:
        if modality not in ("vision", "text"):
            raise PolicyError(f"modality: got {modality!r}, expected 'vision' or 'text'")
        return self.vision_rank if modality == "vision" else self.text_rank


def _field_names(cls: type[PackPolicy]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def _checked_rank(name: str, spec: Any) -> RankSpec:
    """`spec` with a pair as a tuple; a list is a pair too, since that is what JSON makes of one."""
    if spec is None:
        return None
    if isinstance(spec, (tuple, list)):
        if len(spec) != 2:
            raise PolicyError(f"{name}: got {spec!r}, expected {_RANK_EXPECTED}; a pair is (key rank, value rank)")
        if None in spec:
            raise PolicyError(
                f"{name}: got {spec!r}, expected {_RANK_EXPECTED}; keys and values of one token are packed "
                f"together or not at all, so use {name}=None to leave both dense, or 'full' for the exact one"
            )
        key, value = spec
        return _checked_single(name, key, spec), _checked_single(name, value, spec)
    return _checked_single(name, spec, spec)


def _checked_single(name: str, rank: Any, spec: Any) -> Rank:
    # bool is an int to Python, but vision_rank=True never means rank 1.
    if isinstance(rank, int) and not isinstance(rank, bool):
        if rank >= 1:
            return rank
        raise PolicyError(f"{name}: got {spec!r}, expected {_RANK_EXPECTED}; use None to leave these tokens dense")
    if isinstance(rank, str) and rank == "full":
        return "full"
    raise PolicyError(f"{name}: got {spec!r} ({type(rank).__name__}), expected {_RANK_EXPECTED}; e.g. {name}=64")


def _resolved(name: str, role: str, rank: Rank, width: int, clip: bool) -> int:
    if rank == "full":
        return width
    if rank <= width:
        return rank
    if clip:
        return width
    raise PolicyError(
        f"{name}={rank} exceeds H * D = {width}, the largest rank a {role} of this model has; "
        f"use a rank <= {width} or 'full'"
    )


def _normalised(options: Mapping[str, Any] | None) -> dict[str, Any]:
    if options is None:
        return {}
    if isinstance(options, PackPolicy):
        raise PolicyError("options: got a PackPolicy, expected a mapping; use options={'policy': policy}")
    if not isinstance(options, Mapping):
        raise PolicyError(f"options: got {type(options).__name__}, expected a mapping such as {{'vision_rank': 64}}")
    given: dict[str, Any] = {}
    for key, value in options.items():
        if not isinstance(key, str):
            raise PolicyError(f"options: got the key {key!r}, expected names as str")
        name = key.replace("-", "_")
        if name in given:
            raise PolicyError(f"options: got {name!r} twice, spelled with '-' and with '_'; give it once")
        given[name] = value
    return given


def _mode_patches(mode: str | None, dynamic: bool | None) -> dict[str, Any]:
    if mode is None:
        return {}
    # Imported when needed, not with the package: Inductor is slow to import.
    from torch._inductor import list_mode_options

    known = tuple(list_mode_options())
    if not isinstance(mode, str) or mode not in known:
        raise PolicyError(f"mode: got {mode!r}, expected one of {', '.join(map(repr, known))}{_hint(mode, known)}")
    return dict(list_mode_options(mode, dynamic))


def _inductor_patches(given: Mapping[str, Any], policy_keys: tuple[str, ...]) -> dict[str, Any]:
    """`given` as Inductor config patches, checked the way `torch.compile` checks its own options."""
    if not given:
        return {}
    from torch._inductor import config

    current = config.get_config_copy()
    for name, value in given.items():
        if name not in current:
            raise PolicyError(_unknown(name, (*policy_keys, "mode"), (*policy_keys, "mode", *current)))
        expected = config.get_type(name)  # type: ignore[attr-defined]  # installed at import
        # Unions and subscripted types have no isinstance; torch.compile lets them pass as well.
        if isinstance(expected, type) and not isinstance(value, expected):
            raise PolicyError(
                f"Inductor option {name!r}: got {value!r} ({type(value).__name__}), "
                f"expected {expected.__name__}; its default is {current[name]!r}"
            )
    return dict(given)


def _unknown(key: Any, allowed: tuple[str, ...], candidates: tuple[str, ...]) -> str:
    more = " or any torch._inductor.config key" if len(candidates) > len(allowed) else ""
    return f"unknown option: got {key!r}, expected one of {', '.join(allowed)}{more}{_hint(key, candidates)}"


def _hint(got: Any, candidates: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(got), candidates, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
