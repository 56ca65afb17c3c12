"""Ways of generating with a full-rank packed cache: beams, forks, crops, turns, threads, hand-made loops."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters

from attnpack_fx import PackedTensor
from tests.zoo import TEXT_TOKENS, ZOO

LOSSLESS = {"vision_rank": "full", "text_rank": "full", "strict": True}
TOLERANCE = 1e-4

#: For tests of what the packed cache means. Those of what compiled code does to it, in place and to its copies, go
#: through Inductor: beams, forks, threads and gradients.
pytestmark = pytest.mark.slow

Model = transformers.PreTrainedModel
Cache = transformers.DynamicCache


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def dense() -> Model:
    return ZOO["llava-gqa"].build("sdpa")


@pytest.fixture
def packed() -> Model:
    return compiled("llava-gqa")


def compiled(name: str, **options: Any) -> Model:
    model = ZOO[name].build("sdpa")
    model.compile(backend="attnpack", options=LOSSLESS | options)
    return model


def llava_inputs(batch: int = 1, left_padding: int = 0) -> dict[str, Tensor]:
    return ZOO["llava-gqa"].inputs(batch, left_padding)


def generate(model: Model, inputs: dict[str, Any], tokens: int = 16, **settings: Any) -> Any:
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | settings
    return model.generate(**inputs, max_new_tokens=tokens, **settings)


def text(tokens: int, batch: int = 1, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TEXT_TOKENS.start, TEXT_TOKENS.stop, (batch, tokens), generator=generator)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def assert_same(actual: Any, expected: Any) -> None:
    """Same tokens and logits from two results of `generate`; the first one's cache is packed."""
    assert torch.equal(actual.sequences, expected.sequences)
    assert_close(torch.stack(actual.logits), torch.stack(expected.logits))
    assert_packed(actual.past_key_values)


def assert_packed(cache: Cache) -> None:
    assert all(isinstance(layer.keys, PackedTensor) for layer in cache.layers)
    assert all(isinstance(layer.values, PackedTensor) for layer in cache.layers)


def prefill(model: Model, inputs: dict[str, Tensor]) -> Cache:
    with torch.no_grad():
        return model(**inputs, use_cache=True).past_key_values


def extend(model: Model, cache: Cache, ids: Tensor) -> Tensor:
    """Logits `[B, n, V]` of `ids`, appended to the cache."""
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


# ---- ways of decoding --------------------------------------------------------------------------------------


def test_beam_search(dense: Model, packed: Model) -> None:
    settings = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0}
    expected, actual = (generate(model, llava_inputs(2, 3), **settings) for model in (dense, packed))
    assert_same(actual, expected)
    assert len(actual.sequences.unique(dim=0)) == 8


def test_prompt_lookup(dense: Model, packed: Model, without_inductor: None) -> None:
    inputs = llava_inputs()
    # A prompt that ends as it began, so that the lookup finds candidates.
    ids = inputs["input_ids"]
    ids = torch.cat([ids, text(6), text(6)[:, :4]], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(dense, inputs)
    looked_up = generate(dense, inputs, prompt_lookup_num_tokens=4)
    actual = generate(packed, inputs, prompt_lookup_num_tokens=4)
    assert torch.equal(looked_up.sequences, expected.sequences)
    assert_same(actual, expected)


def test_sampled_sequences(dense: Model, packed: Model, without_inductor: None) -> None:
    results = []
    for model in (dense, packed):
        torch.manual_seed(3)
        results.append(generate(model, llava_inputs(), do_sample=True, num_return_sequences=3))
    expected, actual = results
    assert_same(actual, expected)
    assert len(actual.sequences.unique(dim=0)) == 3


# ---- one cache, several uses -------------------------------------------------------------------------------


def test_crop_then_continue(dense: Model, packed: Model) -> None:
    logits = []
    for model in (dense, packed):
        cache = prefill(model, llava_inputs())
        wrong = extend(model, cache, text(5, seed=1))
        cache.crop(-3)
        short = extend(model, cache, text(1, seed=2))
        # Below the end of the prompt, into tokens that are packed.
        cache.crop(-6)
        logits.append([wrong, short, extend(model, cache, text(4, seed=3))])
    for expected, actual in zip(*logits, strict=True):
        assert_close(actual, expected)
    assert_packed(cache)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [True, False], ids=["deepcopy", "shared"])
