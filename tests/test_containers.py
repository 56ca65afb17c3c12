"""What every container of a packed cache has in common."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from attnpack_fx.containers import map_tensors, restored, saved, tensors_in
from tests.stored_inputs import Way, stored_pair

WAYS = [Way(), Way(bits=4, packed_text=True), Way(angles="rows", padding=1)]


@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_is_found_mapped_and_saved(way):
    held = stored_pair(way).key.held
    found = tensors_in(held)
    assert {id(each) for each in held.named.values()} <= {id(each) for each in found}
    names = []
    doubled = map_tensors(lambda name, each: names.append(name) or each + each, held)
    assert len(names) == len(found) and {"coefficient", "basis", "index"} <= {*names}
    for one, other in zip(found, tensors_in(doubled), strict=True):
        assert torch.equal(one + one, other)
    again = restored(saved(held))
    assert again.forms == held.forms and all(map(torch.equal, tensors_in(again), found))


def test_what_one_container_remembers_another_does_not():
    placement = stored_pair(Way(padding=1)).key.placement
    assert placement.most_missing == 1
    moved = map_tensors(lambda _, each: each.clone(), placement)
    assert moved._memo is not placement._memo
    seen = tree_map_only(torch.Tensor, torch.clone, placement)
    assert torch.equal(seen.index, placement.index) and seen._memo is not placement._memo


@pytest.mark.parametrize("change", ["of before", "of later", "another"])
def test_what_another_version_wrote_is_refused(change):
    state = saved(stored_pair(Way(angles="rows")).key.held)
    if change == "of before":
        del state["angles"]["tail"]
    elif change == "of later":
        state["placement"]["newer"] = 1
    else:
        del state["container"]
    with pytest.raises(ValueError, match=r"as another version wrote it.*read the prompt again"):
        restored(state)
