"""The trained model as ONNX: on held-out images, the tokens of PyTorch's packed generation.

AOTInductor's artefacts and codes are compared on tiny models, in test_to_aoti.py and test_families.py.
"""

import copy
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import attnpack_fx
from attnpack_cli import main as cli
from attnpack_cli.models import trained_model
from attnpack_fx import PackPolicy
from attnpack_fx.demo.digits import held_out_questions
from attnpack_fx.demo.load import Loaded, load
from attnpack_fx.export import ArtefactError, PackedGenerator, export_onnx, manifest
from tests.export.artefacts import written

pytestmark = pytest.mark.slow

TOKENS = 32
POLICIES = {"float32": PackPolicy(vision_rank=(32, 16))}
#: Of logits, as a share of the largest.
TOLERANCE = 2e-3


@lru_cache(maxsize=2)
def loaded(dtype: str) -> Loaded:
    found = load(str(trained_model()), dtype)
    found.model.generation_config.eos_token_id = None  # as many tokens as asked for, whatever they are
    return found


def question(source: Loaded, images: int, count: int = 1) -> dict[str, Any]:
    asked = held_out_questions("read", images=images, count=count, seed=images)
    texts, pictures = [each.prompt for each in asked], [list(each.images) for each in asked]
    return dict(source.processor(images=pictures, text=texts, return_tensors="pt").to(source.model.dtype))


@pytest.fixture
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    source = loaded(name)

    def write(folder: Path) -> None:
        example = question(source, 1)
        export_onnx(source.model, POLICIES[name], folder, example=example, processor=source.processor)

    return written(tmp_path_factory, f"trained-{name}", write)


@lru_cache
def packed(dtype: str, policy: PackPolicy, images: int, batch: int) -> tuple[Tensor, Tensor]:
    """PyTorch's tokens, and logits of every step `[B, steps, V]`."""
    source = loaded(dtype)
    inputs = question(source, images, batch)
    model = attnpack_fx.compile(copy.deepcopy(source.model), policy=policy)
    torch._dynamo.reset()
    made = model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return made.sequences, torch.stack(made.logits, 1)