def test_one_cache_continued_two_ways(dense: Model, packed: Model, copied: bool) -> None:
    def fork(cache: Cache) -> Cache:
        if copied:
            return copy.deepcopy(cache)
        # Another cache that holds the very same tensors.
        return Cache([(layer.keys, layer.values) for layer in cache.layers])

    logits = []
    for model in (dense, packed):
        first = prefill(model, llava_inputs())
        extend(model, first, text(2, seed=0))
        second = fork(first)
        steps = []
        for step in range(4):
            steps.append(extend(model, first, text(1, seed=10 + step)))
            steps.append(extend(model, second, text(1, seed=20 + step)))
        logits.append(torch.stack(steps))
    expected, actual = logits
    assert_close(actual, expected)
    assert_packed(first)
    assert_packed(second)


def test_the_same_past_twice(dense: Model, packed: Model, without_inductor: None) -> None:
    """Hand-made steps, each from the same packed past: earlier calls leave no trace in it."""
    logits = []
    for model in (dense, packed):
        past = [(layer.keys, layer.values) for layer in prefill(model, llava_inputs()).layers]
        appended = (text(1), text(3), text(1, seed=8), text(1))
        logits.append([extend(model, Cache(past), ids) for ids in appended])
    for expected, actual in zip(*logits, strict=True):
        assert_close(actual, expected)
    assert torch.equal(logits[1][0], logits[1][3])


def test_second_turn(dense: Model, packed: Model, without_inductor: None) -> None:
    inputs = llava_inputs()
    expected, actual = (generate(model, inputs, tokens=6) for model in (dense, packed))
    assert_same(actual, expected)
    question = torch.cat([expected.sequences, text(9)], dim=1)
    followed = []
    for model, first in ((dense, expected), (packed, actual)):
        turn = {"input_ids": question, "attention_mask": torch.ones_like(question)}
        followed.append(generate(model, turn, tokens=6, past_key_values=first.past_key_values))
    assert_same(followed[1], followed[0])


# transformers wraps every forward in one function, so all its frames share one code object's recompile limit.
@torch._dynamo.config.patch(recompile_limit=64)
def test_batch_changed_between_calls(dense: Model, packed: Model, without_inductor: None) -> None:
    for batch, left_padding in ((2, 3), (1, 0), (3, 2), (2, 0)):
        inputs = llava_inputs(batch, left_padding)
        assert_same(generate(packed, inputs, tokens=4), generate(dense, inputs, tokens=4))


@torch._dynamo.config.patch(recompile_limit=1)
def test_past_the_recompile_limit_answers_stay_right(dense: Model, packed: Model, without_inductor: None) -> None:
    """Frames that Dynamo no longer compiles run eagerly, on whatever cache the compiled ones made."""
    for batch in (1, 2):
        expected, actual = (generate(model, llava_inputs(batch), tokens=4) for model in (dense, packed))
        assert torch.equal(actual.sequences, expected.sequences)
        assert_close(torch.stack(actual.logits), torch.stack(expected.logits))


def test_an_uncompiled_model_continues_a_packed_cache(dense: Model, packed: Model, without_inductor: None) -> None:
    logits = []
    for model in (dense, packed):
        cache = prefill(model, llava_inputs(2, 3))
        logits.append([extend(dense, cache, text(length, batch=2)) for length in (1, 3)])
    for expected, actual in zip(*logits, strict=True):
        assert_close(actual, expected)
    assert_packed(cache)


