"""What is predicted of an H200: bytes and operations counted by hand, and the table that measurements fill."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")

from attnpack_fx import PackPolicy
from attnpack_fx.kernels import reference
from attnpack_fx.kernels.triton import KERNELS
from attnpack_fx.step_cost import attention_arguments
from benchmarks.attention_step import APPENDED
from benchmarks.gpu import attention, coded, layers, predicted, recorded, render, roofline, store, work
from benchmarks.gpu.layers import MODELS, SHAPES, Layout
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.part import Run
from benchmarks.gpu.unrotated_layers import unrotated
from tests.kernels.inputs import relative_error

LLAVA, QWEN = MODELS["LLaVA-1.5-7B"], MODELS["Qwen2.5-VL-7B"]
#: Ways that no row of the table takes.
_OTHERS = {
    "split": lambda layer, _: unrotated(layer, Layout("few", 32, 32, 128, axes=2), 16),
    "4 bits before rotary embedding": lambda layer, layout: _turned(
        roofline._coded(layer, 4), unrotated(layer, layout, 64)
    ),
}


def _turned(codes, turned):
    keys, values = codes.parts
    return SimpleNamespace(query=codes.query, parts=(replace(keys, angles=turned.parts[0].angles), values))


def launched(layout, batch, tokens, setting):
    make = roofline.SETTINGS.get(setting) or _OTHERS[setting]
    return roofline.attended(make(roofline._packed(layout, batch, tokens), layout))


def test_every_kernel_of_attention_is_counted():
    others = {"append_kernel", "gather_kernel", "jacobi_kernel"}
    assert work.WORK.keys() == {kernel.__name__ for kernel in KERNELS} - others
    settings = [*roofline.SETTINGS, *_OTHERS]
    found = [launch for layout in (LLAVA, QWEN) for each in settings for launch in launched(layout, 1, 576, each)]
    assert {launch.kernel for launch in found} == work.WORK.keys()
    for launch in found:
        counted = work.WORK[launch.kernel](launch)
        assert counted.l2 > 0 and counted.matrix + counted.vector > 0


def test_what_attention_to_tokens_reads_and_multiplies():
    batch, tokens = 2, 9216
    launch = next(each for each in launched(LLAVA, batch, tokens, "rotated, 64") if each.kernel == "tokens_kernel")
    packed, (splits, samples, blocks) = tokens - APPENDED, launch.grid
    assert samples == batch and blocks == 1 and splits * launch.arguments["tokens_per_split"] >= packed
    counted = work.tokens(launch)
    coefficients, latent = 2 * batch * packed * 64 * 2, batch * 32 * 64 * 2
    partials = splits * batch * 32 * (64 + 1) * 4
    assert counted.l2 == coefficients + splits * latent + partials
    assert counted.matrix == 2 * batch * 32 * packed * (64 + 64)
    assert counted.vector == work.SCORE * batch * 32 * packed
    # Codes are an eighth of the numbers' bytes, half a byte for two, and each is decoded.
    launch = next(each for each in launched(LLAVA, batch, tokens, "rotated, 64, 4 bits") if "tokens" in each.kernel)
    decoding = work.DECODE * batch * packed * 128
    assert work.tokens(launch).vector == work.SCORE * batch * 32 * packed + decoding
    assert work.tokens(launch).l2 == coefficients / 4 + launch.grid[0] * latent + launch.grid[0] * batch * 32 * 65 * 4


def test_fused_reads_coefficients_for_every_head():
    (launch,) = launched(LLAVA, 1, 576, "rotated, 64")
    packed, head = 576 - APPENDED, 128 * 2
    once = 2 * 32 * 64 * head + 2 * APPENDED * 32 * head + 2 * 32 * head
    assert launch.kernel == "fused_kernel" and work.fused(launch).l2 == 32 * 2 * packed * 64 * 2 + once
    padded = 2 * 32 * 16 * (128 * 128 + packed * 128 + APPENDED * 256)
    assert work.fused(launch).matrix == padded


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("layout", [LLAVA, QWEN], ids=lambda layout: layout.name)
def test_what_rebuilding_keys_reads(layout, stages):
    batch, packed, axes = 2, 9216 - APPENDED, layout.axes
    launch = next(each for each in launched(layout, batch, 9216, "default, 32 and 64") if "rebuilt" in each.kernel)
    launch.arguments["num_stages"] = stages
    programs, splits, tile = launch.grid[0], launch.grid[2], launch.arguments["BLOCK_N"]
    assert batch * layout.kv_heads % programs == 0 and launch.grid[1] == 1
    rows = max(1, axes) if stages > 1 else 1  # of cos and sin, that do not come from L1
    read = programs * packed * ((32 + 64) * 2 + rows * 128 * 2 + axes * 8)
    bases = batch * layout.kv_heads * 32 * 128 * 2 * (-(-packed // tile) if stages > 1 else splits)
    rest = sum(launch.arguments[name].nbytes for name in ("latent", "latent_sums", "partial", "partial_sums"))
    rest += sum(launch.arguments[name].nbytes for name in ("key_tail", "value_tail", "query"))
    assert work.rebuilt(launch).l2 == read + bases + rest
    products = batch * layout.kv_heads * packed * 128 * (32 + 16) + programs * packed * 16 * 64
    tail = batch * layout.kv_heads * 16 * APPENDED * 256
    assert work.rebuilt(launch).matrix == 2 * (products + tail)


@pytest.mark.parametrize("setting", roofline.SETTINGS)
def test_memory_is_read_once(setting):
    found = roofline.predict(LLAVA, 8, 9216, setting)
    layer = roofline.SETTINGS[setting](roofline._packed(LLAVA, 8, 9216), LLAVA)
    assert found.nbytes == layer.nbytes + layer.query.nbytes
    assert found.seconds > found.nbytes / roofline.MEMORY + len(found.kernels) * roofline.LAUNCH - 1e-12


def test_a_kernel_takes_its_longest_time():
    launch = recorded.Launch("tokens_kernel", (66, 1, 1), {})
    half = roofline.limits(work.Work(l2=1e6, matrix=1e9, vector=1e8), launch, memory=10**6)
    assert half["memory"] == 1e6 / roofline.MEMORY  # half of the multiprocessors can read all that memory gives
    assert half["L2"] == 1e6 / roofline.L2
    assert half["tensor cores"] == pytest.approx(2 * 1e9 / roofline.MATRIX)
    assert half["instructions"] == pytest.approx(2 * 1e8 / roofline.VECTOR)
    few = roofline.limits(work.Work(l2=1e6), recorded.Launch("", (4, 2, 1), {}), memory=10**6)
    assert few["memory"] == few["L2"] == 1e6 / (8 * roofline.PROCESSOR)


def test_which_kernels_run_is_asked_of_the_launcher(monkeypatch):
    assert roofline.predict(LLAVA, 1, 576, "rotated, 64").kernels == ("fused",)
    monkeypatch.setattr("attnpack_fx.kernels.triton.attend.FUSED_BYTES", 0)
    found = roofline.predict(LLAVA, 1, 576, "rotated, 64")
    assert found.kernels == ("absorb", "tokens", "combine") and found.seconds > 3 * roofline.LAUNCH


def test_the_default_is_what_the_policy_does():
    plan = PackPolicy().layer(0, 1, LLAVA.width, LLAVA.width)
    assert plan.key_space == "unrotated"
    assert [side.blocks for side in (plan.vision.key, plan.vision.value)] == [((32, 0),), ((64, 0),)]


@pytest.mark.parametrize("layout", [Layout("plain", 4, 4, 16), Layout("grouped", 4, 2, 16, axes=3)])
def test_keys_before_rotary_embedding_are_rotated(layout):
    packed = layers.packed_layer(layout, 2, 2400, 8, torch.float32, torch.Generator().manual_seed(0))
    layer = unrotated(packed, layout, 4)
    assert layer.packed.coefficients[0].shape[2] == 4 and layer.packed.coefficients[1] is packed.coefficients[1]
    assert (layer.axes is None) is (layout.axes == 0)
    if layer.axes is not None:
        # Every pair turns by one axis, and tables are no longer than half of the tokens, or they would not be kept.
        assert (layer.cos != 0).sum(1).min() > 0 and 2 * layer.cos.shape[1] <= layer.axes.shape[2]
        assert layer.axes.max() == layer.cos.shape[1] - 1
        whole = layer.cos[0][layer.axes[0]].sum(0)
        assert (whole.square() + layer.sin[0][layer.axes[0]].sum(0).square() - 1).abs().max() < 1e-5
    rows = [(0, 0), (1, 3)]
    out = torch.ops.attnpack.attention(*attention_arguments(layer.query, *layer.parts))
    assert relative_error(out[[0, 1], [0, 3], 0], layer.expected(rows)) < 1e-5
    exact = reference.attention(layer.query, *layer.parts, None, layer.query.shape[-1] ** -0.5)
    assert relative_error(exact[[0, 1], [0, 3], 0], layer.expected(rows)) < 1e-6
    plain = torch.ops.attnpack.attention(*attention_arguments(layer.packed.query, *layer.packed.parts))
    assert relative_error(plain[[0, 1], [0, 3], 0], layer.expected(rows)) > 0.05


# ---- the table ---------------------------------------------------------------------------------------------


def test_everything_predicted_is_measured():
    machine = Machine(dry=True)
    machine.dry = False
    run = Run(machine, {})
    names = {f"{layout.name} B={batch} T={tokens}" for layout, batch, tokens in SHAPES}
    assert names <= attention.cases(run).keys() and names <= coded.cases(run).keys()
    assert predicted._PLACES.keys() == roofline.SETTINGS.keys()


def _case(seconds):
    return {"packed": {"seconds": seconds}}


@pytest.fixture
def results(tmp_path):
    """As a run on an H200 writes them, of one shape, beside others that do not count."""

    def write(folder, part, device, dry, case):
        (tmp_path / folder).mkdir(exist_ok=True)
        content = {"benchmark": store.BENCHMARK, "device": device, "dry": dry, "cases": {"MHA-32x128 B=8 T=2048": case}}
        (tmp_path / folder / f"{part}.json").write_text(json.dumps(content))

    rows = {"ranks": {"64": _case(20e-6)}, "unrotated": {"32": _case(40e-6), "64": _case(50e-6)}}
    write("h200", "attention", "NVIDIA H200", False, rows)
    write("h200", "codes", "NVIDIA H200", False, {"stored": {"factors, 4 bits": {"seconds": 30e-6}}})
    for folder, device, dry in (("other", "NVIDIA A100", False), ("the-dry-one", "NVIDIA H200", True)):
        write(folder, "attention", device, dry, {"ranks": {"64": _case(1.0)}})
    return tmp_path


def test_measured_times_stand_beside_predicted_ones(results):
    header, rule, *lines = predicted.table(results)
    assert header.count("|") == rule.count("|") == len(predicted.HEADER) + 1
    assert len(lines) == len(SHAPES) * len(roofline.SETTINGS)
    filled = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if not line.endswith("| - | - |")]
    assert [(row[0], row[1], row[2], row[3], row[-2]) for row in filled] == [
        ("LLaVA-1.5-7B", "8", "2048", setting, measured)
        for setting, measured in zip(roofline.SETTINGS, ("20.0", "40.0", "50.0", "30.0"), strict=True)
    ]
    for row in filled:
        expected = roofline.predict(LLAVA, 8, 2048, row[3])
        assert (
            row[-1] == f"{float(row[-2]) / (expected.seconds * 1e6):.2f}" and row[5] == f"{expected.nbytes / 1e6:.1f}"
        )


def test_nothing_measured_is_told_from_predictions(tmp_path):
    page = render.page(tmp_path)
    assert render._NONE in page and "**Nothing up to the column *ratio* was measured. A model predicts it**" in page
    assert all(line in page for line in predicted.table(tmp_path)) and "$" not in page
