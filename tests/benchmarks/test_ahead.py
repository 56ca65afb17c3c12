"""Kernels as Inductor writes them for a GPU, compiled without one."""

import json

import pytest

from benchmarks.ahead.cases import SETTINGS, cases
from benchmarks.ahead.compiled import MATRIX
from tests.kernels.triton import compiled

#: Together they launch every kernel of a decode step, as one and as several launches, of keys before and after rotary
#: embedding, under one axis and several.
CHOSEN = (
    "7B LLaVA, bfloat16, default",
    "7B LLaVA, bfloat16, rotated",
    "7B LLaVA, bfloat16, 8 and 2 bits",
    "7B LLaVA, bfloat16, 4 bits, un-rotated",
    "7B LLaVA, bfloat16, KIVI",
    "7B Qwen2.5-VL, bfloat16, rotated",
    "7B Qwen3-VL, bfloat16, rank 16",
)


@pytest.mark.slow
def test_what_inductor_writes_compiles(tmp_path):
    out = tmp_path / "facts.json"
    done = compiled.run("-m", "benchmarks.ahead", "--only", *CHOSEN, "--capability", "90", "--json", str(out))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    found = json.loads(out.read_text())
    assert {facts["kernel"] for facts in found} >= {
        *MATRIX,
        "append_kernel",
        "combine_kernel",
        "combine_coded_kernel",
    }
    wrong = []
    for facts in found:
        where = f"{facts['case']}, {facts['kernel']}"
        if facts["spilled"]:
            wrong.append(f"{where}: {facts['spilled']} bytes spilled")
        if facts["double"]:
            wrong.append(f"{where}: {facts['double']} instructions on float64")
        if facts["kernel"] in MATRIX and "bfloat16" in facts["case"] and not facts["matrix"]:
            wrong.append(f"{where}: no tensor-core instruction")
    assert not wrong, "\n".join(wrong)


def test_cases_have_names_of_their_own():
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) and set(CHOSEN) <= set(names)
    assert {case.setting for case in cases()} == SETTINGS.keys()


def test_an_unknown_case_is_refused():
    done = compiled.run("-m", "benchmarks.ahead", "--only", "LLaVA-9")
    assert done.returncode == 2 and "got ['LLaVA-9'], expected part of a case's name" in done.stderr