def test_samples_dropped_and_repeated_between_steps(dense: Model, packed: Model) -> None:
    logits = []
    for model in (dense, packed):
        cache = prefill(model, llava_inputs(3))
        steps = [extend(model, cache, text(1, batch=3))]
        cache.batch_select_indices(torch.tensor([2, 0]))
        steps.append(extend(model, cache, text(1, batch=2)))
        cache.batch_repeat_interleave(2)
        steps.append(extend(model, cache, text(1, batch=4)))
        cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
        steps.append(extend(model, cache, text(2, batch=4)))
        logits.append(steps)
    for expected, actual in zip(*logits, strict=True):
        assert_close(actual, expected)
    assert_packed(cache)


# ---- graphs ------------------------------------------------------------------------------------------------


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class GraphCount(transformers.StoppingCriteria):
    """Stops nothing; notes after each step how many graphs exist."""

    def __init__(self) -> None:
        self.history: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.history.append(graphs())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def graphs_by_step(model: Model, inputs: dict[str, Tensor], tokens: int) -> list[int]:
    """Graphs made since the start of this call, after the prefill and after each decode step."""
    before, count = graphs(), GraphCount()
    generate(model, inputs, tokens=tokens, stopping_criteria=transformers.StoppingCriteriaList([count]))
    return [made - before for made in count.history]


@pytest.mark.parametrize(("name", "rank"), [("llava-gqa", 4)])
def test_graphs_stop_growing(name: str, rank: int | str) -> None:
    def prompt(more: int) -> dict[str, Tensor]:
        inputs = ZOO[name].inputs(1, 0)
        ids = torch.cat([inputs["input_ids"], text(more)], dim=1)
        return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    counters.clear()
    model = compiled(name, vision_rank=rank, text_rank=rank)
    first, *decode = graphs_by_step(model, prompt(0), 301)
    assert decode[-1] - first <= 2
    assert decode[2] == decode[-1]
    second, *decode = graphs_by_step(model, prompt(9), 20)
    assert decode[-1] == second
    third, *decode = graphs_by_step(model, prompt(4), 20)
    assert (third, decode[-1]) == (0, 0)

    # How many pieces a prefill falls into is transformers' own doing. Dynamo counts them for any backend.
    torch._dynamo.reset()
    counters.clear()
    plain = ZOO[name].build("sdpa")
    plain.compile(backend="eager")
    plain_first = graphs_by_step(plain, prompt(0), 6)[0]
    plain_second = graphs_by_step(plain, prompt(9), 6)[0]
    assert first == plain_first
    assert second <= max(1, plain_second)


# ---- models side by side -----------------------------------------------------------------------------------


def test_two_policies_for_one_class(dense: Model, without_inductor: None) -> None:
    inputs = llava_inputs()
    full, low = compiled("llava-gqa"), compiled("llava-gqa", vision_rank=(6, 4), text_rank=None)
    expected = generate(dense, inputs, tokens=4)
    for _ in range(2):
        coarse = generate(low, inputs, tokens=4)
        assert_same(generate(full, inputs, tokens=4), expected)
        for layer in coarse.past_key_values.layers:
            assert (layer.keys.ranks, layer.values.ranks) == ({"vision": 6}, {"vision": 4})
        difference = (torch.stack(coarse.logits) - torch.stack(expected.logits)).abs().max()
        assert difference > 10 * TOLERANCE * torch.stack(expected.logits).abs().max()


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_two_threads_with_two_models(warm: bool) -> None:
    names = ["llama", "qwen3"]
    prompts = {name: [{"input_ids": text(12 + 3 * turn, seed=turn)} for turn in range(3)] for name in names}
    plain = {name: ZOO[name].build("sdpa") for name in names}
    expected = {name: [generate(plain[name], turn, tokens=12) for turn in prompts[name]] for name in names}
    models = {name: compiled(name) for name in names}
    if warm:
        for name in names:
            generate(models[name], prompts[name][1], tokens=4)
            generate(models[name], prompts[name][2], tokens=4)

    actual: dict[str, list[Any]] = {}
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(names))

    def work(name: str) -> None:
        try:
            barrier.wait()
            actual[name] = [generate(models[name], turn, tokens=12) for turn in prompts[name]]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for name in names:
        for one, other in zip(actual[name], expected[name], strict=True):
            assert_same(one, other)


