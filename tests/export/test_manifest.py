"""An artefact is as it was written, or is refused with a reason."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnpack_fx import PackPolicy, Quantize
from attnpack_fx.export import manifest as manifests
from attnpack_fx.export.manifest import NAME, Manifest, StepFiles, read, write
from attnpack_fx.export.signature import ArtefactError, Range, TensorSpec

STEP = StepFiles(
    "decode.onnx",
    (TensorSpec("input_ids", torch.int64, ("batch_size", "past + new")), TensorSpec("k", torch.int8, (2, 4))),
    (TensorSpec("logits", torch.float16, ("batch_size", 1, 320)),),
    {"batch_size": Range(1, 64), "past": Range(0, 131072)},
)
POLICY = PackPolicy(vision_rank=(8, 4), text_rank=4, skip_layers=(0,), passes=(Quantize(bits=((2, 8), (None, 4))),))
MODEL = {"type": "llava", "layers": 2, "image_tokens": [319], "eos": [2], "pad": None, "dtype": "float16"}
MANIFEST = Manifest("onnx", {"decode": STEP}, POLICY, MODEL, "any", {"torch": "2.13"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "decode.onnx").write_bytes(b"model")
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor" / "tokenizer.json").write_text("{}")
    write(tmp_path, MANIFEST)
    return tmp_path


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NAME).read_text())


def rewritten(folder: Path, **changes: Any) -> None:
    """The manifest with some of its entries changed."""
    (folder / NAME).write_text(json.dumps(content(folder) | changes))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ArtefactError, match=match):
        read(folder)


def test_what_is_written_comes_back(folder):
    assert read(folder) == MANIFEST
    assert read(str(folder)) == MANIFEST
    assert content(folder)["files"].keys() == {"decode.onnx", "processor/tokenizer.json"}


def test_a_copy_is_as_good(folder, tmp_path):
    (folder / "notes.txt").write_text("not of the artefact")
    assert read(folder.rename(tmp_path.parent / f"{tmp_path.name} moved")) == MANIFEST


def test_a_file_that_was_changed(folder):
    (folder / "decode.onnx").write_bytes(b"mOdel")
    refused(folder, r"decode\.onnx: its SHA-256 is not that of the manifest.*export again")


def test_a_file_that_was_cut(folder):
    (folder / "processor" / "tokenizer.json").write_text("{")
    refused(folder, r"tokenizer\.json: got 1 bytes, expected 2: corrupted or replaced")


@pytest.mark.parametrize("instead", ["nothing", "a folder"])
def test_a_file_that_is_missing(folder, instead):
    (folder / "decode.onnx").unlink()
    if instead == "a folder":
        (folder / "decode.onnx").mkdir()
    refused(folder, r"decode\.onnx: missing; copy the whole folder")


def test_no_artefact_at_all(tmp_path):
    refused(tmp_path, r"no manifest\.json there; expected a folder that attnpack_fx\.export wrote")
    refused(tmp_path / "nowhere", r"nowhere: no manifest\.json there")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", r"manifest\.json: cannot be read")
    (tmp_path / NAME).mkdir()
    refused(tmp_path, r"manifest\.json: cannot be read")


@pytest.mark.parametrize(
    "text", ["", "{", "\x00", "not json", '{"kind":', "[" * 100_000, '{"a":' * 100_000, "1" * 5000]
)
def test_what_is_no_json(folder, text):
    (folder / NAME).write_text(text)
    refused(folder, r"manifest\.json: cannot be read")


@pytest.mark.parametrize("text", ["null", "[]", "3", '"attnpack-fx artefact"', "{}", '{"kind": "other"}'])
def test_json_of_something_else(folder, text):
    (folder / NAME).write_text(text)
    refused(folder, r"got no attnpack-fx artefact")


def test_bytes_that_are_no_text(folder):
    (folder / NAME).write_bytes(b"\xff\xfe{}")
    refused(folder, r"manifest\.json: cannot be read")


@pytest.mark.parametrize("found", [2, 0, -1, "1", 1.0, None, True, [1]])
def test_a_format_that_is_not_known(folder, found):
    rewritten(folder, format=found)
    refused(folder, r"got format .*, expected 1 to 1; install a newer attnpack-fx")


@pytest.mark.parametrize("name", ["target", "device", "policy", "model", "versions", "steps", "files", "format"])
@pytest.mark.parametrize("value", [None, 3, "text", [], [1], 1e400, True])
def test_an_entry_of_a_wrong_type(folder, name, value):
    rewritten(folder, **{name: value})
    refused(folder, str(folder))


@pytest.mark.parametrize(
    "name", ["target", "device", "policy", "model", "versions", "steps", "files", "format", "kind"]
)
def test_an_entry_that_is_missing(folder, name):
    kept = content(folder)
    del kept[name]
    (folder / NAME).write_text(json.dumps(kept))
    refused(folder, str(folder))


def test_names_that_are_not_known(folder):
    rewritten(folder, target="coreml")
    refused(folder, r"got target 'coreml', expected one of onnx, tensorrt, aoti")
    rewritten(folder, target="onnx", device="tpu")
    refused(folder, r"got device 'tpu', expected one of any, cpu, cuda")
    rewritten(folder, device="any", policy={"rank": 4})
    refused(folder, r"rank.*export again")
    rewritten(folder, policy={"vision_rank": 10**400, "max_fold_error": 10**400})
    refused(folder, r"not as attnpack_fx\.export writes it")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("file",), 3),
        (("file",), ["decode.onnx"]),
        (("file",), None),
        (("inputs",), 3),
        (("inputs", 0), None),
        (("inputs", 0, "dtype"), "complex64"),
        (("inputs", 0, "shape"), "ab"),
        (("outputs", 0, "shape", 1), -1),
        (("ranges",), []),
        (("ranges", "past"), [1]),
        (("ranges", "past"), ["a", "b"]),
        (("ranges", "past"), "04"),
        (("ranges", "past"), [0, 1e400]),
        (("ranges", "past"), [0, 1.5]),
        (("ranges", "past"), [5, 4]),
        (("ranges", "past"), [-1, 4]),
    ],
)
def test_a_step_of_wrong_types(folder, place, value):
    steps = content(folder)["steps"]
    inner = steps["decode"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    rewritten(folder, steps=steps)
    refused(folder, r"not as attnpack_fx\.export writes it")


def test_a_step_whose_file_has_no_checksum(folder):
    steps = content(folder)["steps"]
    steps["decode"]["file"] = "other.onnx"
    rewritten(folder, steps=steps)
    refused(folder, r"the step's file other\.onnx has no checksum")


def test_weights_without_a_checksum(folder):
    (folder / "weights.bin").write_bytes(b"weights")
    refused(folder, r"weights\.bin, which the steps read, has no checksum")
    write(folder, MANIFEST)
    assert read(folder) == MANIFEST
    (folder / "weights.bin").write_bytes(b"Weights")
    refused(folder, r"weights\.bin: its SHA-256 is not that of the manifest")


def test_files_of_a_hub_are_links(folder):
    """Into a folder beside the artefact's, where each has its checksum for a name."""
    blob = folder.parent / f"{folder.name} blob"
    (folder / "decode.onnx").rename(blob)
    (folder / "decode.onnx").symlink_to(blob)
    assert read(folder) == MANIFEST
    blob.write_bytes(b"Model")
    refused(folder, r"decode\.onnx: its SHA-256 is not that of the manifest")


