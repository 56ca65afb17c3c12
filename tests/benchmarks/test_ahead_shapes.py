"""What the compiled kernels take of a GPU, asserted for every shipped shape and architecture; needs no GPU."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks.ahead import shapes
from benchmarks.ahead.compiled import LIMITS, MATRIX, USUAL, Facts, facts_of, occupancy
from tests.kernels.triton import compiled

#: Together they launch every kernel, the largest in half precision among them; the other architectures are compiled for
#: them alone.
EVERYWHERE = (
    "LLaVA-1.5-7B",
    "rank 256, head dim 256",
    "un-rotated keys, rank 64, GQA",
    "un-rotated keys, rank 16, M-RoPE",
    "LLaVA-1.5-7B, 4 bits",
    "LLaVA-1.5-7B, 4 bits, un-rotated keys",
)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return compiled.run("-m", "benchmarks.ahead.shapes", *arguments)


@pytest.mark.slow
def test_every_kernel_of_every_shipped_shape(tmp_path):
    """One test for all, so that everything is compiled once: all shapes for Hopper, every kernel for the others."""
    facts, tables = [], []
    others = "80", "100"
    for arguments in (("--capability", "90"), ("--capability", *others, "--shape", *EVERYWHERE)):
        done = command("--json", str(tmp_path / "facts.json"), *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads((tmp_path / "facts.json").read_text())["kernels"]
        facts += [(fact.pop("case"), Facts(**fact)) for fact in found]
        tables.append(done.stdout)
    kernels = {each: {fact.kernel for _, fact in facts if str(fact.capability) == each} for each in ("90", *others)}
    assert all(kernels[each] == kernels["90"] for each in others), "add a shape to EVERYWHERE that launches the missing"
    wrong = []
    for name, fact in facts:
        shape = shapes.SHAPES[name]
        where, usual = f"{name}, {fact.kernel}, {fact.capability}", fact.capability in USUAL
        if fact.spilled and usual:
            wrong.append(f"{where}: {fact.spilled} bytes spilled")
        if fact.shared > LIMITS[fact.capability].block_shared:
            wrong.append(f"{where}: {fact.shared} bytes of shared memory")
        if fact.occupancy < 0.12 and usual:
            wrong.append(f"{where}: occupancy {fact.occupancy:.0%}")
        if fact.kernel in MATRIX and shape.dtype != torch.float32 and not fact.matrix:
            wrong.append(f"{where}: no tensor-core instruction")
        # Masks and cos and sin of odd sizes are read in small pieces, factors and tails never are.
        narrow = fact.loads - fact.wide_loads if usual else 0
        if fact.kernel in ("tokens_kernel", "fused_kernel") and not shape.mask and narrow > 2:
            wrong.append(f"{where}: {fact.wide_loads} of {fact.loads} loads are 16 bytes wide")
    assert not wrong, "\n".join(wrong)
    wgmma = [fact for _, fact in facts if fact.capability == 90 and fact.kernel == "tokens_kernel" and fact.warpgroup]
    assert wgmma, "no shape reaches Hopper's warpgroup products"
    for name in ("LLaVA-1.5-13B, 16 images, batch 64", "Qwen3-VL-8B, two segments", "un-rotated keys, rank 16"):
        assert name in tables[0]


def test_launches_of_a_decode_step():
    """At most four beside the projections, the append included."""
    done = compiled.run("-c", _COUNT)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = json.loads(done.stdout.splitlines()[-1])
    assert launches["LLaVA-1.5-7B"] == ["append_kernel", "fused_kernel"]
    assert launches["LLaVA-1.5-7B, batch 64"] == ["append_kernel", "absorb_kernel", "tokens_kernel", "combine_kernel"]
    # One launch would be four programs.
    assert launches["Qwen2.5-VL-7B, one image"] == launches["LLaVA-1.5-7B, batch 64"]
    coded = ["append_kernel", "absorb_coded_kernel", "tokens_coded_kernel", "combine_coded_kernel"]
    assert launches["LLaVA-1.5-7B, 4 bits"] == launches["Qwen3-VL-8B, 4 bits, coded rows of text"] == coded
    assert launches["LLaVA-1.5-7B, KIVI's rows in 2 bits"] == [name for name in coded if name != "tokens_coded_kernel"]
    assert launches["LLaVA-1.5-7B, 4 bits, un-rotated keys"] == ["append_kernel", "rebuilt_coded_kernel", coded[-1]]
    assert launches["un-rotated keys, rank 16"] == ["append_kernel", "rebuilt_kernel", "combine_kernel"]
    by_axis = ["append_kernel", "tables_kernel", "split_kernel", "combine_kernel"]
    assert launches["un-rotated keys, rank 16, M-RoPE"] == by_axis
    assert all(len(kernels) <= 4 for kernels in launches.values()) and launches.keys() == shapes.SHAPES.keys()


_COUNT = """
import json
from benchmarks.ahead.shapes import SHAPES, decode_step
print(json.dumps({name: [launch.kernel for launch in decode_step(shape)] for name, shape in SHAPES.items()}))
"""


def test_a_shape_that_is_not_shipped_is_refused():
    done = command("--shape", "LLaVA-9")
    assert done.returncode == 2 and "invalid choice: 'LLaVA-9'" in done.stderr


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "expected"),
    [
        (90, 4, 64, 0, 0.5),
        (90, 4, 255, 0, 0.125),
        (90, 8, 32, 100 << 10, 0.25),
        (90, 4, 32, 228 << 10, 0.0),
        (120, 4, 32, 48 << 10, 8 / 48),
        (120, 4, 32, 100 << 10, 0.0),
        ("gfx942", 4, 128, 32 << 10, 8 / 32),
        ("gfx942", 4, 128, 0, 16 / 32),
        ("gfx1100", 4, 192, 64 << 10, 8 / 64),
        ("gfx1100", 4, 193, 0, 28 / 64),
    ],
)
def test_occupancy(capability, warps, registers, shared, expected):
    assert occupancy(capability, warps, registers, shared) == expected


def test_what_a_kernel_for_amd_takes_is_read_from_its_assembly():
    metadata = SimpleNamespace(num_warps=4, shared=32 << 10)
    facts = facts_of(Facts("some_kernel", "gfx942"), SimpleNamespace(asm={"amdgcn": _AMD}, metadata=metadata))
    assert (facts.threads, facts.registers, facts.spilled, facts.shared) == (256, 128, 24, 32 << 10)
    assert (facts.matrix, facts.loads, facts.wide_loads, facts.double, facts.occupancy) == (2, 3, 2, 1, 8 / 32)


_AMD = """
    global_load_dwordx4 v[2:5], v[0:1], off
    buffer_load_dwordx4 v14, s[8:11], 0 offen lds
    global_load_ushort v3, v[0:1], off
    v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], 0
    v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
    v_add_f64 v[0:1], v[2:3], v[4:5]
    .group_segment_fixed_size: 32768
    .private_segment_fixed_size: 24
    .sgpr_spill_count: 2
    .vgpr_count:     128
    .vgpr_spill_count: 6
"""


def test_a_longer_prompt_compiles_nothing_anew():
    """Fifty prompts, as Triton's own launches specialise their arguments."""
    done = compiled.run("-c", _LENGTHS)
    assert done.returncode == 0, done.stderr[-3000:]
    variants = json.loads(done.stdout.splitlines()[-1])
    assert set(variants.values()) == {1}, variants


_LENGTHS = """
import json
from dataclasses import replace
from benchmarks.ahead.shapes import SHAPES, decode_step, packing

found = {}
for name in json.loads('''NAMES'''):
    shape = SHAPES[name]
    for more in range(50):
        longer = replace(shape, tokens=tuple(tokens + 3 * more + 1 for tokens in shape.tokens), tail=shape.tail + more)
        for launch in packing(longer) + decode_step(longer):
            found.setdefault(f"{name}, {launch.kernel}", set()).add(repr(launch))
print(json.dumps({name: len(variants) for name, variants in found.items()}))
""".replace("NAMES", json.dumps([*EVERYWHERE[:4], "Qwen3-VL-8B, two segments"]))
