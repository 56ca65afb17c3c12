"""The GPU benchmark where nothing is installed, or the wrong PyTorch: it says what to install, or does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks.gpu import bare

ROOT = Path(__file__).parents[2]
_PIP = """
import json, os, sys
open(os.environ["PIP_SAID"], "w").write(json.dumps([os.getcwd(), *sys.argv[1:]]))
sys.exit(int(os.environ["PIP_STATUS"]))
"""


@pytest.fixture
def started(tmp_path):
    """Start the command without site-packages, as on a new machine, but for what is put into `tmp_path`."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(_PIP)
    # No test may reach the pip that is installed: it would do what it is told to this environment.
    safe = {**os.environ, "PYTHONPATH": str(tmp_path), "PIP_NO_INDEX": "1", "PIP_DRY_RUN": "1"}
    which = [sys.executable, "-c", "import pip; print(pip.__file__)"]
    found = subprocess.run(which, env=safe, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(tmp_path / "pip" / "__init__.py")

    def start(*arguments: str, status: int = 1, command: tuple[str, ...] = ("-m", "benchmarks.gpu")):
        pip = {"PIP_SAID": str(tmp_path / "said"), "PIP_STATUS": str(status)}
        # With a compiler that need not be there: nothing gets as far as using it.
        done = subprocess.run(
            [sys.executable, "-S", *command, *arguments],
            env={**safe, **pip, "CC": "cc"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return start


def torch_of(tmp_path, version, cuda):
    """A PyTorch that is found, and fails when it is imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text(
        f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
    )


def packages(tmp_path):
    """All else that it looks for."""
    for name in ("triton", "transformers", "hypothesis", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "attnpack_fx-0.1.0.dist-info").mkdir()
    (tmp_path / "attnpack_fx-0.1.0.dist-info" / "METADATA").write_text("Name: attnpack-fx\nVersion: 0.1.0\n")
    (tmp_path / "attnpack_fx-0.1.0.dist-info" / "RECORD").write_text("attnpack_fx-0.1.0.dist-info/METADATA,,\n")


@pytest.mark.parametrize("command", [("-m", "benchmarks.gpu"), ("benchmarks/gpu",)])
def test_where_nothing_is_installed_it_says_the_line_that_installs_it(started, command):
    done = started(command=command)
    assert done.returncode == 2 and "not installed: torch, transformers, hypothesis, numpy, triton" in done.stderr
    assert f'    {sys.executable} -m pip install "torch>=2.11,<2.14" -e ".[dev]"\n' in done.stderr
    assert str(ROOT) in done.stderr and "--install" in done.stderr


def test_a_dry_run_needs_no_triton(started):
    assert "triton" not in started("--dry").stderr


def test_asked_to_it_installs_and_starts_anew(started, tmp_path):
    done = started("--install", "--part", "kernels", status=0)
    said = json.loads((tmp_path / "said").read_text())
    assert said == [str(ROOT), "install", "torch>=2.11,<2.14", "-e", ".[dev]"]
    # Anew without `--install`, and this pip installed nothing.
    assert done.returncode == 2 and "not installed" in done.stdout and "not installed" in done.stderr


def test_where_pip_fails_it_says_so(started):
    done = started("--install")
    assert done.returncode == 2 and "pip failed" in done.stderr and "venv" in done.stderr


def test_a_build_without_cuda_is_to_be_replaced(started, tmp_path):
    torch_of(tmp_path, "2.13.0+cpu", None)
    packages(tmp_path)
    done = started()
    assert done.returncode == 2 and "PyTorch 2.13.0+cpu is installed, a build without CUDA" in done.stderr
    assert f'{sys.executable} -m pip install --force-reinstall "torch>=2.11,<2.14"\n' in done.stderr
    started("--install")
    assert json.loads((tmp_path / "said").read_text())[1:] == ["install", "--force-reinstall", "torch>=2.11,<2.14"]


def test_a_pytorch_that_is_too_old_is_to_be_replaced(started, tmp_path):
    torch_of(tmp_path, "2.10.1", "12.8")
    packages(tmp_path)
    done = started()
    assert done.returncode == 2 and "PyTorch 2.10.1 is installed, expected torch>=2.11,<2.14" in done.stderr


def test_where_all_is_there_nothing_is_said(monkeypatch, capsys):
    assert bare.prepared(["--dry"]) is None
    monkeypatch.setattr(bare, "_torch", lambda: ("2.13.0+cu130", True))
    monkeypatch.setattr(bare, "_unfit", lambda device: "")
    monkeypatch.setattr(bare.importlib.util, "find_spec", lambda name: object())
    assert bare.prepared([]) is None and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("version", "fits"), [("2.10.1", False), ("2.11.0+cu130", True), ("2.13.1", True), ("2.14.0a0", False)]
)
def test_versions(version, fits):
    assert bare._within(version, "torch>=2.11,<2.14") is fits


def test_what_pip_cannot_install_is_named(monkeypatch, capsys):
    monkeypatch.setattr(bare.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert bare.prepared([]) == 2 and "no C compiler" in capsys.readouterr().err
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(bare.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert bare.prepared(["--install"]) == 2 and "no Python.h" in capsys.readouterr().err
