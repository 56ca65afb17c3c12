"""The backend as a user meets it: options, fallbacks, warnings, caches, memory, threads."""

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnpack_fx import H2O, AttnpackWarning, PackedTensor, attnpack_backend
from attnpack_fx.passes import pipeline
from tests.decoder import Cache, Decoder, close, next_ids, prompt

STRICT = {"vision_rank": "full", "strict": True}
ROOT = Path(__file__).parent.parent


def assert_right(model: Decoder, step, steps: int = 2, batch: int = 1) -> Cache:
    """Prefill and decode through `step` equal eager; returns the packed cache."""
    ids, features = prompt(batch=batch)
    expected, dense = model(ids, features)
    logits, cache = step(ids, features)
    close(logits, expected)
    for number in range(steps):
        new = next_ids(batch=batch, seed=number)
        expected, dense = model(new, cache=dense)
        logits, cache = step(new, cache=cache)
        close(logits, expected)
    for pair, dense_pair in zip(cache, dense, strict=True):
        for held, wanted in zip(pair, dense_pair, strict=True):
            close(held.dense() if isinstance(held, PackedTensor) else held, wanted)
    return cache


def all_packed(cache: Cache) -> bool:
    return all(isinstance(item, PackedTensor) for pair in cache for item in pair)


# ---- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vison_rank": 8}, ValueError, "'vison_rank'.*did you mean 'vision_rank'"),
        ({"vision_rank": 17}, ValueError, r"vision_rank=17 exceeds H \* D = 16"),
        ({"vision_rank": 0}, ValueError, "vision_rank: got 0"),
        ({"text_rank": "most"}, ValueError, "text_rank: got 'most'"),
        ({"policy": {"vision_rank": 4}}, ValueError, "policy: got dict, expected a PackPolicy"),
        ({"max_autotune": "yes"}, ValueError, "'max_autotune': got 'yes'"),
        ({"key_space": "both"}, ValueError, "key_space: got 'both'"),
    ],
)
def test_a_bad_option_is_raised_as_it_is_by_the_first_call(options, error, message, without_inductor):
    step = torch.compile(Decoder(layers=1), backend=attnpack_backend, options=options)
    with pytest.raises(error, match=message):
        step(*prompt())


def test_a_bad_option_does_not_go_away(without_inductor):
    step = torch.compile(Decoder(layers=1), backend=attnpack_backend, options={"vison_rank": 8})
    for _ in range(2):
        with pytest.raises(ValueError, match="vison_rank"):
            step(*prompt())


def recorded_patches(monkeypatch, **arguments) -> dict:
    """What reaches `compile_fx` as configuration."""
    import torch._inductor.compile_fx as inductor

    seen = []

    def compile_fx(module, examples, config_patches=None, **_):
        seen.append(config_patches)
        return module

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    assert_right(model := Decoder(layers=1), torch.compile(model, backend=attnpack_backend, **arguments), steps=0)
    return seen[0]


def test_a_mode_is_passed_through(monkeypatch, fresh_dynamo):
    patches = recorded_patches(monkeypatch, mode="max-autotune-no-cudagraphs")
    assert patches["max_autotune"] is True


#: What PyTorch 2.11 cannot do without on a CPU.
OURS = {"assert_indirect_indexing": False} if torch.__version__ < "2.12" else {}


def test_inductor_options_are_passed_through_and_ours_are_not(monkeypatch, fresh_dynamo):
    patches = recorded_patches(monkeypatch, options={**STRICT, "epilogue_fusion": False, "shape_padding": True})
    assert patches == OURS | {"epilogue_fusion": False, "shape_padding": True}


def test_without_options_nothing_else_is_patched(monkeypatch, fresh_dynamo):
    assert recorded_patches(monkeypatch) == (OURS or None)


def test_an_unknown_mode_is_refused(without_inductor):
    def refused():
        step = torch.compile(Decoder(layers=1), backend=attnpack_backend, mode="fastest")
        step(*prompt())

    with pytest.raises(ValueError, match="fastest"):
        refused()


