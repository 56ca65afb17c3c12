"""Exported decode steps side by side: what is counted is what their inputs take."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import exported

LAYERS, HEADS, DIM, TOKENS = 1, 2, 16, 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Artefacts of tiny contenders, which stand in for the real ones as long as these tests run."""
    tiny = {"hidden_size": HEADS * DIM, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    dense = exported.CONTENDERS["dense"].policy
    policies = {"dense, past copied": dense, "dense": dense, "packed": exported.PackPolicy(text_rank=4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "CONFIG", {**exported.CONFIG, **tiny, **heads})
        patch.setattr(
            exported,
            "CONTENDERS",
            {name: exported.Contender(policy, grows="copied" in name) for name, policy in policies.items()},
        )
        yield exported.exported(tmp_path_factory.mktemp("exported"))


@pytest.mark.slow
def test_a_policy_is_exported_once(folders):
    assert folders["dense"] == folders["dense, past copied"] != folders["packed"]


@pytest.mark.slow
def test_steps_and_their_caches(folders):
    rows = 2 * 4 * LAYERS * HEADS * DIM  # bytes of a token's keys and values
    caches = {}
    for name, folder in folders.items():
        step, caches[name] = exported.step_of(folder, exported.CONTENDERS[name].grows, TOKENS, 1)
        assert step()["present.0.key"].shape[2] == exported.PAST + 1 + (
            TOKENS if exported.CONTENDERS[name].grows else 0
        )
    masks = 8 * (TOKENS + 1)  # and the offset
    assert rows * (TOKENS + exported.PAST) <= caches["dense"] <= rows * (TOKENS + exported.PAST) + masks
    factors = 2 * 4 * LAYERS * 4 * (TOKENS + HEADS * DIM)
    assert caches["packed"] <= factors + rows * exported.PAST + 2 * masks


@pytest.mark.slow
def test_memory_is_that_of_a_process(folders):
    memory = exported.report_memory(folders["packed"], False, TOKENS, 1)
    assert memory["peak_bytes"] >= memory["resident_bytes"]
    found = exported.timed({"packed": folders["packed"], "dense": folders["dense"]}, TOKENS, 1, rounds=1)
    assert set(found) == {"packed", "dense"} and found["dense"]["times_dense"] == 1
    assert "packed" in exported.table(TOKENS, found)
