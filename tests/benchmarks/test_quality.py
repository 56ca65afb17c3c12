"""The comparison of methods at its smallest: what it writes, how it continues, and what its numbers mean."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from attnpack_fx import H2O, LayerPlan, PackPolicy, Quantize
from benchmarks.graphs import compiled, op_by_op
from benchmarks.quality import agreement, command, methods, score
from benchmarks.quality.answering import answers
from benchmarks.quality.contexts import FIRST, LONG, LONG_TOKENS, TASKS, contexts, prompts
from benchmarks.quality.spectra import spectra
from benchmarks.trained import MODELS, load_trained

IMAGES = 3


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    return load_trained(request.param, "float32")


@pytest.fixture(scope="module")
def asked(loaded):
    """Two contexts and what the dense model says of them."""
    (batch,) = contexts(loaded, IMAGES, 2, 2, 0)
    return batch, answers(loaded.model, loaded.model, batch)


@pytest.fixture
def two_candidates(monkeypatch):
    def candidates():
        for rank in (4, 16):
            policy = PackPolicy(vision_rank=rank, key_space="unrotated")
            yield methods.Candidate("g", f"rank {rank}", None, lambda study, policy=policy: policy, True)
        yield methods.Candidate("g", "none", 32, lambda study: PackPolicy(vision_rank=study.shape.rank(32)), True)

    monkeypatch.setattr(methods, "candidates", candidates)


@pytest.mark.slow
def test_rows_are_written_and_kept(tmp_path, two_candidates, capsys):
    arguments = ["--out", str(tmp_path), "--quick", "--model", "digits-llava", "--contexts", "2", "--batch", "2"]
    arguments += ["--images", str(IMAGES)]
    command.main(arguments)
    path = tmp_path / "quality-digits-llava.json"
    first = json.loads(path.read_text())
    assert {"versions", "cpu", "commit", "seed", "dtype", "contexts", "images", "architecture"} <= first.keys()
    assert first["dense"]["tasks"]["read"]["accuracy"] > 0.8 and first["dense"]["contexts"] == 2
    low, high, none = first["rows"]
    assert PackPolicy.from_dict(high["policy"]).vision_rank == 16 and high["prompt_ratio"] < low["prompt_ratio"]
    assert low["kl"] > high["kl"] >= 0
    assert "leave no room" in none["skipped"] and none["target"] == 32
    for row in (low, high):
        assert row["tasks"].keys() == set(TASKS)
        mean = np.mean([row["tasks"][task]["accuracy"] for task in TASKS])
        assert row["accuracy"] == pytest.approx(mean)
        assert row["difference"] == pytest.approx(row["accuracy"] - first["dense"]["accuracy"])
        assert row["difference_interval"][0] <= row["difference"] <= row["difference_interval"][1]
    # 75 tokens of text and vision; factors of rank 16 beside dense text.
    assert {(row["layer"], row["kind"]) for row in first["spectra"]} == {
        (layer, kind) for layer in range(4) for kind in ("keys, rotated", "keys, un-rotated", "values")
    }
    capsys.readouterr()
    command.main(arguments)
    assert json.loads(path.read_text())["rows"] == first["rows"] and "rank 16" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give another --out"):
        command.main([*arguments, "--dtype", "float32"])


@pytest.mark.slow
def test_lossless_policies_answer_as_the_dense_cache_does(loaded, asked):
    batch, dense = asked
    with op_by_op():
        for policy in (
            PackPolicy(vision_rank="full", key_space="unrotated"),
            PackPolicy(vision_rank=None, passes=(H2O(budget=1.0),)),
        ):
            own = answers(loaded.model, compiled(loaded.model, policy), batch, dense)
            for task in TASKS:
                assert torch.equal(own.tokens[task], dense.tokens[task])
                assert score.divergence(dense.logits[task], own.logits[task]).max() < 1e-6


@pytest.mark.slow
def test_every_later_question_starts_from_the_same_cache(loaded, asked, monkeypatch):
    """Without the questions before it, a question gets the same answer: none of them has left anything behind."""
    batch, dense = asked
    policy = PackPolicy(vision_rank=16, passes=(H2O(budget=0.8), Quantize(bits=4)))
    step = compiled(loaded.model, policy)
    with op_by_op():
        own = answers(loaded.model, step, batch, dense)
        monkeypatch.setattr("benchmarks.quality.answering.LATER", ("needle",))
        alone = answers(loaded.model, step, batch, dense)
    torch.testing.assert_close(alone.logits["needle"], own.logits["needle"])
    torch.testing.assert_close(alone.logits[LONG], own.logits[LONG])
    assert 2 * own.prompt_bytes < dense.prompt_bytes < dense.long_bytes


def test_contexts_do_not_depend_on_how_many_there_are(loaded):
    one = contexts(loaded, IMAGES, 1, 1, 5)
    three = contexts(loaded, IMAGES, 3, 1, 5)
    for task in TASKS:
        assert torch.equal(one[0].turns[task].answer, three[0].turns[task].answer)
    torch.testing.assert_close(one[0].inputs["inputs_embeds"], three[0].inputs["inputs_embeds"])
    assert one[0].turns[LONG].answer.shape == (1, LONG_TOKENS) and one[0].turns[FIRST].question.shape == (1, 0)
    with pytest.raises(ValueError, match="expected a multiple"):
        contexts(loaded, IMAGES, 3, 2, 0)
    with pytest.raises(ValueError, match="at least 2"):
        contexts(loaded, 1, 1, 1, 0)


def test_embeddings_are_what_the_model_makes_of_the_prompt(loaded):
    """The way around the vision tower ends where the processor and `forward` do."""
    prompt = prompts(loaded, IMAGES, 1, 5)[0]
    (batch,) = contexts(loaded, IMAGES, 1, 1, 5, split="train")
    prompt.pop("attention_mask", None)
    with torch.no_grad():
        expected = loaded.model(**prompt).logits[:, -1]
        actual = loaded.model(**batch.inputs).logits[:, -1]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_spectra_are_singular_values(loaded, asked):
    batch, _ = asked
    with op_by_op():
        rows = spectra(loaded.model, batch)
    seen = []
    layer = loaded.model.model.language_model.layers[1].self_attn
    hook = layer.v_proj.register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.no_grad():
        loaded.model(**batch.inputs)
    hook.remove()
    values = torch.linalg.svdvals(seen[0][batch.vision].view(2, -1, seen[0].shape[2]))
    expected = (values / values[:, :1]).mean(0)
    (row,) = [row for row in rows if row["layer"] == 1 and row["kind"] == "values"]
    torch.testing.assert_close(torch.tensor(row["energy"]), expected[: len(row["energy"])], atol=1e-3, rtol=0)
    ranks = sorted(map(int, row["error"]))
    assert all(row["error"][str(one)] >= row["error"][str(two)] for one, two in itertools.pairwise(ranks))


@given(
    layers=st.integers(1, 8),
    width=st.integers(32, 256),
    vision=st.integers(64, 2048),
    text=st.integers(1, 64),
    target=st.floats(1.5, 64),
    bits=st.sampled_from((4, 8, 16)),
)
def test_a_rank_by_bytes_stays_within_them(layers, width, vision, text, target, bits):
    shape = methods.Shape(layers, width, vision, text)
    dense = 16 * shape.tokens * width
    try:
        rank = shape.rank(target, bits)
    except methods.UnreachableError:
        assert (vision + width) * bits + text * width * 16 > dense / target
        return

    def held(rank):
        return (vision + width) * bits * rank + text * width * 16

    assert 1 <= rank <= width and held(rank) <= dense / target * (1 + 1e-9)
    assert rank == width or held(rank + 1) > dense / target * (1 - 1e-9)


def test_every_candidate_makes_a_policy_or_says_why_not(monkeypatch):
    monkeypatch.setattr(
        methods.attnpack_fx, "calibrate", lambda model, samples, **given: PackPolicy(vision_rank=given["text"] + 1)
    )
    study = methods.Study(None, methods.Shape(4, 256, 1024, 55), list, lambda space: 0.01)
    seen, made = set(), 0
    for each in methods.candidates():
        assert (each.group, each.name, each.target) not in seen
        seen.add((each.group, each.name, each.target))
        try:
            assert isinstance(each.make(study), PackPolicy)
            made += 1
        except methods.UnreachableError as error:
            assert each.target is not None and "1/" in str(error)
    assert made > 80
    quick = {each.group for each in methods.candidates() if each.quick}
    assert {"ours, calibrated", "AttentionPack, as released", "eviction"} <= quick


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_rouge_l_is_the_longest_common_subsequence(one, two):
    def longest(left, right):
        if not left or not right:
            return 0
        if left[0] == right[0]:
            return 1 + longest(left[1:], right[1:])
        return max(longest(left[1:], right), longest(left, right[1:]))

    common = longest(tuple(one), tuple(two))
    expected = 0.0
    if common:
        precision, recall = common / len(one), common / len(two)
        expected = 2 * precision * recall / (precision + recall)
    assert score.rouge_l(one, two) == pytest.approx(expected)


def test_divergence_and_interval():
    tokens, reference = torch.tensor([[1, 2, 3], [1, 5, 4], [7, 2, 3]]), torch.tensor([[1, 2, 3]] * 3)
    assert score.first_difference(tokens, reference).tolist() == [0, 2, 1]
    left = torch.tensor([[[0.0, 0.0]]])
    right = torch.tensor([[[0.0, math.log(3)]]])
    assert score.divergence(left, right).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert score.interval(np.full(10, 0.25), 0) == (0.25, 0.25)
    low, high = score.interval(np.array([0.0, 1.0] * 200), 0)
    # Two standard errors of a fair coin tossed 400 times.
    assert low == pytest.approx(0.45, abs=0.01) and high == pytest.approx(0.55, abs=0.01)


def test_a_batch_that_does_not_divide_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--contexts", "33", "--batch", "2"])
    assert "expected a multiple" in capsys.readouterr().err


def _measured(name, difference, low, high):
    return {"group": "g", "name": name, "target": 16, "difference": difference, "difference_interval": [low, high]}


def test_rows_agree_where_either_lies_in_the_other_s_interval():
    earlier = [_measured("same", -0.02, -0.03, -0.01), _measured("worse", -0.02, -0.03, -0.01)]
    earlier += [_measured("exact", 0.0, 0.0, 0.0), _measured("gone", 0.0, 0.0, 0.0)]
    rows = [_measured("same", -0.035, -0.06, 0.0), _measured("worse", -0.06, -0.08, -0.04)]
    rows += [_measured("exact", 0.00005, 0.00005, 0.00005), _measured("new", 0.0, 0.0, 0.0)]
    said = agreement.compared(rows, [*earlier, {"group": "g", "name": "new", "target": 16, "skipped": "why"}])
    assert "3.50" in said and said.count("DIFFERENT") == 1 and "g: worse, 1/16" in said
    assert said.endswith("2 of 3 rows within the intervals") and "gone" not in said and "new" not in said


@pytest.mark.parametrize(("turned", "more", "expected"), [(True, True, 1), (False, False, 2), (False, True, 1)])
def test_a_plan_without_angles_gets_their_bytes(monkeypatch, turned, more, expected):
    plan = {True: LayerPlan(None, None, "unrotated"), False: LayerPlan(None, None, "rotated")}
    asked = []

    def calibrate(model, samples, budget, **given):
        asked.append(budget)
        return PackPolicy(layers=(plan[turned if len(asked) == 1 else more],))

    monkeypatch.setattr(methods.attnpack_fx, "calibrate", calibrate)
    beside = {"unrotated": 0.01, "rotated": 0.002}
    found = methods.Study(None, methods.Shape(1, 64, 64, 4), list, beside.__getitem__).calibrated(16)
    assert asked == pytest.approx([0.998 / 16 - 0.01, 0.998 / 16 - 0.002][: 1 + (not turned)])
    assert found.layers == (plan[turned if expected == 1 else more],)
