"""What the checks of the command line must let through."""

import json
from pathlib import Path

import pytest
from PIL import Image

from attnpack_cli import models
from attnpack_cli.errors import UserError
from attnpack_cli.files import check_new_file, check_new_folder, check_pictures
from attnpack_cli.models import cache_width, check_model, check_ranks
from attnpack_cli.policies import check_policy_file
from attnpack_fx import H2O, Linear, PackPolicy, Quantize
from tests.demo.models import save_text_model, trained
from tests.zoo import ZOO

LLAMA = {"hidden_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (LLAMA, 32),
        (LLAMA | {"num_key_value_heads": 2}, 16),
        (LLAMA | {"head_dim": 16}, 64),
        ({"text_config": LLAMA | {"head_dim": 16, "num_key_value_heads": 1}}, 16),
        # What a nested configuration does not say is a default of its class.
        ({"text_config": LLAMA}, None),
        ({"text_config": {}}, None),
        (LLAMA | {"text_config": LLAMA}, None),
        ({"n_head": 4, "n_embd": 32}, None),
        (LLAMA | {"num_attention_heads": [4, 2]}, None),
        # Latent attention, and layers of another size.
        (LLAMA | {"kv_lora_rank": 8}, None),
        (LLAMA | {"head_dim": 16, "global_head_dim": 32}, None),
    ],
)
def test_widths_as_far_as_they_are_stated(config, width):
    assert cache_width(config) == width


@pytest.mark.parametrize("name", ["llava-mha", "qwen2-vl", "gemma3"])
def test_no_rank_that_a_model_can_have_is_refused(name):
    """The width by the whole configuration is at least that of what the cache holds."""
    model = ZOO[name].build("sdpa")
    text = model.config.get_text_config()
    held = text.num_key_value_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads)
    width = cache_width(model.config.to_dict())
    assert width is None or width >= held


def test_ranks_that_are_clipped_or_in_range():
    check_ranks(LLAMA, {"vision_rank": 64, "text_rank": 32})
    check_ranks(LLAMA, {"vision_rank": "auto", "text_rank": None})
    check_ranks(LLAMA, {"vision_rank": ("full", 32)})
    with pytest.raises(UserError, match="--text-rank 64: text_rank=64 exceeds"):
        check_ranks(LLAMA, {"text_rank": 64})


def test_models(tmp_path, monkeypatch):
    check_model(save_text_model(tmp_path), [], {"text_rank": 32})
    check_model(str(trained()), ["a.png"], {"vision_rank": 256})
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    check_model("owner/name", [], {})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="nor in the cache of the hub"):
        check_model("owner/name", [], {})
    (tmp_path / "cache" / "models--owner--name").mkdir(parents=True)
    check_model("owner/name", [], {})


def test_a_sharded_checkpoint_that_is_whole(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tokenizer.model").write_text("")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    check_model(str(tmp_path), [], {})


def test_pictures_and_places_to_write(tmp_path):
    for ending in ("png", "jpg", "ppm", "tga"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a.{ending}")
    check_pictures([str(file) for file in tmp_path.iterdir()])
    # Pictures, empty folders and artefacts are written over.
    for name in ("a.png", "new.PDF"):
        check_new_file("--out", tmp_path / name, (".png", ".pdf"))
    (tmp_path / "artefact").mkdir()
    for name in ("artefact", "new/deep"):
        check_new_folder("--out", tmp_path / name, "manifest.json")
    (tmp_path / "artefact" / "manifest.json").write_text("{}")
    check_new_folder("--out", tmp_path / "artefact", "manifest.json")


def test_every_policy_that_is_saved(tmp_path):
    for policy in (PackPolicy(), PackPolicy(vision_rank=Linear(8, 16), passes=(H2O(budget=0.5), Quantize(bits=4)))):
        policy.save(tmp_path / "policy.json")
        check_policy_file(tmp_path / "policy.json")


def test_the_trained_model_is_found_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "__file__", str(tmp_path / "attnpack_cli" / "models.py"))
    monkeypatch.chdir(Path(__file__).parents[1])
    assert models.trained_model() == Path.cwd() / models.TRAINED
