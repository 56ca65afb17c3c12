import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = ("attnpack_cli", "attnpack_fx", "attnpack_serve", "kernels", "passes", "export")


def test_every_package_folder_is_listed():
    found = set()
    for top in MAPPED:
        for init in (ROOT / top).rglob("__init__.py"):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            found.add(name if top.startswith("attnpack") else f"attnpack_fx.{name}")
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_file_that_is_no_code_is_listed():
    found = {
        top: sorted(
            file.name for file in (ROOT / top).rglob("*") if file.is_file() and not file.suffix.startswith(".py")
        )
        for top in MAPPED
    }
    assert PROJECT["tool"]["setuptools"]["package-data"] == {top: names for top, names in found.items() if names}


def test_the_backend_is_registered_by_its_entry_point_alone():
    entries = importlib.metadata.entry_points(group="torch_dynamo_backends", name="attnpack")
    assert [entry.value for entry in entries] == ["attnpack_fx.backend:attnpack_backend"]


def test_folders_import_under_the_package_and_not_beside_it(tmp_path):
    code = (
        "import importlib.util, attnpack_fx.kernels\n"
        "assert attnpack_fx.kernels.__name__ == 'attnpack_fx.kernels'\n"
        "assert [n for n in ('kernels', 'passes', 'export') if importlib.util.find_spec(n)] == []\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
