"""Kernels as Inductor writes them for a GPU, compiled without one."""

import json

import pytest

from benchmarks.ahead.cases import SETTINGS, cases
from benchmarks.ahead.compiled import MATRIX
from benchmarks.ahead.steps import Step, step_of
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


#: Launches of the packed cache's kernels in a layer of a decode step, and the most buffers that these want.
STEPS = {
    "7B LLaVA, bfloat16, default": (3, 4),
    "7B LLaVA, bfloat16, rotated": (2, 0),
    "7B LLaVA, bfloat16, 4 bits, un-rotated": (3, 4),
}


@pytest.mark.slow
def test_what_inductor_writes_compiles(tmp_path):
    out = tmp_path / "facts.json"
    done = compiled.run("-m", "benchmarks.ahead", "--only", *CHOSEN, "--capability", "90", "--json", str(out))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    found, steps = json.loads(out.read_text()).values()
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
    assert steps.keys() == set(CHOSEN)
    for case, (launches, own) in STEPS.items():
        step = steps[case]
        assert (step["layers"], step["launches"]) == (2, 2 * launches), (case, step)
        assert step["own"] <= 2 * own and step["allocations"] <= 2 * own + 22, (case, step)


def test_what_a_decode_step_launches_and_allocates():
    step = step_of([_WRAPPER.replace("torch.ops", "torch"), _WRAPPER, _WRAPPER.replace("append", "absorb")])
    assert step == Step(layers=1, launches=2, allocations=4, own=2)
    assert "layers: 1, launches of the packed cache's kernels: 2, allocations: 4 (2 for these)" in str(step)
    assert step_of([]) is None


_WRAPPER = """
append_kernel_0 = async_compile.triton('append_kernel', # the kernel's source
def call(self, args):
        buf0 = empty_strided_cuda((1, 64), (64, 1), torch.bfloat16)
        extern_kernels.mm(arg1_1, arg2_1, out=buf0)
        buf1 = empty_strided_cuda((s0, 64), (64, 1), torch.float32)
        buf2 = torch.ops.attnpack.take_rows.default(arg3_1, arg4_1, 0)
        append_kernel_0.run(arg0_1, buf0, 1, stream=raw_stream0)
        buf3 = buf0; del buf0  # reuse
        buf4 = empty_strided_cuda((s0, 64), (64, 1), torch.float32)
        combine_kernel_1.run(buf1, buf4, buf3, 1, stream=raw_stream0)
        triton_poi_fused_add_2.run(buf2, buf3, 64, stream=raw_stream0)
"""


def test_cases_have_names_of_their_own():
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) and set(CHOSEN) <= set(names)
    assert {case.setting for case in cases()} == SETTINGS.keys()


def test_an_unknown_case_is_refused():
    done = compiled.run("-m", "benchmarks.ahead", "--only", "LLaVA-9")
    assert done.returncode == 2 and "got ['LLaVA-9'], expected part of a case's name" in done.stderr
