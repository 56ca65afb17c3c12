"""How long one layer's attention should take on an H200: predicted from what the launchers really launch.

Launchers run on tensors that are not there, for a GPU with the H200's number of multiprocessors; each kernel takes the
longest of the times that its bytes and operations take, and a launch. That is a model: it knows no latencies, no bank
conflicts, no uneven last wave of programs. A kernel may be a third slower than it; one that is twice as slow is worth
a look.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attnpack_fx.kernels.parts import Block
from benchmarks.attention_step import APPENDED
from benchmarks.gpu.coded_layers import CodedLayer
from benchmarks.gpu.layers import Layout, PackedLayer, dense_bytes
from benchmarks.gpu.recorded import Launch, launched
from benchmarks.gpu.unrotated_layers import UnrotatedLayer, unrotated
from benchmarks.gpu.work import WORK, Work, tensors

#: Multiprocessors of an H200, and their clock under load, in Hz.
PROCESSORS, CLOCK = 132, 1.755e9
#: Bytes per second. Memory: what large reads attain of the data sheet's 4.8e12. L2: on no data sheet, and of the order
#: of what is measured on an H100, which has the same one. One multiprocessor takes 64 bytes a clock.
MEMORY, L2, PROCESSOR = 4.3e12, 5.5e12, 64 * CLOCK
#: Operations per second in bf16: of the data sheet's 989e12 the share that `mma.sync` attains, which is what Triton
#: emits for tiles of few query rows; the rest takes `wgmma` on tiles of 64 rows.
MATRIX = 0.6 * 989e12
#: Instructions of one lane per second, of 128 lanes of a multiprocessor, of which an inner loop keeps about 60 % busy.
VECTOR = 0.6 * PROCESSORS * 128 * CLOCK
#: Seconds from the end of one kernel in a CUDA graph to the work of the next.
LAUNCH = 2e-6
DTYPE = torch.bfloat16
#: Arguments of kernels that are a part of the cache, or the query.
_CACHED = ("key", "value", "basis", "scale", "tail", "cos", "sin", "axes", "query")


@dataclass(frozen=True)
class Prediction:
    """kernels: their names without `_kernel`. nbytes: of device memory. bound: what takes most of the time."""

    kernels: tuple[str, ...]
    nbytes: int
    seconds: float
    bound: str
    dense_seconds: float

    @property
    def ratio(self) -> float:
        """Over the dense cache."""
        return self.dense_seconds / self.seconds


def predict(layout: Layout, batch: int, tokens: int, setting: str) -> Prediction:
    """One layer's attention of a decode step over `tokens` tokens, the last few of them dense rows."""
    layer = SETTINGS[setting](_packed(layout, batch, tokens), layout)
    found = attended(layer)
    spent = {"launches": len(found) * LAUNCH}
    seen: dict[int, Tensor] = {}
    for launch in found:
        fresh = {id(each): each for each in _cached(launch) if id(each) not in seen}
        seen |= fresh
        times = limits(WORK[launch.kernel](launch), launch, sum(each.nbytes for each in fresh.values()))
        bound = max(times, key=lambda name: times[name])
        spent[bound] = spent.get(bound, 0.0) + times[bound]
    return Prediction(
        tuple(launch.kernel.removesuffix("_kernel") for launch in found),
        sum(each.nbytes for each in seen.values()),
        sum(spent.values()),
        max(spent, key=lambda name: spent[name]),
        # Its splits are merged by a kernel of their own, as in every library's decode step.
        dense_bytes(layout, batch, tokens, DTYPE) / MEMORY + 2 * LAUNCH,
    )


def limits(work: Work, launch: Launch, memory: int) -> dict[str, float]:
    """Seconds that each limit of the device asks for. memory: bytes that no kernel before has read."""
    busy = min(math.prod(launch.grid), PROCESSORS)
    return {
        "memory": memory / min(MEMORY, busy * PROCESSOR),
        "L2": max(work.l2, memory) / min(L2, busy * PROCESSOR),
        "tensor cores": work.matrix / (MATRIX * busy / PROCESSORS),
        "instructions": work.vector / (VECTOR * busy / PROCESSORS),
    }


def _cached(launch: Launch) -> Iterator[Tensor]:
    """The parts of the cache that it reads. Latent queries and partial results are none, and stay in L2."""
    yield from (value for name, value in tensors(launch) if name.split("_")[-1] in _CACHED)


def attended(layer: "Layer") -> list[Launch]:
    """What attention to a layer launches."""
    from attnpack_fx.kernels.triton.attend import attention

    scale = layer.query.shape[-1] ** -0.5
    return launched(partial(attention, layer.query, *layer.parts, None, scale), PROCESSORS)


def _packed(layout: Layout, batch: int, tokens: int, rank: int = 64) -> PackedLayer:
    """A layer that takes no memory."""
    new = partial(torch.empty, dtype=DTYPE, device="meta")
    packed, heads, dim = tokens - APPENDED, layout.kv_heads, layout.head_dim
    return PackedLayer(
        new(batch, layout.heads, 1, dim),
        (new(batch, packed, rank), new(batch, packed, rank)),
        (new(batch, heads, rank, dim), new(batch, heads, rank, dim)),
        (new(APPENDED, batch, heads, dim), new(APPENDED, batch, heads, dim)),
        torch.empty(batch, packed, dtype=torch.int64, device="meta"),
    )


def _coded(layer: PackedLayer, bits: int) -> CodedLayer:
    """`coded_factors` by its sizes."""
    new = partial(torch.empty, device="meta")

    def codes(x: Tensor) -> Tensor:
        return new((*x.shape[:-1], x.shape[-1] * bits // 8), dtype=torch.uint8)

    batch, _, rank = layer.coefficients[0].shape
    keys, values = (
        Block(codes(coefficient), codes(basis), new((batch, 2, rank), dtype=torch.float32), bits)
        for coefficient, basis in zip(layer.coefficients, layer.bases, strict=True)
    )
    return CodedLayer(layer.query, (keys, values), layer.tails, layer.index, lambda *_: layer.query)


Layer = PackedLayer | UnrotatedLayer | CodedLayer
#: What is stored, by the name it has in the table.
SETTINGS: Mapping[str, Callable[[PackedLayer, Layout], Layer]] = {
    "rotated, 64": lambda layer, _: layer,
    "default, 32 and 64": lambda layer, layout: unrotated(layer, layout, 32),
    "un-rotated, 64": lambda layer, layout: unrotated(layer, layout, 64),
    "rotated, 64, 4 bits": lambda layer, _: _coded(layer, 4),
}
