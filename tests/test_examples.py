"""Every script in `examples/`, as its first lines say to run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(each.stem for each in (ROOT / "examples").glob("*.py") if each.stem != "shipped")
#: What a script must print.
PRINTED = {
    "calibrate_and_save": r"[34] of 4 answers are right",
    "compose_methods": r"low rank, 4 bits: [34] of 4 answers are right",
    "generate": r"packed: [34] of 4 answers are right",
    "kept_prefix": r"\(right\)\n.*image #1 answer : \d( \d){7}\n",
    "own_loop": r"[34] of 4 answers are right[^\n]*\nkeys of the first layer: PackedTensor",
    "tensor_parallel": r"[34] of 4 answers are right\n2 heads of each layer",
}
#: What holds of the bytes it prints, in their order.
SMALLER = {
    "calibrate_and_save": lambda file, packed: file < packed < 5e6,
    "compose_methods": lambda plain, coded, evicted, both: both < coded < plain / 2 and evicted < plain,
    "generate": lambda dense, packed: packed < dense / 3,
    "kept_prefix": lambda kept, together, alone: kept < together < alone / 2,
    "own_loop": lambda packed: packed < 11e6,
    "tensor_parallel": lambda own, together: 1.9 * own < together < 2.1 * own,
}


def command(script: str) -> list[str]:
    """What the first lines of a script say, with this Python."""
    told = re.search(r"^((?:python|torchrun) .*)$", (ROOT / "examples" / f"{script}.py").read_text(), re.MULTILINE)
    assert told, script
    program, *arguments = told[1].split()
    return [sys.executable, *([] if program == "python" else ["-m", "torch.distributed.run"]), *arguments]


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES)
def test_runs(script):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(script), capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(PRINTED[script], done.stdout), done.stdout
    sizes = [int(each.replace(",", "")) for each in re.findall(r"([\d,]+) B\b", done.stdout)]
    assert SMALLER[script](*sizes), sizes


def test_all_are_in_the_list_of_examples():
    page = (ROOT / "examples" / "README.md").read_text()
    assert set(PRINTED) == set(SMALLER) == set(EXAMPLES)
    assert set(re.findall(r"^\| \[(\w+)\.py\]", page, re.MULTILINE)) == set(EXAMPLES)
