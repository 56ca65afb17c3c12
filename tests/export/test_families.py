"""Every family of models that can be exported, and every kind of policy, against PyTorch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import Tensor

import attnpack_fx
from attnpack_fx import Columns, LayerPlan, PackPolicy, Quantize, Stored
from attnpack_fx.export import ArtefactError, PackedGenerator, export_onnx, features, steps
from attnpack_fx.export.model import any_count, parts_of
from attnpack_fx.export.policies import exportable
from attnpack_fx.export.program import capture
from attnpack_fx.export.runtime import text_alone
from attnpack_fx.export.runtime.planning import mrope_positions
from attnpack_fx.ranks import PerLayer
from tests.export.comparing import assert_same, of_artefact, of_model
from tests.export.in_process import generator
from tests.zoo import IMAGE, MORE, ZOO, Example, llava_config, prompt

EVERY = ZOO | MORE
TEXT = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
VISION = ("llava-gqa", "vipllava", "llava-next", "llava-onevision", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")
FULL = PackPolicy(vision_rank="full", text_rank="full")
DENSE = PackPolicy(vision_rank=None)

Model = transformers.PreTrainedModel


def of(name: str) -> tuple[Model, dict[str, Tensor]]:
    """A model, and a batch of two prompts, the first padded on the left."""
    example: Example = EVERY[name]
    return example.build("sdpa"), example.inputs(2, 3)


def packed_by_pytorch(name: str, policy: PackPolicy) -> Model:
    model = EVERY[name].build("sdpa")
    return attnpack_fx.compile(model, policy=policy)  # type: ignore[return-value]


# ---- lossless: as the dense model ----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FULL, DENSE], ids=["full", "dense"])
@pytest.mark.parametrize("name", [*TEXT, *VISION])
def test_family(name: str, policy: PackPolicy, tmp_path: Path) -> None:
    model, inputs = of(name)
    expected = of_model(model, inputs)
    assert expected[0][:, -32:].unique().numel() > 4
    assert_same(of_artefact(generator(model, policy, tmp_path, inputs), inputs), expected)


@pytest.mark.parametrize("name", VISION)
def test_features(name: str, tmp_path: Path) -> None:
    """Images of a vision tower that is not exported."""
    model, inputs = of(name)
    given = {key: value for key, value in inputs.items() if key != "pixel_values"}
    made = generator(model, FULL, tmp_path)
    if any_count(model):
        assert "vision" in made.manifest.steps
    else:
        with pytest.raises(ArtefactError, match="no vision step"):
            made.generate(**inputs)
    actual = of_artefact(made, given | {"image_features": features(model, inputs)}, 8)
    assert_same(actual, of_model(model, inputs, 8))


@pytest.mark.parametrize("least", [0, 1])
def test_text_alone(least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image, nothing that stays dense, no token generated yet: empty tensors, or filler in their places.

    Decode steps take the prompt, in pieces or at once, so that nothing is factorised; a host with a loop of its own
    gets what prefill makes.
    """
    model, inputs = ZOO["llava-gqa"].build("sdpa"), ZOO["llama"].inputs(2, 3)
    made = generator(model, PackPolicy(vision_rank=8), tmp_path, least=least)
    expected = of_model(model, inputs)
    _, state = made.prefill(**inputs)
    assert state.packed["vision_mask"].shape == (2, 0) and state.mask.shape == (2, 0)
    for most in (256, 5):
        monkeypatch.setattr(text_alone, "_MOST", most)
        tokens, logits = of_artefact(made, inputs)
        assert_same((tokens, logits[:, -expected[1].shape[1] :]), expected)
        assert made.state is not None
        assert made.state.packed["vision_mask"].shape == made.state.packed["prompt_mask"].shape == (2, 0)
        assert made.state.mask.shape == (2, inputs["input_ids"].shape[1] + 31)


def test_samples_with_different_images(tmp_path: Path) -> None:
    model = ZOO["llava-gqa"].build("sdpa")
    one, two = (prompt(1, padding, *[(IMAGE, 16)] * count) for padding, count in ((16, 1), (0, 2)))
    torch.manual_seed(0)
    inputs = {key: torch.cat([one[key], two[key]]) for key in one} | {"pixel_values": torch.randn(3, 3, 56, 56)}
    made = generator(model, FULL, tmp_path, ZOO["llava-gqa"].inputs(1, 0))
    assert_same(of_artefact(made, inputs), of_model(model, inputs))


