"""What each attention kernel reads and computes in one launch, counted from its grid and its arguments.

Bytes are those that programs load, from L2 at the nearest; tiles count with their padding. `roofline.py` makes times of
this.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.recorded import Launch

#: Instructions of a lane for a score: mask, maximum, exponential (at a quarter of the rate), sums, rounding; for a
#: rebuilt number of a key: two products and a sum, rounding; for a code: shift, mask, sign, to a float, to bf16.
SCORE, TURN, DECODE = 16, 4, 5


@dataclass
class Work:
    """Bytes loaded and stored, operations on tensor cores, and instructions of lanes beside them."""

    l2: float = 0.0
    matrix: float = 0.0
    vector: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.l2 + other.l2, self.matrix + other.matrix, self.vector + other.vector)


def tensors(launch: Launch) -> Iterator[tuple[str, Tensor]]:
    """Arguments that are read or written, by name without a number: where there is nothing, an index stands in."""
    index = launch.arguments.get("index")
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor) and value is not index and (value.dtype != torch.int64 or name == "axes"):
            yield name.rstrip("0123456789"), value


class _Sizes:
    """Of one launch; rows: query rows of all programs that share a token, padded to tiles."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.a, self.grid = launch, launch.arguments, launch.grid
        self.batch = self.a["index"].shape[0] if "index" in self.a else self.a["out"].shape[0]

    def named(self, *names: str) -> Iterator[Tensor]:
        """The tensors of these names, with a number or without, each once and none that stands in for another."""
        found = {id(each): each for name, each in tensors(self.launch) if name in names}
        yield from found.values()

    def nbytes(self, *names: str) -> int:
        return sum(each.nbytes for each in self.named(*names))

    @property
    def tokens(self) -> int:
        """Packed tokens of a sample."""
        return sum(each.shape[1] for each in self.named("key"))

    def width(self, side: str) -> int:
        """Ranks of coefficients, padded: those that a tile has."""
        coded = self.a.get("KEY_WIDTH" if side == "key" else "VALUE_WIDTH")
        if coded is not None:
            return int(coded)
        if side == "key" and "KEYS" in self.a:
            return int(sum(form[5] for alike in self.a["KEYS"] for form in alike))
        if side == "key" and "STEPS" in self.a:
            return int(self.a["STEPS"] * self.a["BLOCK_BASIS"])
        return int(self.a["BLOCK_R" if side == "key" else "BLOCK_V"])


def _tail(s: _Sizes, blocks: int) -> Work:
    """Attention to tail rows of every KV head, by `blocks` programs each."""
    a, programs = s.a, s.batch * s.a["heads"] * blocks
    length = a["length"]
    return Work(
        blocks * s.nbytes("key_tail", "value_tail") + s.nbytes("query"),
        2 * programs * a["BLOCK_G"] * length * (a["BLOCK_D"] + a["BLOCK_DV"]),
        SCORE * programs * a["BLOCK_G"] * length,
    )


def _absorbed(s: _Sizes, blocks: int, names: tuple[str, ...] = ("basis",)) -> Work:
    """Queries multiplied by the bases."""
    a, bases = s.a, list(s.named(*names))
    ranks = sum(each.shape[2] for each in bases)
    programs = s.batch * a["heads"] * blocks
    coded = any(each.element_size() == 1 for each in bases)
    return Work(
        blocks * s.nbytes(*names),
        2 * programs * a["BLOCK_G"] * ranks * a["BLOCK_D"],
        DECODE * programs * ranks * a["BLOCK_D"] if coded else 0,
    )


def fused(launch: Launch) -> Work:
    s, a, blocks = _Sizes(launch), launch.arguments, launch.grid[1]
    programs = s.batch * a["heads"] * blocks
    scores = programs * a["BLOCK_G"] * s.tokens
    return (
        _tail(s, blocks)
        + _absorbed(s, blocks, ("key_basis", "value_basis"))
        + Work(
            a["heads"] * blocks * s.nbytes("key", "value") + s.nbytes("out"),
            2 * scores * (s.width("key") + s.width("value")),
            SCORE * scores,
        )
    )


def absorb(launch: Launch) -> Work:
    s = _Sizes(launch)
    return _absorbed(s, launch.grid[1]) + _tail(s, launch.grid[1]) + Work(s.nbytes("latent", "partial", "log_sums"))


def tokens(launch: Launch) -> Work:
    """Also of `tokens_coded`: every block of query rows reads and decodes the coefficients."""
    s, a = _Sizes(launch), launch.arguments
    splits, _, blocks = launch.grid
    rows, both = s.batch * blocks * a["BLOCK_M"], s.width("key") + s.width("value")
    coded = any(each.element_size() == 1 for each in s.named("key"))
    return Work(
        blocks * s.nbytes("key", "value") + splits * s.nbytes("latent") + s.nbytes("partial", "log_sums"),
        2 * rows * s.tokens * both,
        SCORE * rows * s.tokens + (DECODE * s.batch * blocks * s.tokens * both if coded else 0),
    )


