"""Merged layers: one tensor of codes for both, lengths of their own, and tokens that stay as they are."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx import KIVI, MiniCache, PackPolicy, Quantize, cache_bytes
from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.coding import code
from attnpack_fx.kernels.parts import Rows, tensors_of
from attnpack_fx.maintenance import maintain
from attnpack_fx.merging import merge
from tests.layer_inputs import Mirror, mirrored
from tests.stored_inputs import DIM, HEADS, Way


def pair(way: Way, apart_by: float = 0.2, factors: bool = False) -> tuple[Mirror, Mirror]:
    """Two layers of the same tokens; the upper's rows are near the lower's, of other lengths."""
    lower, upper = (mirrored(way, factors=factors) for _ in range(2))
    for of in ("key", "value"):
        packed = getattr(upper.layer, of)
        rows = packed.lease.buffer.rows[: packed.lease.length]
        noise = torch.randn(rows.shape, generator=upper.random) * apart_by
        rows.copy_((rows + noise * rows.norm(dim=-1, keepdim=True)) * 1.5)
        assert getattr(lower.layer, of).lease.buffer.rows is not packed.lease.buffer.rows
    for mirror, number in ((lower, 2), (upper, 3)):
        mirror.layer = replace(mirror.layer, number=number)
        mirror.layer.key = type(mirror.layer.key)(mirror.layer.key.held, mirror.layer.key.lease)
    placement = lower.layer.key.placement
    for of in ("key", "value"):
        packed = getattr(upper.layer, of)
        setattr(upper.layer, of, type(packed)(replace(packed.held, placement=placement), packed.lease))
    lower.reread()
    upper.reread()
    return lower, upper


def grow(mirrors: tuple[Mirror, Mirror], count: int) -> None:
    for mirror in mirrors:
        mirror.append(count)
        mirror.layer.key = type(mirror.layer.key)(mirror.layer.key.held, mirror.layer.key.lease)


def shared(one: CachedLayer, other: CachedLayer) -> bool:
    """Whether codes, and all else but lengths, are one memory, and lengths are not."""
    for of in ("key", "value"):
        first, second = (getattr(each, of).segments[-1].blocks[0] for each in (one, other))
        assert isinstance(first, Rows) and isinstance(second, Rows)
        own = "norm" if first.form.norm else "scale"
        for name, tensor in tensors_of(first).items():
            same = tensor.data_ptr() == tensors_of(second)[name].data_ptr()
            if tensor.numel() and same == (name == own):
                return False
    return True


def expected(lower: torch.Tensor, upper: torch.Tensor, method: MiniCache) -> tuple[list[torch.Tensor], torch.Tensor]:
    """In float64: rows on the middle of the arc with each layer's length, and which tokens are retained."""
    x, y = (each.double() for each in (lower, upper))
    norms = [each.norm(dim=-1, keepdim=True) for each in (x, y)]
    u, v = (each / norm.clamp(min=1e-300) for each, norm in zip((x, y), norms, strict=True))
    angle = (u * v).sum(-1, keepdim=True).clamp(-1, 1).arccos()
    middle = (u + v) / (u + v).norm(dim=-1, keepdim=True).clamp(min=1e-300)
    distance = angle.mean(1)[..., 0]  # [B, T]
    there = norms[0].amax((1, 3)) > 0
    low = distance.masked_fill(~there, float("inf")).amin(1, keepdim=True)
    high = distance.masked_fill(~there, -float("inf")).amax(1, keepdim=True)
    retained = there & (distance >= high - method.gamma * (high - low))
    if method.gamma == 0:
        retained &= False
    return [middle * norm for norm in norms], retained


