"""Rows answered in one process, by actors of Ray Data, and by a command whose workers and whose driver are killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from attnpack_fx import PackPolicy, PolicyError
from attnpack_fx import ray as rows_of_ray
from attnpack_fx.plan_batch import BatchPlan
from attnpack_fx.ray import Answers
from tests.demo.models import save_text_model, trained
from tests.ray_rows import TOKENS, encoded, prompt, questions, save_rows

ROOT = Path(__file__).parents[1]


def column(asked) -> dict:
    return {"images": [encoded(each) for each in asked], "prompt": [prompt(each) for each in asked]}


def sizes_of(answers: Answers, monkeypatch: pytest.MonkeyPatch, spoilt: int | None = None) -> list[int]:
    """A list that batches add their sizes to; those with a prompt of `spoilt` tokens fail."""
    model, sizes = answers._loaded.model, []
    generate = model.generate

    def noted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if inputs["input_ids"].shape[1] == spoilt:
            raise RuntimeError("out of memory")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", noted)
    return sizes


@pytest.mark.slow
def test_equal_shapes_share_a_batch_and_a_row_that_fails_is_alone(without_inductor, monkeypatch, tmp_path):
    answers = Answers(trained(), max_new_tokens=3, batch=3)
    asked = questions()[:5]
    rows = column(asked)
    rows["images"] += [[str(tmp_path / "none.png")], rows["images"][0], rows["images"][0][:1], rows["images"][1]]
    rows["prompt"] += ["read image #1", "<image> read image #1", "read image #1", " "]
    sizes = sizes_of(answers, monkeypatch)
    found = answers({**rows, "id": np.arange(9)})
    assert sizes == [3, 2, 1] and list(found["id"]) == list(range(9)) and found["prompt"] == rows["prompt"]
    assert sum(each.answer.startswith(answer) for each, answer in zip(asked, found["answer"][:5], strict=True)) >= 4
    assert all(len(found["answer"][number].split()) == 3 for number in (0, 1, 2, 3, 4, 7))
    assert [bool(error) for error in found["error"]] == [False] * 5 + [True, True, False, True]
    assert "none.png: No such file" in found["error"][5] and "refuses this prompt" in found["error"][6]
    assert "prompt: got ' ', expected a text" in found["error"][8]
    # Alone, one is answered as in the batch.
    assert answers({name: values[1:2] for name, values in rows.items()})["answer"] == found["answer"][1:2]


def test_a_batch_that_fails_is_tried_row_by_row(without_inductor, monkeypatch):
    answers = Answers(str(trained()), policy={"vision_rank": 16}, max_new_tokens=2)
    rows = column(questions()[:3])
    generate, sizes = answers._loaded.model.generate, []

    def failing(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 1 or len(sizes) == 3:
            raise RuntimeError("out of memory")
        return generate(**inputs)

    monkeypatch.setattr(answers._loaded.model, "generate", failing)
    found = answers(rows)
    assert sizes == [3, 1, 1, 1] and found["error"] == ["", "RuntimeError: out of memory", ""]
    assert found["answer"][0] and not found["answer"][1] and found["answer"][2]


def test_a_memory_decides_about_the_batch(without_inductor, monkeypatch):
    answers = Answers(trained(), max_new_tokens=1, memory=10**9)
    planned = []

    def plan(model, policy, example, *, memory, new_tokens):
        tokens = example["input_ids"].shape[1]
        planned.append((policy, tokens, memory, new_tokens))
        return BatchPlan(0 if tokens > 300 else 2, memory, 1, 2, 3, 4, 5)

    monkeypatch.setattr(rows_of_ray, "plan_batch", plan)
    sizes = sizes_of(answers, monkeypatch)
    rows = column(questions()[:3])
    large = {"images": [rows["images"][0] * 3] * 2, "prompt": ["read image #1"] * 2}
    assert answers(large)["error"][1].startswith("memory: got 1,000,000,000 bytes, expected more than the 7 that")
    assert answers(rows)["error"] == [""] * 3 and sizes == [2, 1]
    # A smaller prompt needs no plan of its own, and the large one has none twice.
    answers({"images": [rows["images"][0][:1]], "prompt": ["read image #1"]})
    answers(large)
    assert len(planned) == 2 and all(each[0] is None and each[2:] == (10**9, 2) for each in planned)


def test_rows_of_text(without_inductor, tmp_path):
    PackPolicy(text_rank="full").save(tmp_path / "policy.json")
    answers = Answers(save_text_model(tmp_path), policy=tmp_path / "policy.json", max_new_tokens=3)
    found = answers({"prompt": np.array(["a b c", "d e f", "g"], dtype=object), "images": [[], None, [b"x"]]})
    assert [bool(each) for each in found["error"]] == [False, False, True]


def test_wrong_arguments():
    for name in ("max_new_tokens", "batch", "memory"):
        with pytest.raises(ValueError, match=f"{name}: got 0, expected a whole number from 1 on"):
            Answers("model", **{name: 0})
    with pytest.raises(ValueError, match="batch and memory: got 2 and 3, expected one of them"):
        Answers("model", batch=2, memory=3)
    with pytest.raises(PolicyError, match="did you mean 'vision_rank'"):
        Answers("model", policy={"vison_rank": 3})


def test_what_is_wrong_with_the_policy_is_no_row_s_error(without_inductor):
    answers = Answers(trained(), policy={"vision_rank": 999}, max_new_tokens=2)
    with pytest.raises(rows_of_ray.NOT_A_ROW, match="vision_rank=999 exceeds"):
        answers(column(questions()[:1]))
    with pytest.raises(ValueError, match=r"rows: got the columns \['images'\], expected prompt"):
        answers({"images": []})


class Named(Answers):
    """Says which process answered."""

    def __call__(self, rows):
        return super().__call__(rows) | {"process": [os.getpid()] * len(rows["prompt"])}


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Answers of one process, compiled."""
    found = Answers(trained(), max_new_tokens=TOKENS)(column(questions()))
    assert not any(found["error"])
    right = sum(each.answer == answer for each, answer in zip(questions(), found["answer"], strict=True))
    assert right > 0.9 * len(questions())
    return found["answer"]