def test_two_policies_for_two_models_of_one_class(without_inductor):
    found = []
    for rank in (2, 3):
        model = Decoder(layers=1)
        model.compile(backend="attnpack", options={"vision_rank": rank})
        _, cache = model(*prompt(vision=40))
        found.append(cache[0][0].ranks)
    assert found == [{"vision": 2}, {"vision": 3}]


# ---- ways in -----------------------------------------------------------------------------------------------


def test_the_entry_point_is_found_by_name(without_inductor):
    assert "attnpack" in torch._dynamo.list_backends()
    model = Decoder()
    assert all_packed(assert_right(model, torch.compile(model, backend="attnpack", options=STRICT)))


def test_a_compiled_forward(without_inductor):
    model, reference = Decoder(), Decoder()
    model.forward = torch.compile(model.forward, backend="attnpack", options=STRICT)
    assert all_packed(assert_right(reference, model))


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_any_setting_of_dynamic(dynamic, without_inductor):
    model = Decoder()
    step = torch.compile(model, backend=attnpack_backend, dynamic=dynamic, options=STRICT)
    assert all_packed(assert_right(model, step, steps=3))


@pytest.mark.slow
def test_training_mode_and_gradients_are_those_of_eager(fresh_dynamo):
    """Nothing is differentiated through a packed value; the loss of an ordinary training step is."""
    model, reference = Decoder(layers=1).requires_grad_(True).train(), Decoder(layers=1).requires_grad_(True).train()
    step = torch.compile(model, backend=attnpack_backend, options=STRICT)
    ids, features = prompt()
    for call in (step, reference):
        logits, _ = call(ids, features)
        logits.square().mean().backward()
    for (name, actual), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (actual.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, atol=1e-6, rtol=1e-3)


# ---- through Inductor --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prefill_and_decode_through_inductor(fresh_dynamo):
    """The whole way, with the graphs counted: one prefill, and at most two for decoding."""
    graphs = []

    def counting(gm, example_inputs, **options):
        return attnpack_backend(gm, example_inputs, observer=graphs.append, **options)

    model = Decoder()
    step = torch.compile(model, backend=counting, options=STRICT)
    cache = assert_right(model, step, steps=6)
    assert all_packed(cache)
    assert cache[0][0].tokens == {"vision": 10, "dense": 12}
    assert [[site.action for site in sites] for sites in graphs[:2]] == [["compressed"] * 2, ["packed"] * 2]
    assert len(graphs) <= 3
    count = len(graphs)

    # Another batch than the step before: the same model, right again.
    model_ids, features = prompt(batch=3)
    expected, dense = model(model_ids, features)
    logits, cache = step(model_ids, features)
    close(logits, expected)
    for batch, rows in ((3, None), (2, torch.tensor([2, 0])), (1, torch.tensor([1]))):
        if rows is not None:
            cache = [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in cache]
            dense = [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in dense]
        expected, dense = model(next_ids(batch=batch), cache=dense)
        logits, cache = step(next_ids(batch=batch), cache=cache)
        close(logits, expected)
        assert all_packed(cache)
    assert len(graphs) > count


# ---- what fails or stays dense -----------------------------------------------------------------------------


def failing(state):
    raise ZeroDivisionError("a pass went wrong")


def test_a_failing_pass_leaves_the_graph_dense_and_says_so(monkeypatch, without_inductor, caplog):
    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES[:-1], failing))
    model = Decoder()
    step = torch.compile(model, backend=attnpack_backend, options={"vision_rank": "full"})
    with pytest.warns(AttnpackWarning, match="a pass went wrong"):
        cache = assert_right(model, step)
    assert not any(isinstance(item, PackedTensor) for pair in cache for item in pair)
    assert "the rewrite failed" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_pass_that_fails_on_a_packed_cache_decompresses_it(monkeypatch, without_inductor):
    model = Decoder()
    step = torch.compile(model, backend=attnpack_backend, options={"vision_rank": "full"})
    ids, features = prompt()
    _, cache = step(ids, features)
    assert all_packed(cache)
    monkeypatch.setattr(pipeline, "PASSES", (failing, *pipeline.PASSES))
    with pytest.warns(AttnpackWarning, match="a pass went wrong"):
        logits, grown = step(next_ids(), cache=cache)
    _, dense = model(ids, features)
    close(logits, model(next_ids(), cache=dense)[0])
    assert not any(isinstance(item, PackedTensor) for pair in grown for item in pair)


