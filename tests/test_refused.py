"""What the command line refuses before PyTorch is imported, and that help and the version need none of it."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnpack_cli import doctor, export, policies
from attnpack_fx import PackPolicy
from attnpack_fx.export import artefact, manifest, program
from attnpack_fx.passes.catalogue import METHODS

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "triton",
    "attnpack_fx",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "sklearn",
    "ray",
)
COMMANDS = ("batch", "bench", "demo", "doctor", "explain", "export", "run", "serve")

#: Runs every list of arguments it is given, and tells what came of each.
RUN = f"""
import contextlib, io, json, sys
from attnpack_cli.main import main
told = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    told.append([code, out.getvalue(), err.getvalue(), loaded])
print(json.dumps(told))
"""

EXPORT = ("export", "model", "--to", "onnx", "--out", "new")
BATCH = ("batch", "rows.jsonl", "--model", "model", "--out", "new.jsonl")
FOLDER = ("batch", "pictures", "--model", "model", "--out", "new.jsonl")
RUN_IT = ("run", "artefact", "--prompt", "p")
#: Arguments, and what is said of them: what was got, what is expected, the way out.
REFUSED: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((), ("COMMAND", "see attnpack --help")),
    (("pack",), ("invalid choice: 'pack'", "demo", "see attnpack --help")),
    (("explain", "model", "--rank", "8"), ("unrecognized arguments: --rank 8", "--help")),
    (("demo", "--questions", "0"), ("--questions: got '0'", "expected a whole number from 1 on")),
    (("demo", "--images", "4,17"), ("got '4,17'", "expected numbers from 1 to 16", "e.g. 1,4,16")),
    (("demo", "--images", "4,,"), ("got ''", "expected a whole number")),
    (("demo", "--vision-rank", "0"), ("--vision-rank: got '0'", "expected a rank such as 64")),
    (("demo", "--vision-rank", "999"), ("--vision-rank 999", "H * D = 256", "expected a rank from 1 to 256")),
    (("demo", "--vision-rank", "8,300"), ("--vision-rank 8,300", "vision_rank=300 exceeds H * D = 256")),
    (("demo", "--text-rank", "8,4,2"), ("got '8,4,2'", "expected a rank such as 64")),
    (("explain", "model", "--vision-rank", "automatic"), ("got 'automatic'", "'full', 'none' or 'auto'")),
    (("explain", "model", "--text-rank", "33"), ("--text-rank 33", "H * D = 32", "expected a rank from 1 to 32")),
    (("explain", "model", "--dtype", "int8"), ("invalid choice: 'int8'", "float32")),
    (("demo", "--prompt", "what?"), ("--prompt needs --model",)),
    (("demo", "--image", "a.png"), ("--image needs --model",)),
    (("demo", "--dtype", "bfloat16"), ("--dtype needs --model",)),
    (("demo", "--max-new-tokens", "9"), ("--max-new-tokens needs --model",)),
    (("demo", "--model", "m", "--prompt", "p", "--quick"), ("--quick is for the trained model", "leave it out")),
    (("demo", "--model", "m", "--image", "a.png"), ("--model needs a question", "--prompt TEXT")),
    (("demo", "--model", "model", "--prompt", " "), ("--prompt: got ' '", "expected a question", "e.g. --prompt")),
    (("demo", "--model", "model", "--prompt", "p", "--image", "no.png"), ("--image no.png: no such file", "expected")),
    (("explain", "model", "--image", "notes.txt"), ("--image notes.txt: not a picture", "expected one such as .png")),
    (("explain", "model", "--image", "model"), ("--image model: Is a directory", "expected the path of a picture")),
    (("explain", "model", "--image", "a.png"), ("missing a processor (preprocessor_config.json",)),
    (("explain", "seen", "--image", "a.png"), ("seen takes text only", "leave --image out")),
    (("demo", "--out", "no-such-folder/a.png"), ("there is no folder no-such-folder", "choose another place")),
    (("demo", "--out", "a.gif"), ("--out a.gif", "expected a name that ends in .png, .pdf or .svg", "e.g. a.png")),
    (("demo", "--out", "folder.png"), ("--out folder.png: is a folder", "e.g. folder.png/name.png")),
    (("explain",), ("ID_OR_PATH", "see attnpack explain --help")),
    (("explain", "no/such/folder"), ("no/such/folder: no such folder", "expected the folder of a model")),
    (("explain", "owner/name"), ("neither a folder nor in the cache", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")),
    (("explain", "notes.txt"), ("notes.txt: is a file", "expected the folder of a model")),
    (
        ("explain", "empty"),
        ("missing config.json, weights (model.safetensors", "a tokenizer (tokenizer.json", "save_pretrained"),
    ),
    (("explain", "unweighted"), ("missing weights (model.safetensors", "expected a folder that save_pretrained")),
    (("explain", "sharded"), ("missing model-2.safetensors; expected",)),
    (("explain", "pointer"), ("missing model.safetensors (a pointer of Git LFS", "git lfs pull")),
    (("explain", "garbled"), ("config.json: cannot be read as JSON", "expected a model's configuration")),
    (("export", "model", "--to", "onnx"), ("--out", "see attnpack export --help")),
    (("export", "model", "--to", "coreml", "--out", "new"), ("invalid choice: 'coreml'", "onnx")),
    ((*EXPORT, "--bits", "3"), ("invalid choice: 3", "2, 4, 8")),
    ((*EXPORT, "--bits", "4", "--vision-rank", "none"), ("--bits 4", "--vision-rank none leaves", "give a rank")),
    ((*EXPORT, "--dtype", "bfloat16"), ("--dtype bfloat16", "expected float32 or float16")),
    ((*EXPORT, "--dim", "batch_size"), ("got 'batch_size'", "expected NAME=LEAST:MOST", "e.g. batch_size=1:8")),
    ((*EXPORT, "--dim", "batch_sise=1:8"), ("got 'batch_sise'", "expected one of batch_size", "did you mean")),
    ((*EXPORT, "--dim", "batch_size=4:2"), ("got 'batch_size=4:2'", "expected a smallest and a larger", "e.g.")),
    (
        ("export", "model", "--to", "aoti", "--out", "new", "--dim", "text_length=0:8"),
        ("--dim text_length=0:8", "expected sizes from 1 on"),
    ),
    ((*EXPORT, "--policy", "no.json"), ("--policy no.json: no such file", "expected a file that PackPolicy.save")),
    ((*EXPORT, "--policy", "notes.txt"), ("--policy notes.txt: cannot be read as JSON", "PackPolicy.save")),
    ((*EXPORT, "--policy", "list.json"), ("--policy list.json: not a policy file", "PackPolicy.save")),
    ((*EXPORT, "--policy", "field.json"), ("got the field 'vison_rank'", "did you mean 'vision_rank'")),
    ((*EXPORT, "--policy", "method.json"), ("got the method 'H20'", "expected one of", "did you mean 'H2O'")),
    ((*EXPORT, "--policy", "list.json", "--bits", "4"), ("--policy has ranks and bits", "leave --vision-rank")),
    (("export", "model", "--to", "onnx", "--out", "model"), ("--out model: is there already", "remove it")),
    (("export", "model", "--to", "onnx", "--out", "notes.txt/new"), ("nothing can be written to", "choose another")),
    (("serve",), ("ID_OR_PATH", "see attnpack serve --help")),
    (("serve", "nowhere/at/all"), ("nowhere/at/all: no such folder", "expected the folder of a model")),
    (("serve", "model", "--port", "70000"), ("--port: got '70000'", "expected a port from 1 to 65535")),
    (("serve", "model", "--host", "0.0.0.0"), ("others can reach it", "give --api-key KEY")),
    (("serve", "model", "--host", "::1"), ("--host ::1", "listen on 127.0.0.1")),
    (("serve", "model", "--api-key", ""), ("--api-key: got an empty one", "leave it out")),
    (("serve", "model", "--images", "17"), ("--images 17", "at most 16")),
    (("serve", "model", "--size", "60000x60000"), ("--size", "expected at most 16777216 pixels")),
    (("serve", "model", "--allow-urls", "a.example:99999"), ("expected the name of a host",)),
    (("serve", "model", "--memory", "lots"), ("--memory: got 'lots'", "such as 80G or 500M")),
    (("serve", "model", "--size", "448"), ("--size: got '448'", "such as 448x448")),
    (("serve", "model", "--allow-urls", "http://a.example/x"), ("expected the name of a host", "without http://")),
    (("serve", "model", "--timeout", "0"), ("--timeout: got '0'", "expected a number above 0")),
    (("serve", "model", "--policy", "list.json"), ("--policy list.json: not a policy file", "PackPolicy.save")),
    (("serve", "model", "--policy", "p.json", "--text-rank", "8"), ("--policy has ranks of its own", "leave")),
    (("run", "nowhere", "--prompt", "p"), ("nowhere: no such folder", "expected a folder that attnpack export wrote")),
    (("run", "empty", "--prompt", "p"), ("no manifest.json there", "expected a folder that attnpack export wrote")),
    (RUN_IT, ("artefact: missing decode.onnx", "copy the whole folder, or export")),
    (("run", "artefact"), ("needs a question", "--prompt TEXT")),
    ((*RUN_IT, "--temperature", "0.5"), ("--temperature needs --sample",)),
    ((*RUN_IT, "--sample", "--temperature", "nan"), ("got 'nan'", "expected a number above 0", "e.g. 0.7")),
    ((*RUN_IT, "--sample", "--top-p", "1.5"), ("got '1.5'", "expected a share above 0 and up to 1")),
    ((*RUN_IT, "--threads", "none"), ("--threads: got 'none'", "expected a whole number")),
    (("batch", "rows.jsonl", "--model", "model"), ("--out", "see attnpack batch --help")),
    (("batch", "none.jsonl", *BATCH[2:]), ("none.jsonl: no such file or folder", "expected a folder of pictures, or")),
    ((*BATCH, "--prompt", "p"), ("--prompt is for a folder of pictures", "leave it out")),
    (FOLDER, ("pictures is a folder of pictures and needs a question", "--prompt TEXT")),
    (("batch", "empty", *FOLDER[2:], "--prompt", "p"), ("empty: no pictures in it", "expected files that end in")),
    (("batch", "no-rows.jsonl", *BATCH[2:]), ("no-rows.jsonl: no rows in it", "expected lines such as")),
    (("batch", "notes.txt", *BATCH[2:]), ("notes.txt, line 1: cannot be read as JSON", "expected {")),
    (("batch", "list.json", *BATCH[2:]), ("list.json, line 1: got list", "expected {")),
    (("batch", "no-id.jsonl", *BATCH[2:]), ("no-id.jsonl, line 2: got the id None", "expected a text or a whole")),
    (("batch", "twice.jsonl", *BATCH[2:]), ("twice.jsonl, line 3: got the id 'a' again", "expected each once")),
    (("batch", "one-image.jsonl", *BATCH[2:]), ("got the images 'a.png'", "expected a list of paths")),
    (("batch", "no-prompt.jsonl", *BATCH[2:]), ("got the prompt None", "expected a text")),
    ((*BATCH[:5], "rows.jsonl"), ("--out rows.jsonl: holds the rows that are asked for", "choose another place")),
    ((*BATCH[:5], "twice.jsonl"), ("--out twice.jsonl, line 1: not an answer", "expected {", "choose another place")),
    ((*BATCH[:5], "new.txt"), ("--out new.txt", "expected a name that ends in .jsonl or .ndjson", "e.g. new.jsonl")),
    ((*BATCH, "--workers", "0"), ("--workers: got '0'", "expected a whole number from 1 on")),
    ((*BATCH, "--batch", "4", "--memory", "9"), ("--memory finds the batch that fits", "leave one of them out")),
    ((*BATCH, "--policy", "field.json"), ("got the field 'vison_rank'", "did you mean 'vision_rank'")),
    ((*BATCH, "--address", "ray://head"), ("--address ray://head: expected HOST:PORT", "e.g. 10.0.0.1:6379, or auto")),
    ((*BATCH, "--address", "127.0.0.1:9"), ("nothing listens there", "ray start --head")),
    ((*BATCH[:2], "--model", "seen", *BATCH[4:]), ("seen takes text only", "leave images out of the rows")),
    (("bench", "taste"), ("invalid choice: 'taste'", "quality")),
]


def ran(folder: Path, lists: list[list[str]]) -> list[Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(lists),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Any]:
    folder = tmp_path_factory.mktemp("refused")
    for name, text in _files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in ("empty", "folder.png"):
        (folder / name).mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    before = sorted(folder.rglob("*"))
    told = ran(folder, [list(arguments) for arguments, _ in REFUSED])
    assert sorted(folder.rglob("*")) == before
    return {arguments: each for (arguments, _), each in zip(REFUSED, told, strict=True)}


def _files() -> dict[str, str]:
    """Texts by name; models have the files a model has, with nothing in the weights."""
    stated = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    config, seeing = json.dumps(stated), json.dumps({**stated, "vision_config": {}})
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    models = {
        "model": {"config.json": seeing, "model.safetensors": "", "tokenizer.json": ""},
        "seen": {"config.json": config, "model.safetensors": "", "vocab.txt": "", "processor_config.json": ""},
        "unweighted": {"config.json": config, "tokenizer_config.json": ""},
        "sharded": {
            "config.json": config,
            "model.safetensors.index.json": index,
            "model-1.safetensors": "",
            "tokenizer.model": "",
        },
        "pointer": {
            "config.json": config,
            "model.safetensors": "version https://git-lfs.github.com/spec/v1\n",
            "tokenizer.json": "",
        },
        "garbled": {"config.json": "{", "model.safetensors": "", "tokenizer.json": ""},
    }
    files = {f"{model}/{name}": text for model, parts in models.items() for name, text in parts.items()}
    method = {"version": 1, "policy": {"passes": [{"method": "H20"}]}}
    return files | {
        "notes.txt": "neither a picture nor JSON",
        "list.json": "[]",
        "field.json": json.dumps({"version": 1, "policy": {"vison_rank": 8}}),
        "method.json": json.dumps(method),
        "rows.jsonl": json.dumps({"id": 1, "images": ["a.png"], "prompt": "p"}) + "\n",
        "no-rows.jsonl": "\n\n",
        "no-id.jsonl": '{"id": "a", "prompt": "p"}\n{"prompt": "p"}\n',
        "twice.jsonl": '{"id": "a", "prompt": "p"}\n\n{"id": "a", "prompt": "q"}\n',
        "one-image.jsonl": '{"id": "a", "prompt": "p", "images": "a.png"}',
        "no-prompt.jsonl": '{"id": "a"}',
        "pictures/b.png": "",
        "artefact/manifest.json": json.dumps({"files": {"decode.onnx": {}}}),
        "artefact/processor/tokenizer.json": "",
    }


@pytest.mark.parametrize(("arguments", "parts"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_wrong_arguments_are_refused_before_anything_is_loaded(refused, arguments, parts):
    code, out, err, loaded = refused[arguments]
    assert code == 2 and out == "" and loaded == []
    # One line: neither a traceback nor the usage of all options before it.
    assert err.startswith("attnpack") and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_help_and_version_load_nothing(tmp_path):
    lists = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    told = ran(tmp_path, lists)
    for arguments, (code, out, err, loaded) in zip(lists, told, strict=True):
        assert (code, err, loaded) == (0, "", []), arguments
        assert out.startswith("attnpack-fx 0." if arguments == ["--version"] else "usage: attnpack")
    # Every command there is.
    listed = [line.split()[0] for line in told[1][1].splitlines() if line.startswith("    ") and line[4] != " "]
    assert sorted(listed) == list(COMMANDS)


def test_the_command_line_imports_the_standard_library_alone():
    for file in (ROOT / "attnpack_cli").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or top in ("attnpack_cli", "PIL"), f"{file.name}: {name}"


def test_names_written_twice_are_the_same():
    assert tuple(field.name for field in fields(PackPolicy)) == policies.FIELDS
    assert tuple(method.__name__ for method in METHODS) == policies.METHODS
    assert {name: allowed.least for name, allowed in program.RANGES.items()} == export.DIMS
    assert (export.MANIFEST, "processor") == (manifest.NAME, artefact.PROCESSOR)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert doctor.EXTRAS.keys() == extras.keys() - {"test", "dev"}


def test_the_operators_are_there_once_the_package_is_imported():
    code = "import attnpack_fx, torch; torch.ops.attnpack.attention; torch._dynamo.lookup_backend('attnpack')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