@pytest.fixture(autouse=True)
def quick(without_inductor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is the artefact; PyTorch's own packed generation is proved in tests/acceptance."""
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


@pytest.mark.parametrize(("artefact", "name"), [(each, each) for each in POLICIES], indirect=["artefact"])
@pytest.mark.parametrize(("images", "batch"), [(4, 1), (16, 1), (2, 2)])
def test_the_tokens_of_packed_generation(artefact: Path, name: str, images: int, batch: int):
    inputs = question(loaded(name), images, batch)
    generator = PackedGenerator(artefact)
    seen: list[Tensor] = []
    step = generator.sessions["decode"].run

    def watched(*arguments: Any) -> dict[str, Tensor]:
        made = step(*arguments)
        seen.append(made["logits"])
        return made

    generator.sessions["decode"].run = watched  # type: ignore[method-assign]
    tokens = generator.generate(**inputs, max_new_tokens=TOKENS, eos_token_id=())
    expected, logits = packed(name, POLICIES[name], images, batch)
    assert torch.equal(tokens, expected)
    ours, theirs = torch.cat(seen, 1).float(), logits[:, 1:].float()
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("artefact", ["float32"], indirect=True)
def test_models_are_checked_and_named_by_convention(artefact: Path):
    names = {}
    for step in ("vision", "prefill", "decode"):
        path = artefact / f"{step}.onnx"
        onnx.checker.check_model(path, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
        graph = inferred.graph
        assert [entry.version for entry in inferred.opset_import if entry.domain in ("", "ai.onnx")] == [23]
        assert not [node.op_type for node in graph.node if node.domain not in ("", "ai.onnx")]
        names[step] = {value.name: _dims(value) for value in graph.input}, {v.name: _dims(v) for v in graph.output}
    inputs, outputs = names["decode"]
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["past_key_values.3.value"] == ["batch_size", 4, "past_sequence_length", 64]
    assert inputs["packed.0.key"] == ["batch_size", "vision_length", 32]
    assert inputs["basis.0.value"] == ["batch_size", 4, 16, 64]
    assert outputs["present.0.key"][:2] == ["batch_size", 4]
    assert outputs["logits"] == ["batch_size", "sequence_length", 64]
    assert set(names["prefill"][1]) - {"logits"} <= set(inputs)


def _dims(value: onnx.ValueInfoProto) -> list[Any]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("artefact", ["float32"], indirect=True)
def test_onnxruntime_genai_generates_the_same_tokens(artefact: Path):
    genai = pytest.importorskip("onnxruntime_genai")
    inputs = question(loaded("float32"), 4)
    generator = PackedGenerator(artefact)
    expected = generator.generate(**inputs, max_new_tokens=TOKENS, eos_token_id=())[0, inputs["input_ids"].shape[1] :]
    logits, state = generator.prefill(**inputs)
    config = genai.Config(str(artefact))
    config.overlay('{"model": {"eos_token_id": 63}}')  # a token that is never made, to see more than one answer
    model = genai.Model(config)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=TOKENS, do_sample=False)
    other = genai.Generator(model, parameters)
    # Given by address, not copied: they have to outlive the loop.
    arrays = {name: tensor.numpy() for name, tensor in state.packed.items()}
    for name, array in arrays.items():
        other.set_model_input(name, array)
    other.append_tokens(np.array([[int(logits[0, -1].argmax())]], dtype=np.int32))
    while not other.is_done():
        other.generate_next_token()
    assert other.get_sequence(0).tolist() == expected.tolist()


@pytest.mark.parametrize("artefact", ["float32"], indirect=True)
def test_a_prompt_at_the_command_line(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = held_out_questions("read", images=2, count=1, seed=5)[0]
    files = []
    for number, image in enumerate(asked.images):
        files += ["--image", str(tmp_path / f"{number}.png")]
        image.save(files[-1])
    prompt = asked.prompt.removesuffix(" answer :").rsplit("question : ")[-1]  # the chat template has the rest
    assert cli.main(["run", str(artefact), *files, "--prompt", prompt, "--max-new-tokens", "16"]) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == asked.answer.split()
    assert "tokens in" in printed.err and "cache" in printed.err


@pytest.mark.parametrize("artefact", ["float32"], indirect=True)
def test_what_does_not_fit_is_refused(artefact: Path):
    generator = PackedGenerator(artefact)
    inputs = question(loaded("float32"), 2)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with pytest.raises(ArtefactError, match="got 64 features of images for 128 image tokens"):
        generator.generate(ids, pixel_values=pixels[:1])
    with pytest.raises(ArtefactError, match=r"vision: pixel_values: got float32 \[2, 3, 32, 32\]"):
        generator.generate(ids, pixel_values=pixels[:, :, :32, :32])
    with pytest.raises(ArtefactError, match="padding behind a prompt"):
        generator.generate(ids, torch.arange(ids.shape[1]).flip(0)[None].clamp(max=1), pixel_values=pixels)
    with pytest.raises(ArtefactError, match=r"expected two \[B, T\]"):
        generator.generate(ids, torch.ones(2, ids.shape[1]), pixel_values=pixels)
    for wrong in (-1, 64):
        with pytest.raises(ArtefactError, match=f"input_ids: got {wrong}, expected ids from 0 to 63"):
            generator.generate(ids.masked_fill(ids == ids[0, -1], wrong), pixel_values=pixels)
    with pytest.raises(ArtefactError, match="of at least one prompt and token"):
        generator.generate(ids[:0], pixel_values=pixels[:0])
    with pytest.raises(ArtefactError, match="pixel_values: got str, which is no tensor"):
        generator.generate(ids, pixel_values="cat.png")
    arrays = {name: value.numpy() for name, value in inputs.items()}
    assert torch.equal(generator.generate(**arrays, max_new_tokens=2), generator.generate(**inputs, max_new_tokens=2))
    with pytest.raises(TypeError, match="unexpected option 'num_beams'"):
        generator.generate(ids, num_beams=2)
    _, state = generator.prefill(**inputs)
    with pytest.raises(ArtefactError, match=r"decode: got 1 missing \(input_ids\)"):
        given = {"attention_mask": ids[:, :1], "position_ids": ids[:, :1], **state.window}
        generator.sessions["decode"].run(given, generator.sessions["decode"].hold(state.packed))
    with pytest.raises(ArtefactError, match="batch_size = 1"):
        twice = torch.cat([ids[:, :1]] * 2)
        given = {"input_ids": twice, "attention_mask": twice, "position_ids": twice, **state.window}
        generator.sessions["decode"].run(given, generator.sessions["decode"].hold(state.packed))


@pytest.mark.parametrize("artefact", ["float32"], indirect=True)
def test_a_runtime_that_is_missing(artefact: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is needed.*pip install \"attnpack-fx\[export\]\""):
        PackedGenerator(artefact)


@pytest.mark.parametrize("artefact", ["float32"], indirect=True)
def test_sampling_is_repeatable_and_streams(artefact: Path):
    generator, inputs = PackedGenerator(artefact), question(loaded("float32"), 2)
    streamed: list[Tensor] = []
    options = {"max_new_tokens": 12, "eos_token_id": (), "do_sample": True, "temperature": 3.0, "seed": 7}
    first = generator.generate(**inputs, **options, on_token=streamed.append)
    assert torch.equal(torch.stack(streamed, 1), first[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(first, generator.generate(**inputs, **options))
    assert not torch.equal(first, generator.generate(**inputs, **{**options, "seed": 8}))


@pytest.mark.parametrize("artefact", ["float32"], indirect=True)
def test_weights_are_stored_once(artefact: Path):
    source = loaded("float32")
    weights = sum(each.nbytes for each in source.model.parameters())
    assert (artefact / "weights.bin").stat().st_size < 1.02 * weights + 4096 * 300
    assert manifest.read(artefact).policy == POLICIES["float32"]