def rebuilt(launch: Launch) -> Work:
    """Also of `rebuilt_coded`: programs of some KV heads read coefficients and angles, and bases for every tile.

    Tiles that are staged in shared memory are loaded past L1. Where nothing is staged, L1 keeps the bases, and of the
    rows of tables all that neighbours share: they differ along one axis.
    """
    s, a, blocks = _Sizes(launch), launch.arguments, launch.grid[1]
    axes, staged = a["AXES"], a["num_stages"] > 1
    readers, dim, ranks = launch.grid[0] * blocks, a["BLOCK_D"], s.width("key")
    keys = s.batch * a["heads"] * blocks * s.tokens  # rebuilt by all programs
    tile = next(s.named("basis")).nbytes / next(s.named("basis")).shape[0] / a["heads"]
    times = keys / s.tokens * (-(-s.tokens // a["BLOCK_N"]) if staged else launch.grid[2])
    angles = s.tokens * a["ROTATED"] * a["cos"].element_size() * (max(1, axes) if staged else 1)
    read = readers * (s.nbytes("key", "value") / s.batch + angles + s.tokens * axes * 8) + times * tile
    coded = any(each.element_size() == 1 for each in s.named("key"))
    codes = keys * ranks + readers * s.tokens * s.width("value") + keys / a["BLOCK_N"] * ranks * dim
    return _tail(s, blocks) + Work(
        read + s.nbytes("latent", "latent_sums", "partial", "partial_sums"),
        2 * (keys * dim * (ranks + a["BLOCK_G"]) + readers * s.tokens * a["BLOCK_G"] * s.width("value")),
        SCORE * readers * s.tokens * a["BLOCK_G"]
        + TURN * (keys * dim + readers * s.tokens * axes * a["ROTATED"])
        + (DECODE * codes if coded else 0),
    )


def tables(launch: Launch) -> Work:
    s, a, blocks = _Sizes(launch), launch.arguments, launch.grid[1]
    parts = -(-a["positions"] // a["BLOCK_P"])
    turned = s.batch * a["heads"] * a["group"] * a["queries"] * parts * a["BLOCK_P"] * a["BLOCK_D"]
    angles = s.nbytes("cos", "sin") * (s.batch if a["angle_sample"] == 0 else 1)
    return _tail(s, blocks) + Work(
        blocks * parts * s.nbytes("basis") + a["heads"] * angles + s.nbytes("tables", "partial", "log_sums"),
        2 * turned * a["BLOCK_R"],
        TURN * turned * a["BLOCK_R"] / a["BLOCK_BASIS"],
    )


def split(launch: Launch) -> Work:
    """Rows of the tables come from L2, and their products are no matrix product."""
    s, a = _Sizes(launch), launch.arguments
    rows = s.batch * launch.grid[2] * a["BLOCK_M"]
    looked_up = rows * s.tokens * a["AXES"] * a["BLOCK_R"]
    return Work(
        launch.grid[2] * s.nbytes("key", "value", "axes")
        + looked_up * a["tables"].element_size()
        + s.nbytes("partial", "log_sums"),
        2 * rows * s.tokens * a["BLOCK_V"],
        2 * looked_up + SCORE * rows * s.tokens,
    )


def combine(launch: Launch) -> Work:
    """Also of `combine_coded`: each of the programs that share a row reads all of its latent results."""
    s, a = _Sizes(launch), launch.arguments
    pairs, blocks, parts = launch.grid
    width, dim = s.width("value"), a.get("BLOCK_D", 0) * parts
    rows, basis = pairs * blocks * a["BLOCK_G"], pairs * blocks * width * dim
    coded = any(each.element_size() == 1 for each in s.named("basis"))
    latent = s.nbytes("latent", "latent_sums", "partial_sums")
    expanded = rows * width * dim
    return Work(
        parts * latent + s.nbytes("partial", "out") + blocks * s.nbytes("basis", "scale"),
        2 * expanded if a["BLOCK_G"] >= 16 else 0,
        parts * latent / 4 * 2 + (0 if a["BLOCK_G"] >= 16 else 2 * expanded) + (DECODE * basis if coded else 0),
    )


#: By name of the kernel.
WORK: Mapping[str, Callable[[Launch], Work]] = {
    "absorb_kernel": absorb,
    "absorb_coded_kernel": absorb,
    "combine_kernel": combine,
    "combine_coded_kernel": combine,
    "fused_kernel": fused,
    "rebuilt_kernel": rebuilt,
    "rebuilt_coded_kernel": rebuilt,
    "split_kernel": split,
    "tables_kernel": tables,
    "tokens_kernel": tokens,
    "tokens_coded_kernel": tokens,
}
