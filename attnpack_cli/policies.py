"""Checks of a policy file that need no PyTorch: its form, and the names in it; `PackPolicy.load` makes all others."""

from pathlib import Path

from attnpack_cli.errors import UserError, hint
from attnpack_cli.files import read_json

#: Fields of `attnpack_fx.PackPolicy`.
FIELDS = (
    "vision_rank",
    "text_rank",
    "skip_layers",
    "key_space",
    "fold_every",
    "recent",
    "max_fold_error",
    "partial",
    "bases",
    "basis_tolerance",
    "layers",
    "passes",
    "layer_count",
    "processes",
    "strict",
)
#: Names in `attnpack_fx.passes.catalogue`.
METHODS = (
    "Quantize",
    "KIVI",
    "KVQuant",
    "GEAR",
    "H2O",
    "Scissorhands",
    "StreamingLLM",
    "RandomEviction",
    "AVL",
    "FastV",
    "ASAP",
    "RandomPrune",
    "Pool",
    "MiniCache",
)
_EXPECTED = "a file that PackPolicy.save wrote"


def check_policy_file(path: Path) -> None:
    """Raise `UserError` for a file that is missing, no policy, or names fields or methods that do not exist."""
    content = read_json("--policy", path, _EXPECTED)
    policy = content.get("policy") if isinstance(content, dict) and "version" in content else None
    if not isinstance(policy, dict):
        raise UserError(f"--policy {path}: not a policy file; expected {_EXPECTED}, with a version and a policy")
    for name in policy:
        if name not in FIELDS:
            raise UserError(
                f"--policy {path}: got the field {name!r}, expected some of {', '.join(FIELDS)}{hint(name, FIELDS)}"
            )
    methods = policy.get("passes")
    for method in methods if isinstance(methods, list) else []:
        name = method.get("method") if isinstance(method, dict) else method
        if name not in METHODS:
            raise UserError(
                f"--policy {path}: got the method {name!r}, expected one of {', '.join(METHODS)}{hint(name, METHODS)}"
            )
