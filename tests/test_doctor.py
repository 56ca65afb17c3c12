"""`attnpack doctor`: what it finds, and what it says where something fails."""

import json
import sys
from importlib.metadata import version

import pytest
import torch

from attnpack_cli import doctor
from attnpack_cli import main as cli
from attnpack_fx import selftest

FOUND = {
    "compiler": {"path": "g++", "version": "g++ 12.2.0"},
    "devices": {
        "cpu": {"capability": "AVX2", "threads": 2},
        "cuda": [{"name": "a GPU", "capability": "9.0", "memory": 80 * 10**9}],
    },
    "registered": True,
    "selftest": {"difference": 3e-7},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """Let a process answer with these parts, and run these statements after."""

    def answer(parts, after=""):
        lines = [json.dumps({"part": name, **told}) for name, told in parts.items()]
        code = f"for line in {lines!r}: print(line, flush=True)\n{after}"
        monkeypatch.setattr(doctor, "_ASKED", [sys.executable, "-c", code])

    return answer


def found() -> dict:
    return {name: {"found": told} for name, told in FOUND.items()}


@pytest.mark.slow
def test_this_installation_is_well(capfd):
    assert cli.main(["doctor", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["failed"] == {} and told["registered"] is True
    assert told["versions"]["torch"] == version("torch") and told["missing_of_extras"]["demo"] == []
    assert told["devices"]["cpu"]["capability"] and told["compiler"]["version"]
    assert 0 <= told["selftest"]["difference"] < 1e-4


def test_what_is_found_is_printed(capsys, asked, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: name != "sklearn")
    asked(found(), after="print('a library says something')")
    assert cli.main(["doctor"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert version("torch") in lines["torch"] and "g++ 12.2.0" in lines["compiler"]
    assert "CPU AVX2, 2 threads; a GPU, 9.0, 80.0 GB" in lines["devices"]
    assert "without sklearn: pip install 'attnpack-fx[demo]'" in lines["[demo]"] and "present" in lines["[export]"]
    assert "3e-07 from eager" in lines["selftest"] and "ok" in lines


def test_what_fails_is_named_with_the_way_out(capsys, asked):
    broken = {"compiler": {"error": "InvalidCxxCompiler: none"}, "registered": {"found": False}}
    asked(found() | broken)
    assert cli.main(["doctor"]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "FAILED  InvalidCxxCompiler: none; install a C++ compiler" in lines["compiler"]
    assert "FAILED  got no backend 'attnpack'" in lines["registered"] and "failed" in lines
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"].keys() == broken.keys()


@pytest.mark.parametrize(
    ("parts", "after", "part", "why"),
    [
        ((), "raise ImportError('no libtorch')", "torch", "ImportError: no libtorch; pip install"),
        (("compiler", "devices", "registered"), "import os; os._exit(11)", "selftest", "exit code 11; TORCH_LOGS"),
        (("compiler",), "import time; time.sleep(60)", "devices", "not through after 2 seconds"),
    ],
)
def test_a_process_that_ends_too_soon(capsys, asked, monkeypatch, parts, after, part, why):
    monkeypatch.setattr(doctor, "_PATIENCE", 2)
    asked({name: found()[name] for name in parts}, after)
    assert cli.main(["doctor", "--json"]) == 1
    failed = json.loads(capsys.readouterr().out)["failed"]
    assert failed.keys() == {part} and why in failed[part]


def test_a_model_that_comes_out_wrong_or_dense_fails(monkeypatch):
    monkeypatch.setattr(selftest.torch, "compile", lambda layer, **_: layer)
    with pytest.raises(RuntimeError, match="dense, expected packed"):
        selftest.selftest()
    monkeypatch.setattr(selftest, "PackedTensor", torch.Tensor)
    assert selftest.selftest() == {"difference": 0.0}

    def compiled(layer, **_):
        def wrong(hidden, past):
            out, cache = layer(hidden, past)
            return out * torch.nan, cache

        return wrong

    monkeypatch.setattr(selftest.torch, "compile", compiled)
    with pytest.raises(RuntimeError, match="differ from eager by nan"):
        selftest.selftest()


def test_a_part_that_raises_is_told_and_the_others_are_still_asked(monkeypatch, capsys):
    def compiler():
        raise OSError("no compiler\nand much more")

    def short():
        return {"difference": 0.0}

    monkeypatch.setattr(selftest, "compiler", compiler)
    monkeypatch.setattr(selftest, "selftest", short)
    selftest._main()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told[0] == {"part": "compiler", "error": "OSError: no compiler"}
    assert told[2] == {"part": "registered", "found": True} and told[3]["found"] == {"difference": 0.0}