# ---- low rank: as PyTorch's packed generation ----------------------------------------------------------------

_EIGHT = Stored(Columns(((8, 0),)), Columns(((8, 0),)))
POLICIES = {
    "rotated": PackPolicy(vision_rank=(8, 6), key_space="rotated"),
    "unrotated": PackPolicy(vision_rank=(6, 8), key_space="unrotated"),
    "skipped layer": PackPolicy(vision_rank=8, text_rank="full", skip_layers=(0,)),
    "text of one layer": PackPolicy(
        layers=(LayerPlan(_EIGHT, None, "unrotated"), LayerPlan(_EIGHT, _EIGHT, "rotated"))
    ),
    "per layer": PackPolicy(vision_rank=PerLayer((8, "full"))),
    "folds": PackPolicy(vision_rank=8, text_rank=8, fold_every=4, recent=4, key_space="rotated"),
    "folds unrotated": PackPolicy(vision_rank=8, text_rank=8, fold_every=4, recent=4, key_space="unrotated"),
    "codes": PackPolicy(vision_rank=8, passes=(Quantize(bits=8),)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("policy", POLICIES)
def test_policy(policy: str, tmp_path: Path) -> None:
    """With empty tensors, and with filler instead."""
    chosen = POLICIES[policy]
    model, inputs = of("llava-gqa")
    expected = of_model(packed_by_pytorch("llava-gqa", chosen), inputs)
    for least in (0, 1):
        folder = tmp_path / str(least)
        folder.mkdir()
        assert_same(of_artefact(generator(model, chosen, folder, inputs, least), inputs), expected, 5e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("name", ["llama", "qwen3-vl"])
def test_folds_of_other_families(name: str, tmp_path: Path) -> None:
    """Text without vision; three axes of positions."""
    chosen = POLICIES["folds unrotated"]
    model, inputs = of(name)
    expected = of_model(packed_by_pytorch(name, chosen), inputs)
    assert_same(of_artefact(generator(model, chosen, tmp_path, inputs), inputs), expected, 5e-3)


@pytest.mark.parametrize("least", [0, 1])
def test_lossless_folds(least: int, tmp_path: Path) -> None:
    model, inputs = of("qwen2-vl")
    made = generator(model, replace(FULL, fold_every=4, recent=4), tmp_path, inputs, least)
    assert_same(of_artefact(made, inputs), of_model(model, inputs))
    assert made.state is not None
    assert made.state.packed["prompt_mask"].shape[1] == 0
    assert made.state.mask.shape[1] == 7


def test_tokens_that_are_all_alike(tmp_path: Path) -> None:
    """An image of one colour: matrices of rank 1, as far as fp32 tells."""
    model, inputs = of("llava-gqa")
    inputs["pixel_values"] = torch.ones_like(inputs["pixel_values"])
    made = generator(model, POLICIES["unrotated"], tmp_path, inputs)
    made.generate(**inputs, max_new_tokens=4, eos_token_id=())
    assert made.state is not None
    assert all(bool(tensor.isfinite().all()) for tensor in made.state.packed.values())


# ---- ONNX ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_onnx_of_deepstack_and_three_axes(tmp_path: Path) -> None:
    model, inputs = of("qwen3-vl")
    export_onnx(model, FULL, tmp_path / "artefact", example=inputs)
    made = PackedGenerator(tmp_path / "artefact", threads=1)
    assert_same(of_artefact(made, inputs), of_model(model, inputs))
    with pytest.raises(ArtefactError, match=r"image_grid_thw: got \[\[1, 4, 9\], .*expected \[\[1, 6, 6\], "):
        made.generate(**inputs | {"image_grid_thw": torch.tensor([[1, 4, 9]] * 2)})


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_onnx_of_folds(tmp_path: Path) -> None:
    policy = replace(POLICIES["folds unrotated"], vision_rank="full")
    model, inputs = of("llava-gqa")
    export_onnx(model, policy, tmp_path / "artefact", example=inputs)
    made = PackedGenerator(tmp_path / "artefact", threads=1)
    assert set(made.sessions) == {"vision", "prefill", "decode", "angles"}
    assert_same(of_artefact(made, inputs), of_model(packed_by_pytorch("llava-gqa", policy), inputs), 5e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(("bits", "tolerance"), [(4, 2e-2)])
def test_onnx_of_codes(bits: int, tolerance: float, tmp_path: Path) -> None:
    """In 4 bits a number between two codes may get either, as a processor rounds."""
    policy = PackPolicy(vision_rank=8, passes=(Quantize(bits=bits),))
    model, inputs = of("llava-gqa")
    export_onnx(model, policy, tmp_path / "artefact", example=inputs)
    made = PackedGenerator(tmp_path / "artefact", threads=1)
    assert_same(of_artefact(made, inputs), of_model(packed_by_pytorch("llava-gqa", policy), inputs), tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_onnx_in_half_precision(tmp_path: Path) -> None:
    policy = PackPolicy(vision_rank=(8, 6))
    model, inputs = of("llava-gqa")
    halved = {name: each.half() if each.is_floating_point() else each for name, each in inputs.items()}
    export_onnx(model.half(), policy, tmp_path / "artefact", example=halved)
    made = PackedGenerator(tmp_path / "artefact", threads=1)
    packed = attnpack_fx.compile(EVERY["llava-gqa"].build("sdpa").half(), policy=policy)
    assert_same(of_artefact(made, halved), of_model(packed, halved), 2e-2)


@pytest.mark.slow
def test_onnx_of_an_older_opset(tmp_path: Path) -> None:
    """Without RMSNormalization, RotaryEmbedding and Attention; and without an example, as images are of one size."""
    model, inputs = of("llava-gqa")
    export_onnx(model, FULL, tmp_path / "artefact", opset=18)
    graph = onnx.load(tmp_path / "artefact" / "decode.onnx", load_external_data=False)
    assert [entry.version for entry in graph.opset_import] == [18]
    assert_same(of_artefact(PackedGenerator(tmp_path / "artefact", threads=1), inputs), of_model(model, inputs))
    with pytest.raises(ValueError, match="opset: got 17, expected 18, 20, 21 or 23"):
        export_onnx(model, FULL, tmp_path / "other", opset=17)


# ---- positions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_positions_of_several_images(name: str) -> None:
    model = ZOO[name].build("sdpa")
    grids = torch.tensor([[1, 4, 6], [1, 2, 8], [1, 6, 2]])
    two, one = prompt(1, 0, (IMAGE, 6), (IMAGE, 4)), prompt(1, 7, (IMAGE, 3))
    ids, mask = (torch.cat([two[key], one[key]]) for key in ("input_ids", "attention_mask"))
    image = ids == IMAGE
    expected, _ = model.model.get_rope_index(
        input_ids=ids, image_grid_thw=grids, attention_mask=mask, mm_token_type_ids=image.int()
    )
    found = mrope_positions(ids, mask > 0, image, grids, 2)
    real = (mask > 0).expand_as(found)
    assert torch.equal(found[real], expected[real])


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "'gemma3'"),
        ("paligemma", "'paligemma'"),
        ("mllama", "'mllama'"),
        ("gpt2", "'gpt2'"),
        ("mistral-sliding", "sliding-window attention"),
        ("qwen2-sliding", "sliding-window attention"),
    ],
)
def test_unsupported_models(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        export_onnx(EVERY[name].build("sdpa"), FULL, tmp_path / "artefact")
    assert not any(tmp_path.iterdir())


def test_vision_among_the_text_of_a_layer() -> None:
    plans = (LayerPlan(_EIGHT, None, "rotated"), LayerPlan(None, _EIGHT, "rotated"))
    with pytest.raises(NotImplementedError, match="layer 1, which packs text and not vision"):
        exportable(PackPolicy(layers=plans), parts_of(ZOO["llava-gqa"].build("sdpa")))


def test_a_vision_tower_that_asks_for_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asking(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        pixels = inputs["pixel_values"]
        return [pixels if pixels.sum() > 0 else -pixels]

    monkeypatch.setattr(steps, "image_features", asking)
    model, inputs = of("llava-gqa")
    with pytest.raises(NotImplementedError, match=r"cannot be captured \(.*export\.features\(model, inputs\)"):
        capture(model, FULL, inputs)


def test_what_no_processor_makes() -> None:
    with pytest.raises(NotImplementedError, match="no transformers model"):
        parts_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="features: got LlamaForCausalLM"):
        features(ZOO["llama"].build("sdpa"), {"pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"inputs \['input_ids'\]"):
        features(ZOO["llava-gqa"].build("sdpa"), {"input_ids": torch.zeros(1, 1)})


def test_gemma_decoder_of_llava() -> None:
    text: Any = transformers.GemmaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    config = llava_config()
    config.text_config = text
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(NotImplementedError, match="'llava' with a 'gemma' decoder"):
        parts_of(model)
