"""The policies compared, by sweep, and why one is left out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import attnpack_fx
from attnpack_fx import Columns, LayerPlan, Linear, PackPolicy, Partial, Stored
from attnpack_fx.demo import digits
from attnpack_fx.demo.load import Loaded, batch_inputs
from attnpack_fx.ranks import Rank
from benchmarks.quality.data import Setting

RANKS: tuple[Rank, ...] = (8, 12, 16, 24, 32, 48, 64, 96, 128, "full")
SPACES = ("rotated", "unrotated")
FRACTIONS = (8, 16, 32, 48, 64)
_CALIBRATION_SAMPLES = 4
_CALIBRATION_SEED = 20_001


class SkippedError(Exception):
    """Why a policy cannot be measured."""


@dataclass(frozen=True)
class Candidate:
    """A policy to measure. make: builds it, perhaps at some cost, or raises `SkippedError`.

    unlike: a policy that holds other bytes, unless what this one adds to it has no effect.
    """

    name: str
    make: Callable[[Loaded], PackPolicy]
    unlike: PackPolicy | None = None


def candidates(sweep: str, quick: bool, setting: Setting, layers: int) -> Iterator[Candidate]:
    """The policies of a sweep, in order. layers: of the decoder."""
    yield from _SWEEPS[sweep](quick, setting, layers)


def _fixed(name: str, policy: PackPolicy, unlike: PackPolicy | None = None) -> Candidate:
    return Candidate(name, lambda loaded: policy, unlike)


def _uniform(quick: bool, setting: Setting, layers: int) -> Iterator[Candidate]:
    for space in SPACES:
        for rank in (8, 16, 32, 64) if quick else RANKS:
            yield _fixed(f"{space} {rank}", PackPolicy(vision_rank=rank, key_space=space))


def _linear(quick: bool, setting: Setting, layers: int) -> Iterator[Candidate]:
    for space in ("unrotated",) if quick else SPACES:
        for low, high in ((8, 24),) if quick else ((8, 24), (16, 48)):
            for ends in ((low, high), (high, low)):
                policy = PackPolicy(vision_rank=Linear(*ends), key_space=space)
                yield _fixed(f"{space} {ends[0]} to {ends[1]}", policy)


def _partial(quick: bool, setting: Setting, layers: int) -> Iterator[Candidate]:
    kinds = {
        "values": Partial(),
        "keys and values": Partial(keys=True),
        "values, stored": Partial(store=True),
        "keys and values, stored": Partial(keys=True, store=True),
    }
    for space in ("unrotated",) if quick else SPACES:
        for rank in (16,) if quick else (16, 32, 64):
            for name, partial in kinds.items():
                yield _fixed(f"{space} {rank}, {name}", PackPolicy(vision_rank=rank, key_space=space, partial=partial))


def _bits(quick: bool, setting: Setting, layers: int) -> Iterator[Candidate]:
    for space in ("unrotated",) if quick else SPACES:
        for rank in (32,) if quick else (16, 32, 64):
            for bits in (8, 4, 2):
                columns = Columns(((rank, bits),))
                plan = LayerPlan(Stored(columns, columns), None, space)
                yield _fixed(f"{space} {rank}, {bits} bit", PackPolicy(layers=(plan,) * layers))


def _bases(quick: bool, setting: Setting, layers: int) -> Iterator[Candidate]:
    for space in ("unrotated",) if quick else SPACES:
        for rank in (16,) if quick else (16, 32, 64):
            one = PackPolicy(vision_rank=rank, key_space=space)
            for tolerance in (0.1, 1e9):
                policy = PackPolicy(vision_rank=rank, key_space=space, bases="batch", basis_tolerance=tolerance)
                yield _fixed(f"{space} {rank}, batch, tolerance {tolerance:g}", policy, unlike=one)


def _calibrated(quick: bool, setting: Setting, layers: int) -> Iterator[Candidate]:
    made: dict[int, PackPolicy] = {}
    for fraction in (16,) if quick else FRACTIONS:

        def make(loaded: Loaded, fraction: int = fraction) -> PackPolicy:
            if fraction not in made:
                made[fraction] = calibrate(loaded, setting, 1 / fraction)
            return made[fraction]

        def alike(loaded: Loaded, make: Callable[[Loaded], PackPolicy] = make) -> PackPolicy:
            return _uniform_of_equal_bytes(make(loaded), loaded, setting)

        yield Candidate(f"1/{fraction}, calibrated", make)
        yield Candidate(f"1/{fraction}, uniform", alike)


def calibrate(loaded: Loaded, setting: Setting, budget: float) -> PackPolicy:
    """A plan from training images. budget: the part of the dense vision bytes it may take."""
    function = getattr(attnpack_fx, "calibrate", None)
    if function is None:
        raise SkippedError("attnpack_fx.calibrate does not exist")
    try:
        found = function(loaded.model, _samples(loaded, setting), budget=budget)
    except NotImplementedError as error:
        raise SkippedError(f"calibrate: {error}") from error
    policy = getattr(found, "policy", found)
    if not isinstance(policy, PackPolicy):
        raise SkippedError(f"calibrate: got {type(found).__name__}, expected a PackPolicy")
    return policy


def _samples(loaded: Loaded, setting: Setting) -> list[dict]:
    asked = digits.held_out_questions(
        setting.task, setting.images, _CALIBRATION_SAMPLES, _CALIBRATION_SEED, split="train"
    )
    return [batch_inputs(loaded, [each.prompt], [each.images]) for each in asked]


def _uniform_of_equal_bytes(policy: PackPolicy, loaded: Loaded, setting: Setting) -> PackPolicy:
    """At the uniform rank whose factors come closest to the bytes of the plan's."""
    config = loaded.model.config.get_text_config()
    width, count = config.num_key_value_heads * config.head_dim, config.num_hidden_layers
    own = loaded.model.dtype.itemsize * 8
    tokens = setting.images * loaded.model.config.image_seq_length
    total = 0
    for number in range(count):
        vision = policy.layer(number, count, width, width).vision
        for columns in () if vision is None else (vision.key, vision.value):
            for columns_of, bits in columns.blocks:
                assert columns_of != "full"
                scale = 64 if bits else 0
                total += columns_of * ((tokens + width) * (bits or own) + scale)
        if vision is None:
            total += 2 * tokens * width * own
    rank = max(1, min(width, round(total / (2 * count * (tokens + width) * own))))
    return PackPolicy(vision_rank=rank, key_space="unrotated")


_SWEEPS = {
    "uniform": _uniform,
    "linear": _linear,
    "partial": _partial,
    "bits": _bits,
    "bases": _bases,
    "calibrated": _calibrated,
}
SWEEPS = tuple(_SWEEPS)
