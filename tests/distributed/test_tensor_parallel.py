"""Two processes that share the heads of every layer, by transformers' own plan: each packs its heads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnpack_fx
from attnpack_fx import H2O, PackPolicy, PolicyError, Quantize
from attnpack_fx.passes.storage import Columns, LayerPlan, Stored
from tests.distributed.ranks import generated
from tests.zoo import ZOO

LOSSLESS = PackPolicy(vision_rank="full", text_rank="full", strict=True)
_PLAN = LayerPlan(Stored(Columns(((12, 0),)), Columns(((9, 8),))), None, "unrotated")
#: By family: policies, through Inductor. A rank of 40 is more than the heads of one process have.
POLICIES = {
    "llava-mha": {
        "lossless": LOSSLESS,
        "rank": PackPolicy(vision_rank=40, passes=(H2O(0.6), Quantize(4))),
        "plan": PackPolicy(layers=(_PLAN, _PLAN)),
    },
    "qwen2.5-vl": {
        "lossless": LOSSLESS,
        "folds": PackPolicy(vision_rank=8, text_rank=8, fold_every=4, recent=2),
    },
    "qwen3-vl": {"rank": PackPolicy(vision_rank=8)},
}
#: transformers has no plan for it: every process has all heads, and ranks are whole.
WHOLE = {"qwen3-vl"}


@pytest.mark.slow
@pytest.mark.parametrize("family", POLICIES)
def test_two_processes(family, tmp_path):
    policies = POLICIES[family]
    model, inputs = ZOO[family].build("sdpa"), ZOO[family].inputs(2, 3)
    model.save_pretrained(tmp_path)
    dense = generated(model, inputs)
    (tmp_path / "policies.json").write_text(json.dumps({name: each.to_dict() for name, each in policies.items()}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("ranks.py"))
    command = [*torchrun, script, family, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=_environment(root))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    check_explained(family, *(each["explained"] for each in ranks))
    for name, policy in policies.items():
        torch._dynamo.reset()
        alone = generated(attnpack_fx.compile(ZOO[family].build("sdpa"), policy=policy), inputs)
        first, second = (each[name] for each in ranks)
        assert first["tokens"] == second["tokens"]
        assert first["packed"] and first["finite"]
        assert first["bytes"] == pytest.approx(second["bytes"], rel=0.1)
        if family in WHOLE:
            assert first == alone
            continue
        assert 2 * first["heads"] == alone["heads"]
        # Index, angles, and what is known of slots are not of heads.
        assert first["bytes"] < 0.75 * alone["bytes"]
        # Where there are fewer tokens than ranks, both have as many; alone, a plan may not pay in a layer.
        parts = 1 if name in ("lossless", "rank") else 2
        for mine, whole in zip(first["ranks"], alone["ranks"], strict=True):
            assert all(rank <= -(-whole.get(modality, 12) // parts) for modality, rank in mine.items())
        if policy == LOSSLESS:
            assert first["tokens"] == dense["tokens"]


def check_explained(family: str, first: dict, second: dict) -> None:
    for name in ("bytes_before", "bytes_after"):
        together = first[name] if family in WHOLE else first[name] + second[name]
        assert first[f"{name}_in_all"] == second[f"{name}_in_all"] == together
    assert ("cache, in all 2 processes: " in first["text"]) == (first["processes"] == 2) == (family not in WHOLE)


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def test_ranks_mean_the_whole_layer():
    plan = PackPolicy(vision_rank=(40, 7), text_rank="full", processes=2).layer(0, 2, 32, 32)
    assert (plan.vision.key.rank, plan.vision.value.rank, plan.text.key.rank) == (20, 4, 32)
    with pytest.raises(PolicyError, match="vision_rank=65 exceeds H \\* D = 64"):
        PackPolicy(vision_rank=65, processes=2).layer(0, 2, 32, 32)
    calibrated = PackPolicy(layers=(_PLAN, _PLAN), processes=2).layer(1, 2, 32, 32)
    assert calibrated.vision.value.blocks == ((5, 8),)


def test_a_file_says_nothing_of_processes(tmp_path):
    PackPolicy(processes=4).save(tmp_path / "policy.json")
    assert PackPolicy.load(tmp_path / "policy.json").processes == 1


def test_bases_of_all_heads_are_refused(tmp_path):
    with pytest.raises(PolicyError, match="one of all heads"):
        PackPolicy(bases="bases.safetensors", processes=2)


def test_a_model_that_nobody_shares_is_whole(without_inductor):
    class Told(type(ZOO["llava-gqa"].build("sdpa"))):
        tp_size = 2

    model = ZOO["llava-gqa"].build("sdpa")
    model.__class__ = Told
    assert attnpack_fx.compile(model)._compiled_call_impl.policy.processes == 1
    assert attnpack_fx.compile(model, processes=2)._compiled_call_impl.policy.processes == 2
    with pytest.raises(PolicyError, match="processes"):
        attnpack_fx.compile(model, processes=0)