@settings(max_examples=12, deadline=None)
@given(
    padding=st.integers(0, 3), gamma=st.sampled_from([0.0, 0.1, 0.5]), seed=st.integers(0, 20), factors=st.booleans()
)
def test_both_layers_hold_one_direction_and_their_own_lengths(padding, gamma, seed, factors):
    lower, upper = pair(Way(padding=padding, seed=seed), factors=factors)
    method = MiniCache(gamma=gamma, residual=4)
    dense = {of: (getattr(lower, of), getattr(upper, of)) for of in ("key", "value")}
    first = lower.layer.key.held.packed
    tail = lower.layer.key.positions[:, first:]
    merge(lower.layer, upper.layer, method, None)
    assert shared(lower.layer, upper.layer)
    held = [packed.held for layer in (lower.layer, upper.layer) for packed in (layer.key, layer.value)]
    assert all(each.placement is held[0].placement and each.pinned == held[0].pinned for each in held)
    retained = torch.zeros((2, lower.tokens), dtype=torch.bool)
    made = {}
    for of, (one, other) in dense.items():
        merged, kept = expected(*(each.gather(2, _rows(tail)) for each in (one, other)), method)
        kept &= tail >= 0
        made[of] = merged
        for sample in range(2):
            retained[sample, tail[sample][kept[sample]]] = True
    for of, both in dense.items():
        for mirror, old, new in zip((lower, upper), both, made[of], strict=True):
            whole = old.double().clone()
            for sample in range(2):
                real = tail[sample] >= 0
                whole[sample][:, tail[sample][real]] = new[sample][:, real]
            whole = torch.where(retained[:, None, :, None], old.double(), whole).float()
            setattr(mirror, of, whole)
    for mirror in (lower, upper):
        mirror.check(tolerance=2e-4)
        # What is retained is what it was, bit for bit, or near if it is in factors.
        assert (mirror.layer.key.lease.length == mirror.layer.key.held.pinned) or not padding


def _rows(tail: torch.Tensor) -> torch.Tensor:
    return tail.clamp(min=0)[:, None, :, None].expand(-1, HEADS, -1, DIM)


CODINGS = {"none": None, "kivi": KIVI(8, group=4, residual=4), "quantize": Quantize(8, target="tail", recent=4)}


@pytest.mark.parametrize("coding", list(CODINGS))
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_later_tokens_join_and_stay_shared(coding, gamma):
    mirrors = pair(Way(padding=1))
    lower, upper = mirrors
    method, by = MiniCache(gamma=gamma, residual=4), CODINGS[coding]
    merge(lower.layer, upper.layer, method, by)
    history, first = [], lower.layer.key.held.packed
    for _ in range(8):
        for mirror in mirrors:
            mirror.reread()
            history.append(replace(mirror, layer=copy.copy(mirror.layer)))
        grow(mirrors, 5)
        before = [(mirror.key, mirror.value) for mirror in mirrors]
        counts = lower.layer.key.held.packed
        merge(lower.layer, upper.layer, method, by)
        assert shared(lower.layer, upper.layer)
        for mirror, (key, value) in zip(mirrors, before, strict=True):
            # Rows are random: what is merged is nearer than twice their length, and all else as it was.
            for new, old in ((mirror.layer.key.dense(), key), (mirror.layer.value.dense(), value)):
                different = ((new - old).abs().amax((1, 3)) > 1e-4).sum(1)
                assert int(different.max()) <= lower.layer.key.held.packed - counts
            mirror.reread()
            mirror.check()
    assert lower.layer.key.held.packed > first and lower.layer.key.lease.length - lower.layer.key.held.pinned < 40
    for earlier in history:
        earlier.check()