@pytest.mark.slow
def test_actors_of_a_data_set_answer_as_one_process_does(expected):
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        rows = [
            {"id": number, "images": encoded(each), "prompt": prompt(each)} for number, each in enumerate(questions())
        ]
        found = (
            ray.data.from_items(rows, override_num_blocks=8)
            .map_batches(
                Named,
                fn_constructor_kwargs={"model": str(trained()), "max_new_tokens": TOKENS},
                batch_size=8,
                compute=ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1),
                num_cpus=1,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    assert {row["id"]: row["answer"] for row in found} == dict(enumerate(expected)) and len(found) == len(rows)
    assert not any(row["error"] for row in found) and len({row["process"] for row in found}) == 2


def started(source: Path, out: Path) -> subprocess.Popen:
    options = ["--workers", "2", "--batch", "4", "--max-new-tokens", str(TOKENS)]
    command = ["-m", "attnpack_cli", "batch", str(source), "--model", str(trained()), "--out", str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def lines(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def wait_for_lines(driver: subprocess.Popen, out: Path, count: int) -> None:
    while lines(out) < count:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)


def workers(driver: subprocess.Popen) -> list[psutil.Process]:
    below = psutil.Process(driver.pid).children(recursive=True)
    return [each for each in below if "".join(each.cmdline()).startswith("ray::MapWorker")]


@pytest.mark.slow
def test_killed_drivers_and_workers_lose_nothing_and_repeat_nothing(expected, tmp_path):
    broken = [
        {"id": "gone", "images": ["gone.png"], "prompt": "read image #1"},
        {"id": "refused", "images": ["0-0.png"], "prompt": "<image> read image #1"},
    ]
    source, out = save_rows(tmp_path, questions(), broken), tmp_path / "out.jsonl"
    driver = started(source, out)
    wait_for_lines(driver, out, 8)
    left = workers(driver)
    assert len(left) == 2
    driver.kill()
    driver.communicate()
    # No worker outlives its driver.
    assert not psutil.wait_procs(left, timeout=60)[1]
    before = lines(out)
    assert before < len(questions())
    with out.open("a") as file:
        file.write('{"id": 63, "answ')

    driver = started(source, out)
    wait_for_lines(driver, out, before + 4)
    killed = workers(driver)[0]
    killed.kill()
    printed, said = driver.communicate()
    assert driver.returncode == 1, said
    assert f"2 failed, {before} were there; " in printed or f"2 failed, {before - 1} were there; " in printed, printed
    assert printed.count("\n") == 1

    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == len({row["id"] for row in found}) == len(questions()) + 2
    answers = {row["id"]: row.get("answer") for row in found}
    assert [answers[number] for number in range(len(questions()))] == expected
    errors = {row["id"]: row["error"] for row in found if "error" in row}
    assert errors.keys() == {"gone", "refused"}
    assert "gone.png: No such file" in errors["gone"] and "refuses this prompt" in errors["refused"]
