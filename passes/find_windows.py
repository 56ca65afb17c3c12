"""Find layers with a sliding window: attention reads all keys there are, and the newest so many enter the cache."""

from torch.fx import Node

from attnpack_fx.passes.patterns import is_call
from attnpack_fx.passes.state import GraphState

_ALL = slice(None, None, None)


def find_windows(state: GraphState) -> int:
    """Say of every site that keeps a slice of its keys and values which one; returns of how many."""
    results, count = {each for each in state.results if isinstance(each, Node)}, 0
    for site in state.sites:
        key, value = _kept(site.key, results), _kept(site.value, results)
        if key is not None and value is not None and key[1] == value[1]:
            site.kept, site.window = (key[0], value[0]), key[1]
            count += 1
    return count


def _kept(node: Node, results: set[Node]) -> tuple[Node, int] | None:
    """The slice `[:, :, -n:, :]` of a node that leaves the graph, and n; None where all of it does, or nothing."""
    if node in results:
        return None
    for user in node.users:
        if user in results and (count := newest_of(user)) is not None and user.args[0] is node:
            return user, count
    return None


def newest_of(node: Node) -> int | None:
    """Of how many of the newest tokens a node is the slice; None where it is something else."""
    key = node.args[1] if is_call(node, "getitem") else None
    if not isinstance(key, tuple) or len(key) not in (3, 4) or any(each != _ALL for each in (*key[:2], *key[3:])):
        return None
    tokens = key[2]
    if not isinstance(tokens, slice) or tokens.stop is not None or tokens.step not in (None, 1):
        return None
    return -tokens.start if isinstance(tokens.start, int) and tokens.start < 0 else None