@pytest.mark.parametrize("name", ["../outside", "processor/../../outside", "/etc/hostname"])
def test_paths_that_leave_the_folder(folder, name):
    outside = folder.parent / "outside"
    outside.write_bytes(b"model")
    entry = content(folder)["files"]["decode.onnx"]
    rewritten(folder, files=content(folder)["files"] | {name: entry})
    refused(folder, r"which is outside the artefact; do not use it")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 5000, "loop", "", "."])
def test_names_that_no_file_can_have(folder, name):
    (folder / "loop").symlink_to("loop")
    rewritten(folder, files=content(folder)["files"] | {name: {"bytes": 1, "sha256": ""}})
    refused(folder, str(folder))


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -1, 1e308, float("inf"), float("nan"), "full", "", "a + b", "..", "\0", "int64", "H2O"]),
    st.text(max_size=4),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-2, 99), max_size=3),
    st.dictionaries(st.sampled_from(["method", "linear", "energy", "blocks", "a"]), st.integers(-1, 9), max_size=2),
)


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of everything within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in inner for place in ((*before, key), *places(each, (*before, key)))]


@given(data=st.data(), changes=st.integers(1, 3))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_either_loads_or_is_refused(folder, data, changes):
    write(folder, MANIFEST)
    changed = copy.deepcopy(content(folder))
    for _ in range(changes):
        *way, last = data.draw(st.sampled_from(places(changed)))
        inner = changed
        for key in way:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[last] = data.draw(LEAVES)
        else:
            del inner[last]
        if not changed:
            break
    (folder / NAME).write_text(json.dumps(changed))
    try:
        assert isinstance(read(folder), Manifest)
    except ArtefactError as error:
        assert str(folder) in str(error)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_the_text_either_loads_or_is_refused(folder, data):
    write(folder, MANIFEST)
    text = (folder / NAME).read_bytes()
    place = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 20))
    (folder / NAME).write_bytes(text[:place] + data.draw(st.binary(max_size=3)) + text[place + length :])
    try:
        read(folder)
    except ArtefactError as error:
        assert str(folder) in str(error)


def test_versions_of_what_is_not_installed():
    found = manifests.versions("no-such-package")
    assert list(found) == ["attnpack-fx", "torch", "transformers", "no-such-package"]
    assert found["no-such-package"] == "none" and found["torch"].startswith(torch.__version__.split("+")[0])
