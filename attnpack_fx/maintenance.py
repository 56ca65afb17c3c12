"""What a packed cache needs between two calls of a model: regrouping by importance, and folds of the dense tail."""

from attnpack_fx import folding, regrouping
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.storage import Stored
from attnpack_fx.policy import PackPolicy


def maintain(
    key: PackedTensor, value: PackedTensor, added: int, text: Stored | None, policy: PackPolicy
) -> tuple[PackedTensor, PackedTensor]:
    """Keys and values of one layer, after `added` new tokens, with all done that they have made due.

    text: how the layer stores text.
    """
    if policy.partial is not None and regrouping.is_due(key, value, added, policy.partial):
        key, value = regrouping.regroup(key, value, policy.partial)
    count = folding.due(key, policy)
    if count and text is not None:
        key, value = folding.fold(key, value, count, text, policy.max_fold_error)
    return key, value
