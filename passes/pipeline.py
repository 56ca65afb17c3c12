"""The passes, in the one order they run in."""

from collections.abc import Callable

from attnpack_fx.passes.batch_compress import batch_compress
from attnpack_fx.passes.cleanup import cleanup
from attnpack_fx.passes.find_attention import find_attention
from attnpack_fx.passes.find_modality import find_modality
from attnpack_fx.passes.find_windows import find_windows
from attnpack_fx.passes.merge_appends import merge_appends
from attnpack_fx.passes.pack_cache import decompress_inputs, pack_cache
from attnpack_fx.passes.prune_tokens import prune_tokens
from attnpack_fx.passes.route_linear import route_linear
from attnpack_fx.passes.state import GraphState

#: Each pass is `state -> how many things it found or changed`.
PASSES: tuple[Callable[[GraphState], int], ...] = (
    find_attention,  # before any rewrite: patterns are those of the model's source
    find_windows,  # after find_attention, whose sites it completes
    find_modality,  # before pack_cache, which splits tokens by it
    prune_tokens,  # after both, which it asks for; before pack_cache, which places what it leaves
    pack_cache,
    batch_compress,  # after pack_cache, which writes the compressions
    merge_appends,  # after pack_cache, which writes an append per cache tensor
    route_linear,  # after pack_cache: only graphs that read a packed cache are decode steps worth it
    cleanup,  # last: earlier passes leave dead nodes and unread placeholders behind
)


def run(state: GraphState) -> dict[str, int]:
    """Run every pass; returns its count by name."""
    return {step.__name__: step(state) for step in PASSES}


def run_fallback(state: GraphState) -> None:
    """Rewrite nothing: packed inputs are decompressed, the rest stays as it was captured."""
    decompress_inputs(state)
    cleanup(state)
