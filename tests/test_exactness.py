"""Zero-change exactness: at full rank every architecture generates what it generates from a dense cache."""

import warnings

import pytest
import torch

from attnpack_fx import AttnpackWarning, PackedTensor, attnpack_backend
from attnpack_fx.passes.state import SiteReport
from tests.zoo import ZOO, Example

LOSSLESS = {"vision_rank": "full", "text_rank": "full", "strict": True}
TOKENS = 32
#: Largest difference of a logit, as a part of the largest logit.
TOLERANCE = 1e-4


class Observer:
    """The backend, remembering what it reported; graphs come in the order they were compiled."""

    def __init__(self) -> None:
        self.graphs: list[list[SiteReport]] = []

    def __call__(self, gm, example_inputs, **options):
        return attnpack_backend(gm, example_inputs, observer=self.graphs.append, **options)

    def sites(self, action: str) -> list[SiteReport]:
        return [site for graph in self.graphs for site in graph if site.action == action]


def _check(example: Example, attn_implementation: str, batch: int = 1, left_padding: int = 0) -> None:
    torch._dynamo.reset()
    model = example.build(attn_implementation)
    inputs = example.inputs(batch, left_padding)
    settings = {
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = model.generate(**inputs, **settings)
    observer = Observer()
    model.compile(backend=observer, options=LOSSLESS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = model.generate(**inputs, **settings)

    assert expected.sequences.shape[1] == inputs["input_ids"].shape[1] + TOKENS
    assert torch.equal(actual.sequences, expected.sequences)
    dense, packed = torch.stack(expected.logits), torch.stack(actual.logits)
    assert (packed - dense).abs().max() <= TOLERANCE * dense.abs().max()

    layers = actual.past_key_values.layers
    for number, layer in enumerate(layers):
        kind = PackedTensor if number in example.packed_layers else torch.Tensor
        assert (type(layer.keys), type(layer.values)) == (kind, kind), number

    # Packed once, then attended to without ever being decompressed.
    assert len(observer.sites("compressed")) == len(example.packed_layers)
    assert len(observer.sites("packed")) >= len(example.packed_layers)
    left_dense = observer.sites("dense")
    announced = [str(item.message) for item in caught if issubclass(item.category, AttnpackWarning)]
    if example.dense_reason is None:
        assert not left_dense
        assert not announced
    else:
        assert len(left_dense) >= len(layers) - len(example.packed_layers)
        assert all(example.dense_reason in site.reason for site in left_dense)
        assert any(example.dense_reason in message for message in announced)


#: Whose full rank is in the acceptance grid too, through Inductor.
_IN_GRID = ("llava-mha", "llava-gqa", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl", "gemma3", "llama")


#: Whose decoders have graphs that none of those has, nor tests/acceptance/test_further.py: the others are LLaVA, Llama,
#: Qwen or Mistral with another tower.
_OWN_GRAPHS = ("paligemma", "mllama", "gpt2", "gpt-neox", "phi3")


@pytest.mark.parametrize("name", [name for name in ZOO if name not in _IN_GRID])
def test_full_rank_generates_what_the_dense_model_generates(name: str, without_inductor: None) -> None:
    _check(ZOO[name], "sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("name", _OWN_GRAPHS)
def test_through_inductor(name: str) -> None:
    _check(ZOO[name], "sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("name", _IN_GRID)
def test_more_tokens_than_in_the_acceptance_grid(name: str, without_inductor: None) -> None:
    _check(ZOO[name], "sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_attention_written_out_is_found(name: str, without_inductor: None) -> None:
    """How the rewrite finds it is the subject: what is left is the graph of the tests above."""
    _check(ZOO[name], "eager")


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_left_padded_batch(attn_implementation: str, without_inductor: None) -> None:
    _check(ZOO["llava-gqa"], attn_implementation, batch=2, left_padding=5)


@pytest.mark.slow
def test_attention_written_out_through_inductor() -> None:
    _check(ZOO["llava-gqa"], "eager", batch=2, left_padding=5)


def test_every_entry_depends_on_its_images() -> None:
    """Guards the test itself: a model that ignores its image could not show a wrong vision cache."""
    for example in ZOO.values():
        inputs = example.inputs(1, 0)
        images = [name for name in inputs if name.startswith("pixel_values")]
        model = example.build("sdpa")
        with torch.no_grad():
            logits = model(**inputs).logits[:, -1]
            for name in images:
                other = model(**(inputs | {name: inputs[name].flip(0, -1)})).logits[:, -1]
                assert (other - logits).abs().max() > 0.01 * logits.abs().max(), (example.name, name)
