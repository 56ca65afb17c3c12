"""Why keys and values stay dense: nothing that enters a cache is left without a word."""

from torch.fx import Node

from attnpack_fx.passes.patterns import cat_along_tokens, is_call, layer_of, through_no_ops, value_of
from attnpack_fx.passes.state import GraphState, Site, SiteReport, shape_of

_PARTS = ("getitem", "slice", "narrow")


def _written(key: Node) -> Node:
    """The tensor whose part, or whole, attention reads."""
    base = through_no_ops(key)
    while is_call(base, "getitem", "slice", "narrow") and isinstance(base.args[0], Node):
        base = base.args[0]
    return base


def is_static(key: Node) -> bool:
    """Whether the keys are written into storage of a fixed size, as in StaticCache."""
    base, writes = _written(key), ("index_copy_", "index_copy", "copy_", "setitem", "index_put_")
    return is_call(base, *writes) or any(is_call(user, *writes) and user.args[0] is base for user in base.users)


def leave(state: GraphState, site: Site) -> SiteReport:
    """Say why a site stays as it is."""

    def dense(reason: str) -> SiteReport:
        return SiteReport(layer_of(site.node), site.kind, "dense", reason, site.is_causal)

    kept = [user for user in site.key.users if user in state.results and is_call(user, *_PARTS, "contiguous")]
    if kept:
        return dense("sliding window: the cache keeps a slice of the keys")
    base = _written(site.key)
    if is_static(site.key):
        return dense("static cache (index_copy_): packed static decode is not offered yet")
    if base.op == "placeholder" and _returned_by_a_break(base):
        return dense(
            "the graph breaks where keys and values are stored, as with a paged cache, which has its memory already"
        )
    if base.op == "placeholder":
        return dense("cross-attention or a shared cache: the keys are only read here")
    if site.obstacle is not None and site.kind == "flex_attention":
        return dense(site.obstacle)
    if _grows(base):
        return dense("the keys attended to are not the keys kept in the cache")
    if _comes_from(site, _kept(state)):
        return dense("the cache holds what keys and values are made of, as in multi-head latent attention")
    reason = "keys and values are not kept: no cache, as in an encoder or with use_cache=False"
    return SiteReport(layer_of(site.node), site.kind, "uncached", reason, site.is_causal)


def report_unknown(state: GraphState) -> None:
    """Report layers that keep keys or values which no site reads, and what of their attention is not known."""
    reported = {report.layer for report in state.reports if report.action != "uncached"}
    read = {_written(node) for site in state.sites for node in (site.key, site.value)}
    for node in _kept(state) - read:
        layer = layer_of(node)
        if layer not in reported:
            reported.add(layer)
            reasons = (why for softmax, why in state.unknown.items() if layer_of(softmax).startswith(layer))
            reason = next(reasons, "no known form of attention reads the keys and values kept here")
            state.reports.append(SiteReport(layer, "other", "dense", reason, causal=True))


def _returned_by_a_break(placeholder: Node) -> bool:
    """Whether Dynamo took it from the call that it did not capture."""
    argument = placeholder.meta.get("grapharg")
    name = getattr(getattr(argument, "source", None), "name", "")
    return "___stack" in str(name() if callable(name) else name)


def _kept(state: GraphState) -> set[Node]:
    """What leaves the graph as part of a cache: tokens behind those of an earlier one, or behind none."""
    bases = (_written(result) for result in state.results if isinstance(result, Node) and _is_floating(result))
    return {base for base in bases if base not in state.packed and _grows(base)}


def _is_floating(node: Node) -> bool:
    value = value_of(node)
    return value is not None and value.dim() == 4 and value.is_floating_point()


def _grows(base: Node) -> bool:
    return any(shape_of(piece) == (0,) or piece.op == "placeholder" for piece in cat_along_tokens(base))


def _comes_from(site: Site, sources: set[Node]) -> bool:
    """Whether a site's keys are made of others in its own layer."""
    layer, found, waiting = layer_of(site.node), {site.key}, [site.key]
    while waiting:
        current = waiting.pop()
        if current in sources:
            return True
        new = [each for each in current.all_input_nodes if each not in found and layer_of(each).startswith(layer)]
        found.update(new)
        waiting += new
    return False
