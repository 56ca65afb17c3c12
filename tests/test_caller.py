"""What the model being called was given is found on the stack: token ids, and of those that stand for images a mask."""

from types import SimpleNamespace

import torch
from torch import nn

from attnpack_fx import caller

IMAGE = 9
IDS = torch.tensor([[1, IMAGE, IMAGE, 2]])


class Asking(nn.Module):
    """Says what is found where a graph of its would run."""

    def forward(self, *args, **kwargs):
        return caller.vision_tokens(), caller.attention_mask()


class Whole(nn.Module):
    """A model with a configuration, around one without."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(image_token_id=IMAGE)
        self.inner = Asking()

    def forward(self, input_ids=None, **given):
        return self.inner(torch.zeros(1, 4, 3))

    def generate(self, input_ids, tokens):
        return self.inner(inputs_embeds=torch.zeros(1, tokens, 3))


def test_ids_and_mask_of_the_outermost_call():
    model, mask = Whole(), torch.ones(1, 4)
    for vision, found in (model(IDS, attention_mask=mask), model(input_ids=IDS, attention_mask=mask)):
        assert torch.equal(vision, IDS == IMAGE) and found is mask


def test_nothing_is_known_of_text_of_a_step_and_without_a_model():
    model = Whole()
    for ids in (torch.tensor([[1, 2, 3, 4]]), IDS[:, 1:2], IDS.float(), None):
        assert model(input_ids=ids) == (None, None)
    assert Asking()(IDS) == (None, None)


def test_a_model_that_generates_with_another_says_only_what_fits_the_call():
    model = Whole()
    assert torch.equal(model.generate(IDS, 4)[0], IDS == IMAGE)
    assert model.generate(IDS, 1)[0] is None and model.generate(IDS, 5)[0] is None