# ---- plain calls -------------------------------------------------------------------------------------------


def test_with_gradients_enabled(dense: Model, packed: Model) -> None:
    inputs, results = llava_inputs(), []
    for model in (dense, packed):
        model.train()
        out = model(**inputs, use_cache=True)
        out.logits.float().pow(2).mean().backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        step = model(input_ids=text(1), past_key_values=out.past_key_values, use_cache=True).logits
        results.append((out.logits.detach(), step.detach(), gradients))
        model.zero_grad()
        model.eval()
    (expected, expected_step, expected_gradients), (actual, actual_step, gradients) = results
    assert_close(actual, expected)
    assert_close(actual_step, expected_step)
    assert gradients.keys() >= expected_gradients.keys()
    for name, gradient in gradients.items():
        # Compiled, parameters that do not reach the loss get zeros where eager leaves None.
        wanted = expected_gradients.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-6, msg=name)
    assert_packed(out.past_key_values)


def test_without_cache(dense: Model, packed: Model, without_inductor: None) -> None:
    inputs = llava_inputs()
    with torch.no_grad():
        expected, actual = (model(**inputs, use_cache=False) for model in (dense, packed))
    assert actual.past_key_values is None
    assert_close(actual.logits, expected.logits)


class HandWritten(nn.Module):
    """Two attention layers over a list of key/value pairs grown with `torch.cat`; no transformers in it."""

    def __init__(self, reads_past: bool = False) -> None:
        super().__init__()
        self.heads, self.dim, self.reads_past = 4, 8, reads_past
        width = self.heads * self.dim
        self.embedding = nn.Embedding(100, width)
        self.projections = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 100)

    def forward(
        self, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        batch, new = ids.shape
        hidden, kept = self.embedding(ids), []
        for number, (projection, output) in enumerate(zip(self.projections, self.outputs, strict=True)):
            shaped = projection(hidden).view(batch, new, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
            query, key, value = shaped.unbind(0)
            if past is not None:
                if self.reads_past:
                    query = query + past[number][0].mean(dim=2, keepdim=True)
                key = torch.cat([past[number][0], key], dim=2)
                value = torch.cat([past[number][1], value], dim=2)
            kept.append((key, value))
            total = key.shape[2]
            mask = torch.arange(total)[None, :] <= torch.arange(total - new, total)[:, None]
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            hidden = hidden + output(attended.transpose(1, 2).reshape(batch, new, -1))
        return self.head(hidden), kept


@pytest.mark.parametrize("reads_past", [False, True], ids=["cat only", "reads its past too"])
def test_hand_written_cache(reads_past: bool) -> None:
    torch.manual_seed(0)
    model = HandWritten(reads_past).eval()
    packed: Callable[..., Any] = torch.compile(model, backend="attnpack", options=LOSSLESS)
    chunks = [text(length, batch=2, seed=length) % 100 for length in (11, 1, 1, 5, 1)]
    past_dense, past_packed = None, None
    with torch.no_grad():
        for ids in chunks:
            expected, past_dense = model(ids, past_dense)
            actual, past_packed = packed(ids, past_packed)
            assert_close(actual, expected)
    assert past_packed is not None and past_dense is not None
    for (key, value), (dense_key, dense_value) in zip(past_packed, past_dense, strict=True):
        assert isinstance(key, PackedTensor) and isinstance(value, PackedTensor)
        assert_close(key.dense(), dense_key)
        assert_close(value.dense(), dense_value)
