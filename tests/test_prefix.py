"""A prompt read once, continued many times, kept in a file."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import attnpack_fx
from attnpack_fx import H2O, KIVI, PackedTensor, PackPolicy, Quantize, cache_bytes, hf
from tests.live_storages import live_storages
from tests.zoo import IMAGE, ZOO

LOSSLESS = PackPolicy(vision_rank="full", text_rank="full")
POLICIES = {
    "truncated": PackPolicy(vision_rank=4),
    "folds": PackPolicy(vision_rank=4, text_rank=4, fold_every=4, recent=2),
    "4 bits": PackPolicy(vision_rank=4, passes=(Quantize(4),)),
    "KIVI": PackPolicy(vision_rank=None, passes=(KIVI(4, group=4, residual=4),)),
    "H2O": PackPolicy(vision_rank=4, passes=(H2O(0.6, every=2),)),
}


def compiled(family: str, policy: PackPolicy):
    torch._dynamo.reset()
    return attnpack_fx.compile(ZOO[family].build("sdpa"), policy=policy)


def questions(count: int, batch: int = 1) -> list[torch.Tensor]:
    return list(torch.randint(10, 300, (count, batch, 5), generator=torch.Generator().manual_seed(0)))


def answered(model, inputs, tokens: int = 6):
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **settings)


def with_question(inputs, question):
    """The prompt and the question in one."""
    behind = {"input_ids": question, "attention_mask": torch.ones_like(question)}
    return {
        name: torch.cat([each, behind.get(name, torch.zeros_like(question))], 1)
        if each.shape == inputs["input_ids"].shape
        else each
        for name, each in inputs.items()
    }


def check_against_eager(family: str) -> None:
    model, eager = compiled(family, LOSSLESS), ZOO[family].build("sdpa")
    inputs = ZOO[family].inputs(1, 0)
    kept = attnpack_fx.prefix(model, **inputs)
    for question in questions(3):
        expected, actual = answered(eager, with_question(inputs, question)), answered(model, kept.inputs(question))
        assert torch.equal(actual.sequences, expected.sequences)
        expected, actual = torch.stack(expected.logits), torch.stack(actual.logits)
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "family",
    ["llava-gqa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2.5-vl", "internvl"))],
)
def test_answers_are_those_of_the_whole_prompt(family, without_inductor):
    check_against_eager(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3-vl", "gemma3"])
def test_answers_are_those_of_the_whole_prompt_through_inductor(family):
    check_against_eager(family)


def check_forks(policy: PackPolicy, count: int) -> None:
    """Forks in turn, each against a prefix that was read for it alone."""
    model, inputs = compiled("qwen2.5-vl", policy), ZOO["qwen2.5-vl"].inputs(2, 3)
    kept = attnpack_fx.prefix(model, **inputs)
    before = kept.nbytes
    forks = []
    for question in questions(count, 2):
        fork = answered(model, kept.inputs(question), 10)
        alone = answered(model, attnpack_fx.prefix(model, **inputs).inputs(question), 10)
        assert torch.equal(fork.sequences, alone.sequences)
        assert torch.equal(torch.stack(fork.logits), torch.stack(alone.logits))
        forks.append(hf.cache_of(fork))
    together = [kept.cache, *forks]
    assert kept.nbytes == before
    shared = sum(map(cache_bytes, together)) - cache_bytes(together)
    assert cache_bytes(together) == sum(live_storages(together).values())
    assert shared > 0 or policy == POLICIES["KIVI"]  # whose codes grow by concatenation


@pytest.mark.parametrize(
    "name", [name if name == "folds" else pytest.param(name, marks=pytest.mark.slow) for name in POLICIES]
)
def test_forks_answer_as_if_they_shared_nothing(name, without_inductor):
    check_forks(POLICIES[name], 3)


@pytest.mark.slow
def test_fifty_forks_share_what_is_packed():
    check_forks(POLICIES["truncated"], 50)


def test_packed_parts_are_shared_until_they_are_continued(without_inductor):
    model = compiled("llava-gqa", POLICIES["truncated"])
    kept = attnpack_fx.prefix(model, **ZOO["llava-gqa"].inputs(1, 0))
    forks = [kept.fork() for _ in range(50)]
    assert cache_bytes([kept.cache, *forks]) == kept.nbytes
    assert all(isinstance(layer.keys, PackedTensor) for fork in forks for layer in fork.layers)


@pytest.mark.parametrize(
    "name", ["H2O", *(pytest.param(name, marks=pytest.mark.slow) for name in ("folds", "4 bits", "KIVI"))]
)
def test_a_file_holds_what_the_prefix_holds(name, tmp_path, without_inductor):
    model, inputs = compiled("qwen2.5-vl", POLICIES[name]), ZOO["qwen2.5-vl"].inputs(2, 3)
    kept = attnpack_fx.prefix(model, **inputs)
    kept.save(tmp_path / "prefix.safetensors")
    attnpack_fx.prefix(model, **ZOO["qwen2.5-vl"].inputs(1, 0))  # the model remembers another prompt
    loaded = attnpack_fx.load_prefix(tmp_path / "prefix.safetensors", model)
    assert loaded.nbytes == sum(live_storages(loaded.cache).values()) <= kept.nbytes  # which has room to grow
    placements = [len({id(layer.keys.placement) for layer in each.cache.layers}) for each in (kept, loaded)]
    assert placements[0] == placements[1]
    (question,) = questions(1, 2)
    expected, actual = (answered(model, each.inputs(question), 10) for each in (kept, loaded))
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))


_ELSEWHERE = """
import json, sys, torch, attnpack_fx
from tests.test_prefix import POLICIES, answered, compiled, questions
model = compiled("qwen2.5-vl", POLICIES["truncated"])
kept = attnpack_fx.load_prefix(sys.argv[1], model)
json.dump([answered(model, kept.inputs(each)).sequences.tolist() for each in questions(2)], sys.stdout)
"""


@pytest.mark.slow
def test_another_process_gives_the_same_answers(tmp_path):
    model = compiled("qwen2.5-vl", POLICIES["truncated"])
    kept = attnpack_fx.prefix(model, **ZOO["qwen2.5-vl"].inputs(1, 0))
    kept.save(tmp_path / "prefix.safetensors")
    expected = [answered(model, kept.inputs(each)).sequences.tolist() for each in questions(2)]
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "prefix.safetensors")]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == expected


def test_files_of_something_else_are_refused(tmp_path, without_inductor):
    file = tmp_path / "prefix.safetensors"
    model, inputs = compiled("llava-gqa", LOSSLESS), ZOO["llava-gqa"].inputs(1, 0)
    attnpack_fx.prefix(model, **inputs).save(file)
    with pytest.raises(ValueError, match=r"another configuration .*expected that of this model"):
        attnpack_fx.load_prefix(file, compiled("llava-mha", LOSSLESS))
    with pytest.raises(ValueError, match=r"another policy \(PackPolicy.*'full'"):
        attnpack_fx.load_prefix(file, compiled("llava-gqa", POLICIES["truncated"]))
    other = compiled("llava-gqa", LOSSLESS)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    with pytest.raises(ValueError, match="another weights"):
        attnpack_fx.load_prefix(file, other)
    save_file(load_file(file), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="another kind of file"):
        attnpack_fx.load_prefix(tmp_path / "plain.safetensors", model)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        attnpack_fx.load_prefix(tmp_path / "text", model)


def test_what_cannot_be_continued_is_refused(without_inductor):
    model = compiled("llava-gqa", LOSSLESS)
    with pytest.raises(ValueError, match="input_ids: got none"):
        attnpack_fx.prefix(model)
    kept = attnpack_fx.prefix(model, **ZOO["llava-gqa"].inputs(2, 0))
    with pytest.raises(ValueError, match=r"got shape \(1, 5\), expected \[2, T\]"):
        kept.inputs(torch.ones(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one token"):
        kept.inputs(torch.ones(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="images belong in the prefix"):
        kept.inputs(torch.full((2, 5), IMAGE))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 4\)"):
        kept.inputs(torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 4))


@pytest.mark.slow
def test_questions_of_unequal_length_are_padded_between(without_inductor):
    model, inputs = compiled("llava-gqa", LOSSLESS), ZOO["llava-gqa"].inputs(2, 0)
    kept = attnpack_fx.prefix(model, **inputs)
    (question,) = questions(1, 2)
    mask = torch.ones_like(question)
    mask[0, :2] = 0
    together = answered(model, kept.inputs(question, mask))
    alone = answered(model, kept.inputs(question))
    assert torch.equal(together.sequences[1], alone.sequences[1])
    shorter = {name: each[:1] for name, each in inputs.items()}
    one = attnpack_fx.prefix(model, **shorter)
    expected = answered(model, one.inputs(question[:1, 2:]))
    assert torch.equal(together.sequences[0, -6:], expected.sequences[0, -6:])


def test_beams_and_several_answers_continue_copies(without_inductor):
    model, eager = compiled("llava-gqa", LOSSLESS), ZOO["llava-gqa"].build("sdpa")
    inputs = ZOO["llava-gqa"].inputs(2, 3)
    kept, (question,) = attnpack_fx.prefix(model, **inputs), questions(1, batch=2)
    beams = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = eager.generate(**with_question(inputs, question), **beams)
    actual = model.generate(**kept.inputs(question, copies=3), **beams)
    assert torch.equal(actual[:, -5:], expected[:, -5:])
    drawn = model.generate(**kept.inputs(question, copies=2), max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert drawn.shape[0] == 4
    with pytest.raises(ValueError, match="copies: got 0"):
        kept.inputs(question, copies=0)


def test_a_dense_prefix_is_said_to_be_one():
    with pytest.warns(attnpack_fx.AttnpackWarning, match="prefix is dense: compile the model"):
        attnpack_fx.prefix(ZOO["llava-gqa"].build("sdpa"), **ZOO["llava-gqa"].inputs(1, 0))


def test_what_is_no_argument_of_a_prefix(without_inductor, tmp_path):
    model, inputs = compiled("llava-gqa", LOSSLESS), ZOO["llava-gqa"].inputs(1, 0)
    with pytest.raises(ValueError, match=r"expected a model compiled in place, by attnpack_fx.compile"):
        attnpack_fx.prefix(torch.compile(model), **inputs)
    with pytest.raises(ValueError, match="do_sample: not of a prompt"):
        attnpack_fx.prefix(model, **inputs, do_sample=True)
    kept = attnpack_fx.prefix(model, **inputs)
    for wrong in ([[1, 2]], {"input_ids": torch.ones(1, 2)}, torch.ones(1, 2)):
        with pytest.raises(ValueError, match=r"expected token ids \[B, T\]: tokenizer"):
            kept.inputs(wrong)
    with pytest.raises(OSError, match="cannot be written"):
        kept.save(tmp_path / "missing" / "prefix")
    with pytest.raises(ValueError, match="got a folder"):
        attnpack_fx.load_prefix(tmp_path, model)
    with pytest.raises(ValueError, match="model: got PosixPath"):
        attnpack_fx.load_prefix(model, tmp_path)
    plain = ZOO["llava-gqa"].build("sdpa")
    kept.save(tmp_path / "prefix")
    with pytest.raises(ValueError, match=r"expected one that attnpack_fx.compile compiled"):
        attnpack_fx.load_prefix(tmp_path / "prefix", plain)