def test_strict_raises_what_the_pass_raised(monkeypatch, without_inductor):
    monkeypatch.setattr(pipeline, "PASSES", (failing, *pipeline.PASSES))
    step = torch.compile(Decoder(), backend=attnpack_backend, options={"strict": True})
    with pytest.raises(Exception, match="a pass went wrong"):
        step(*prompt())


def test_a_graph_in_which_nothing_is_rewritten_says_so_and_why(without_inductor):
    model = Decoder()
    step = torch.compile(model, backend=attnpack_backend)
    with pytest.warns(AttnpackWarning, match="no attention site of this graph was rewritten: no vision tokens"):
        step(prompt()[0])


def test_the_warning_comes_once_not_every_call(without_inductor):
    step = torch.compile(Decoder(), backend=attnpack_backend)
    with pytest.warns(AttnpackWarning):
        step(prompt()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttnpackWarning)
        step(prompt()[0])


def test_some_sites_left_dense_are_counted(without_inductor):
    # Methods do not know that tokens leave by themselves.
    options = {"passes": (H2O(0.9),)}
    step = torch.compile(Decoder(windows=(None, 4, 4)), backend=attnpack_backend, options=options)
    with pytest.warns(AttnpackWarning, match="2 attention sites stay dense: sliding window"):
        step(*prompt())


def test_a_model_without_attention_is_compiled_without_a_word(without_inductor):
    linear = torch.nn.Linear(3, 3)
    step = torch.compile(linear, backend=attnpack_backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttnpackWarning)
        out = step(torch.ones(1, 3))
    close(out.detach(), linear(torch.ones(1, 3)).detach())


def test_keys_and_values_from_two_caches_are_refused(without_inductor):
    model = Decoder(layers=1)
    step = torch.compile(model, backend=attnpack_backend, options=STRICT)
    _, first = step(*prompt())
    _, longer = step(next_ids(), cache=first)
    with pytest.raises(RuntimeError, match="do not hold the same tokens"):
        step(next_ids(), cache=[(first[0][0], longer[0][1])])


# ---- memory ------------------------------------------------------------------------------------------------


def storages() -> dict[int, int]:
    """Bytes of every tensor storage alive, by address; parts of wrappers are tensors of their own."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, torch.nn.Parameter) and item.device.type == "cpu" and item.layout is torch.strided:
            try:
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            except RuntimeError:  # fake and functional tensors have no storage
                continue
    return found


@pytest.mark.slow
def test_no_dense_vision_keys_are_alive_after_prefill(fresh_dynamo):
    model = Decoder(layers=2, width=20, heads=4, kv_heads=4, dim=16)
    ids, features = prompt(text=7, vision=300, width=20)
    dense = 300 * 4 * 16 * 4  # bytes of the vision keys of one layer

    before = storages()
    _, kept = model(ids, features)
    grown = {address: size for address, size in storages().items() if address not in before}
    assert sum(size >= dense for size in grown.values()) >= 4, "the scan must see what a dense cache holds"
    del kept, grown

    step = torch.compile(model, backend=attnpack_backend, options={"vision_rank": 8, "strict": True})
    before = storages()
    logits, cache = step(ids, features)
    assert all_packed(cache)
    del logits
    alive = [size for address, size in storages().items() if address not in before]
    assert max(alive) < dense / 2
    assert sum(alive) < 4 * dense / 4


def allocated(function) -> tuple[int, int]:
    """Bytes of the largest allocation during `function()` and of all together, also inside compiled code."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [size for size in sizes if size > 0]
    return max(sizes), sum(sizes)


