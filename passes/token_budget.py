"""What a prefill with fewer tokens costs: the formula of FastV (arXiv 2403.06764, section 4.1), for any decoder."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderSize:
    """Sizes of a decoder.

    layers: how many; width: of the hidden states, and of all query heads; inner: of the MLP.
    kv_width: of all KV heads, None: as wide as the queries. gated: whether the MLP has a gate, so three matrices.

    The paper counts two matrices for every model: `gated=False`.
    """

    layers: int
    width: int
    inner: int
    kv_width: int | None = None
    gated: bool = False

    def layer_cost(self, tokens: int) -> int:
        """Multiplications and additions of one layer at prefill, as pairs: `4 n d^2 + 2 n^2 d + 2 n d m` in the paper.

        Attention counts as if every token saw every token.
        """
        width, kv_width = self.width, self.width if self.kv_width is None else self.kv_width
        projections = 2 * width * (width + kv_width) + (3 if self.gated else 2) * width * self.inner
        return tokens * projections + 2 * tokens**2 * width

    def share_left(self, layer: int, tokens: int, kept: int) -> float:
        """Which share of the prefill remains when the layers from number `layer` on see `kept` of `tokens` tokens.

        The choice itself is not counted, nor are embeddings and the head.
        """
        before, behind = layer * self.layer_cost(tokens), (self.layers - layer) * self.layer_cost(kept)
        return (before + behind) / (self.layers * self.layer_cost(tokens))
