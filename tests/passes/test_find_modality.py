"""The modality mask is read out of the graph however image features are put among the text embeddings."""

import pytest
import torch

from attnpack_fx.passes.find_modality import find_modality
from tests.passes.capture import capture

EMBEDDINGS = torch.zeros(2, 6, 4)
IMAGE = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
VIDEO = torch.tensor([[0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
FEATURES = torch.randn(4, 4)
CLIPS = torch.randn(2, 4)


def found(function, *arguments):
    """How many masks were found, and the united mask's value when the graph runs."""
    state = capture(function, *arguments)
    count = find_modality(state)
    if state.modality is None:
        return count, None
    assert state.modality.meta["example_value"].shape == (2, 6)
    state.output.args = ((state.modality,),)
    state.graph.lint()
    module = torch.fx.GraphModule({}, state.graph)
    names = [node.name.removeprefix("l_").rstrip("_") for node in state.graph.nodes if node.op == "placeholder"]
    values = dict(zip(function.__code__.co_varnames, arguments, strict=False))
    return count, module(*(values[name] for name in names))[0]


def scattered(x, mask, features):
    return x.masked_scatter(mask, features)


def scattered_in_place(x, mask, features):
    x = x.clone()
    x.masked_scatter_(mask, features)
    return x


def assigned(x, mask, features):
    x = x.clone()
    x[mask] = features
    return x


def index_put(x, mask, features):
    return x.index_put((mask,), features)


@pytest.mark.parametrize(
    ("function", "mask"),
    [
        (scattered, IMAGE[..., None]),
        (scattered, IMAGE[..., None].expand(2, 6, 4)),
        (scattered_in_place, IMAGE[..., None].expand(2, 6, 4)),
        (assigned, IMAGE),
        (index_put, IMAGE),
    ],
)
def test_the_mask_is_found(function, mask):
    count, value = found(function, EMBEDDINGS, mask, FEATURES)
    assert count == 1
    assert torch.equal(value, IMAGE)


def test_a_mask_made_in_the_graph_is_found():
    def function(x, ids, features):
        return x.masked_scatter((ids == 7).unsqueeze(-1).expand_as(x), features)

    count, value = found(function, EMBEDDINGS, torch.where(IMAGE, 7, 3), FEATURES)
    assert count == 1
    assert torch.equal(value, IMAGE)


@pytest.mark.parametrize("spread", [True, False])
def test_two_masks_are_united(spread):
    def function(x, image, features, video, clips):
        if spread:
            return x.masked_scatter(image[..., None], features).masked_scatter(video[..., None].expand_as(x), clips)
        x = x.clone()
        x[image] = features
        x[video] = clips
        return x

    count, value = found(function, EMBEDDINGS, IMAGE, FEATURES, VIDEO, CLIPS)
    assert count == 2
    assert torch.equal(value, IMAGE | VIDEO)


def test_three_masks_are_united():
    def function(x, image, features, video, clips):
        x = x.masked_scatter(image[..., None], features)
        x = x.masked_scatter(video[..., None], clips)
        return x.masked_scatter((image & video)[..., None], clips)

    count, value = found(function, EMBEDDINGS, IMAGE, FEATURES, VIDEO, CLIPS)
    assert count == 3
    assert torch.equal(value, IMAGE | VIDEO)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, mask: x * 2,
        lambda x, mask: x.masked_fill(mask[..., None], 0.0),
        lambda x, mask: x[..., 0].masked_scatter(mask, x[..., 1]),  # no [B, T, C] embeddings
        lambda x, mask: x.long().masked_scatter(mask[..., None], x.long()),  # token ids are no embeddings
    ],
)
def test_nothing_is_found_where_nothing_is_scattered_into_embeddings(function):
    state = capture(function, EMBEDDINGS, IMAGE)
    assert find_modality(state) == 0
    assert state.modality is None
