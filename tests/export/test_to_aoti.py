"""AOTInductor: steps compiled once, run by `PackedGenerator` here and in a process of its own."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import attnpack_fx
from attnpack_fx import PackPolicy
from attnpack_fx.export import ArtefactError, PackedGenerator, export_aoti, manifest
from attnpack_fx.export.runtime.aoti_session import AotiSession
from tests.export.comparing import assert_same, of_artefact, of_model
from tests.export.in_process import generator
from tests.zoo import ZOO, Example, llava_config, prompt

POLICY = PackPolicy(vision_rank=(8, 6), key_space="rotated")
EXAMPLE: Example = ZOO["llava-gqa"]


def model() -> Any:
    """One layer, so that there is little to compile."""
    torch.manual_seed(0)
    made = transformers.LlavaForConditionalGeneration._from_config(
        llava_config(num_hidden_layers=1, initializer_range=0.2), attn_implementation="sdpa"
    )
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made.eval()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    told: list[str] = []
    folder = tmp_path_factory.mktemp("aoti") / "artefact"
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.simdlen": 1}):
        export_aoti(model(), POLICY, folder, example=EXAMPLE.inputs(2, 3), progress=told.append)
    assert told == ["capture", *(f"{name} by AOTInductor" for name in ("vision", "prefill", "decode"))]
    return folder


@pytest.mark.slow
def test_as_pytorch(artefact: Path, without_inductor: None) -> None:
    for inputs in (EXAMPLE.inputs(2, 3), EXAMPLE.inputs(1, 0)):
        packed = attnpack_fx.compile(model(), policy=POLICY)
        assert_same(of_artefact(PackedGenerator(artefact), inputs), of_model(packed, inputs), 5e-3)


@pytest.mark.slow
def test_text_alone(artefact: Path) -> None:
    """No features, no vision tokens, and at first none generated: filler."""
    inputs = prompt(2, 3, tokens=20)
    made = PackedGenerator(artefact)
    assert made.manifest.steps["decode"].ranges["vision_length"].least == 1
    assert_same(of_artefact(made, inputs), of_model(model(), inputs))


@pytest.mark.slow
def test_in_another_process(artefact: Path, tmp_path: Path) -> None:
    inputs = EXAMPLE.inputs(2, 3)
    torch.save(inputs, tmp_path / "inputs")
    script = f"""
import sys, torch
from attnpack_fx.export import PackedGenerator
inputs = torch.load({str(tmp_path / "inputs")!r})
tokens = PackedGenerator({str(artefact)!r}).generate(**inputs, max_new_tokens=8, eos_token_id=())
torch.save(tokens, {str(tmp_path / "tokens")!r})
assert "transformers" not in sys.modules and "onnx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=os.environ)
    expected = PackedGenerator(artefact).generate(**inputs, max_new_tokens=8, eos_token_id=())
    assert torch.equal(torch.load(tmp_path / "tokens"), expected)


@pytest.mark.slow
def test_what_is_written(artefact: Path) -> None:
    """Native code and raw weights: nothing of ours to register, and nothing pickled."""
    found = manifest.read(artefact)
    assert (found.target, found.device) == ("aoti", "cpu")
    assert sorted(path.name for path in artefact.iterdir()) == [
        "decode.pt2",
        "manifest.json",
        "prefill.pt2",
        "vision.pt2",
    ]
    for step in found.steps.values():
        with zipfile.ZipFile(artefact / step.file) as package:
            names = package.namelist()
            assert any(name.endswith(".so") for name in names)
            assert not [name for name in names if name.endswith((".pkl", ".pt"))]
            assert not [name for name in names if b"attnpack::" in package.read(name)]


@pytest.mark.slow
def test_of_another_pytorch(artefact: Path, tmp_path: Path) -> None:
    path = tmp_path / "decode.pt2"
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("decode/version", "0")
    step = manifest.read(artefact).steps["decode"]
    with pytest.raises(ArtefactError, match=r"decode\.pt2: PyTorch .* cannot load it"):
        AotiSession("decode", step, path, torch.device("cpu"))


@pytest.mark.slow
def test_tensors_that_do_not_fit(artefact: Path) -> None:
    made = PackedGenerator(artefact)
    inputs = EXAMPLE.inputs(1, 0)
    with pytest.raises(ArtefactError, match="features of images for 16 image tokens"):
        made.generate(**inputs | {"pixel_values": torch.zeros(2, 3, 56, 56)})
    with pytest.raises(ArtefactError, match=r"vision: pixel_values: got float32 \[1, 3, 28, 28\]"):
        made.generate(**inputs | {"pixel_values": torch.zeros(1, 3, 28, 28)})


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got a model in torch\.float64, expected float32"):
        export_aoti(model().double(), POLICY, tmp_path / "artefact")
    with pytest.raises(ValueError, match="got a model on meta"):
        export_aoti(model().to("meta"), POLICY, tmp_path / "artefact")
    with pytest.raises(ValueError, match=r"dims: vision_length: got \(0, 4\)"):
        export_aoti(model(), POLICY, tmp_path / "artefact", dims={"vision_length": (0, 4)})
    with pytest.raises(NotImplementedError, match="'gpt2'"):
        export_aoti(ZOO["gpt2"].build("eager"), POLICY, tmp_path / "artefact")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of the modules that are compiled."""
    inputs: dict[str, Tensor] = EXAMPLE.inputs(2, 3)
    made = generator(model().to(dtype), POLICY, tmp_path, inputs, least=1)
    tokens, logits = of_artefact(made, inputs)
    assert tokens.shape == (2, inputs["input_ids"].shape[1] + 32)
    assert logits.isfinite().all()