@pytest.mark.parametrize("coding", [None, KIVI(4, group=4, residual=4)], ids=["none", "kivi"])
def test_what_both_hold_counts_once_whatever_is_done(coding):
    lower, upper = pair(Way(vision=49, text=47))
    merge(lower.layer, upper.layer, MiniCache(gamma=0.0), coding)
    cache = [lower.layer.key, lower.layer.value, upper.layer.key, upper.layer.value]

    def once(cache: list) -> int:
        """Bytes of both layers over those of one: far below 2."""
        return cache_bytes(cache) / cache_bytes(cache[:2])

    assert once(cache) < 1.2
    beams, again, file = torch.tensor([1, 1, 0]), torch.tensor([2, 0]), io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    results = {
        "select": [each.index_select(0, beams) for each in cache],
        "twice": [each.index_select(0, again) for each in [each.index_select(0, beams) for each in cache]],
        "repeat": [each.repeat_interleave(2, dim=0) for each in cache],
        "clone": [each.clone() for each in cache],
        "slice": [each[:1] for each in cache],
        "to": [each.to(torch.bfloat16) for each in cache],
        "load": loaded,
        "load, select": [each.index_select(0, beams) for each in loaded],
        "deepcopy": copy.deepcopy(cache),
    }
    for name, made in results.items():
        assert once(made) < 1.5, name  # tails of copies have room to grow
        layers = (replace(lower.layer, key=made[0], value=made[1]), replace(upper.layer, key=made[2], value=made[3]))
        assert shared(*layers), name
    for made, old in zip(results["select"], cache, strict=True):
        torch.testing.assert_close(made.dense(), old.dense()[beams])
    beams.copy_(torch.tensor([0, 0, 0]))
    for old in cache:
        torch.testing.assert_close(old.index_select(0, beams).dense(), old.dense()[beams])


def test_layers_that_hold_other_tokens_stay_apart():
    lower, upper = pair(Way())[0], pair(Way(padding=1))[1]
    before = lower.layer.key.held.segments
    assert not merge(lower.layer, upper.layer, MiniCache(), None)
    assert lower.layer.key.held.segments == before and not upper.layer.key.segments
    # What cannot be merged is coded all the same.
    coding = KIVI(8, group=2, residual=2)
    maintain(
        [lower.layer, upper.layer], PackPolicy(vision_rank=None, passes=(MiniCache(first=0.5), coding), layer_count=4)
    )
    assert all(isinstance(each.layer.key.segments[-1].blocks[0], Rows) for each in (lower, upper))


def test_layers_whose_cache_is_not_packed_count_as_layers():
    """Of four layers, numbers 2 and 3 are the deeper half, whether or not others are packed."""
    lower, upper = pair(Way())
    maintain([lower.layer, upper.layer], PackPolicy(vision_rank=None, passes=(MiniCache(gamma=0.0),)))
    assert shared(lower.layer, upper.layer)


def test_retained_tokens_are_exact_and_stay_when_others_are_coded():
    mirrors = lower, upper = pair(Way(vision=16, text=16, batch=1))
    old = [getattr(mirror, of).clone() for mirror in mirrors for of in ("key", "value")]
    merge(lower.layer, upper.layer, MiniCache(gamma=0.4, residual=4), KIVI(2, group=4, residual=4))
    pinned = lower.layer.key.held.pinned
    assert 0 < pinned < 32
    for _ in range(8):
        grow(mirrors, 1)
        merge(lower.layer, upper.layer, MiniCache(gamma=0.4, residual=4), KIVI(2, group=4, residual=4))
    assert lower.layer.key.held.pinned >= pinned
    first = lower.layer.key.held.packed
    kept = lower.layer.key.positions[0, first : first + pinned]
    packed = [getattr(mirror.layer, of) for mirror in mirrors for of in ("key", "value")]
    for now, then in zip(packed, old, strict=True):
        assert torch.equal(now.dense()[:, :, kept], then[:, :, kept])


def test_coding_alone_leaves_pinned_tokens_alone():
    lower, upper = pair(Way(vision=16, text=16, batch=1))
    merge(lower.layer, upper.layer, MiniCache(gamma=0.4, residual=4), None)
    pinned = lower.layer.key.held.pinned
    lower.layer = replace(lower.layer, prefill=False)
    before = lower.layer.key
    code(lower.layer, KIVI(8, group=4, residual=64))
    assert lower.layer.key is before and pinned