@pytest.mark.slow
def test_decoding_allocates_nothing_that_grows_with_the_dense_cache(fresh_dynamo):
    layers, heads, dim, width = 2, 2, 64, 20
    model = Decoder(layers=layers, width=width, heads=heads, kv_heads=heads, dim=dim)
    step = torch.compile(model, backend=attnpack_backend, options={"vision_rank": 8, "strict": True})
    counts = (256, 1024)
    measured, control = [], []
    for vision in counts:
        ids, features = prompt(text=4, vision=vision, width=width)
        _, cache = step(ids, features)
        for number in range(3):  # compiles, and makes room in the tail
            _, cache = step(next_ids(seed=number), cache=cache)
        measured.append(allocated(lambda cache=cache: step(next_ids(), cache=cache)))
        _, dense = model(ids, features)
        control.append(allocated(lambda dense=dense: model(next_ids(), cache=dense)))
    one_copy = (counts[1] - counts[0]) * heads * dim * 4  # of the keys of one layer
    largest, total = (after - before for before, after in zip(*measured, strict=True))
    assert largest < one_copy / 8
    assert total < layers * one_copy / 4
    assert control[1][1] - control[0][1] >= 2 * layers * one_copy, "the measurement must see a cache that is copied"


# ---- threads -----------------------------------------------------------------------------------------------


def test_two_threads_with_two_models(without_inductor):
    """Different weights, ranks and prompts, stepping at the same time."""
    models = [Decoder(seed=0), Decoder(seed=1, kv_heads=4)]
    steps = [torch.compile(model, backend=attnpack_backend, options=STRICT) for model in models]
    caches: list[Cache | None] = [None, None]
    errors: list[BaseException] = []
    together = threading.Barrier(2)

    def work(number: int) -> None:
        try:
            together.wait(timeout=60)
            with torch.no_grad():
                caches[number] = assert_right(models[number], steps[number], steps=4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [cache[0][0].shape[1] for cache in caches] == [2, 4]
    assert all(all_packed(cache) for cache in caches)


# ---- other processes ---------------------------------------------------------------------------------------


def in_process(script: str, **environment: str) -> dict:
    """The JSON that `script`, run by a fresh interpreter at the repository's root, prints last."""
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.strip().splitlines()[-1])


def test_importing_touches_neither_transformers_nor_cuda():
    found = in_process(
        """
        import json, sys
        import attnpack_fx, torch
        print(json.dumps({
            "transformers": sorted(name for name in sys.modules if name.split(".")[0] == "transformers"),
            "cuda": torch.cuda.is_initialized(),
        }))
        """
    )
    assert found == {"transformers": [], "cuda": False}


GENERATE = """
    import json, sys
    sys.modules["transformers"] = None  # importing it raises ImportError
    import torch
    from torch._dynamo.utils import counters
    import attnpack_fx
    from tests.decoder import Decoder, next_ids, prompt

    model, reference = Decoder(layers=1), Decoder(layers=1)
    attnpack_fx.compile(model, vision_rank="full", strict=True)
    logits, cache = model(*prompt())
    _, dense = reference(*prompt())
    for number in range(3):
        logits, cache = model(next_ids(seed=number), cache=cache)
        expected, dense = reference(next_ids(seed=number), cache=dense)
    print(json.dumps({
        "packed": all(isinstance(item, attnpack_fx.PackedTensor) for pair in cache for item in pair),
        "error": float((logits - expected).abs().max() / expected.abs().max()),
        "inductor": {name: count for name, count in counters["inductor"].items() if "fxgraph_cache" in name},
        "aot": dict(counters["aot_autograd"]),
    }))
"""


@pytest.mark.slow
def test_without_transformers_and_a_second_process_reuses_the_compiled_code(tmp_path):
    first = in_process(GENERATE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    second = in_process(GENERATE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    for found in (first, second):
        assert found["packed"]
        assert found["error"] < 1e-4
        assert not [name for name in found["aot"] if "bypass" in name]
        assert not found["inductor"].get("fxgraph_cache_bypass")
    assert first["inductor"]["fxgraph_cache_miss"] > 0
    assert second["inductor"]["fxgraph_cache_hit"] > 0
    assert not second["inductor"].get("fxgraph_cache_miss")
    assert not second["aot"].get("autograd_cache_miss")
