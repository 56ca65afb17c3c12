import dataclasses
import json
import pickle
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx import Columns, Energy, LayerPlan, Linear, Partial, PerLayer, Stored
from attnpack_fx.policy import PackPolicy, PolicyError
from attnpack_fx.ranks import UNROTATED

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LAYERS = 3
RANKS = st.one_of(st.integers(min_value=1), st.just("full"))
SHARES = st.floats(min_value=0.01, max_value=1)
FIXED = st.one_of(
    RANKS,
    st.builds(Linear, st.integers(min_value=1), st.integers(min_value=1)),
    st.builds(PerLayer, st.lists(RANKS, min_size=LAYERS, max_size=LAYERS).map(tuple)),
)
SPECS = st.one_of(FIXED, st.builds(Energy, SHARES, st.integers(min_value=1)))
BITS = st.sampled_from([0, 2, 4, 8])


def ranks(policy, modality, key_width, value_width):
    """`(key rank, value rank)` of a modality in a layer like any other, or None."""
    plan = policy.layer(None, None, key_width, value_width)
    stored = plan.of(modality)
    return None if stored is None else (stored.key.rank, stored.value.rank)


def either(specs):
    """What a rank field holds: one spec or a pair."""
    return st.one_of(specs, st.tuples(specs, specs))


def columns(bits, energy):
    blocks = st.lists(st.tuples(st.integers(min_value=1), bits), min_size=1, max_size=3).map(tuple)
    return st.builds(Columns, st.one_of(blocks, bits.map(lambda kept: (("full", kept),))), energy)


def stored(bits, energy):
    return st.builds(Stored, columns(bits, energy), columns(bits, energy))


@st.composite
def partials(draw):
    first = draw(st.integers(min_value=1, max_value=99)) / 100
    return draw(
        st.builds(
            Partial,
            shares=st.just((first, 1 - first)),
            fractions=SHARES.map(lambda fraction: (1, fraction)),
            momentum=st.floats(min_value=0, max_value=0.99),
            keys=st.booleans(),
            regroup_every=st.integers(min_value=1),
            store=st.booleans(),
        )
    )


@st.composite
def policies(draw):
    """Any policy whose fields agree."""
    bases, folds = draw(st.sampled_from(["sample", "batch"])), draw(st.booleans())
    values = {"partial": draw(st.none() | partials())}
    if draw(st.booleans()):
        energy = st.none() if bases == "batch" else st.none() | SHARES
        text = stored(st.just(0) if folds else BITS, energy)
        plan = st.builds(LayerPlan, stored(BITS, energy), text, st.sampled_from(["rotated", "unrotated"]))
        values["layers"] = draw(st.lists(plan, min_size=LAYERS, max_size=LAYERS).map(tuple))
    else:
        specs = either(FIXED if bases == "batch" else SPECS)
        values["vision_rank"] = draw(specs if values["partial"] else st.none() | specs)
        values["text_rank"] = draw(specs if folds else st.none() | specs)
        values["skip_layers"] = draw(st.lists(st.integers(-LAYERS, LAYERS - 1), max_size=4).map(tuple))
    if folds:
        values["fold_every"] = draw(st.integers(min_value=1))
        values["max_fold_error"] = draw(st.none() | SHARES)
    return PackPolicy(
        **values,
        bases=bases,
        key_space=draw(st.sampled_from(["rotated", "unrotated", "auto"])),
        recent=draw(st.integers(min_value=0)),
        basis_tolerance=draw(st.floats(min_value=0, max_value=2)),
        layer_count=draw(st.sampled_from([None, LAYERS])),
        strict=draw(st.booleans()),
    )


SMALL = Stored(Columns(((4, 0),)), Columns(((2, 8), (3, 4))))
PLAN = LayerPlan(vision=SMALL, text=None, key_space="rotated")


def test_defaults():
    assert PackPolicy().to_dict() == {
        "vision_rank": "auto",
        "text_rank": None,
        "skip_layers": [],
        "key_space": "auto",
        "fold_every": None,
        "recent": 32,
        "max_fold_error": None,
        "partial": None,
        "bases": "sample",
        "basis_tolerance": 0.1,
        "layers": None,
        "passes": [],
        "layer_count": None,
        "processes": 1,
        "strict": False,
    }


def test_is_a_value():
    assert PackPolicy(vision_rank=[8, "full"]) == PackPolicy(vision_rank=(8, "full"))
    assert hash(PackPolicy(vision_rank=[8, "full"])) == hash(PackPolicy(vision_rank=(8, "full")))
    assert PackPolicy(vision_rank=8) != PackPolicy(vision_rank=9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PackPolicy().vision_rank = 3


@pytest.mark.parametrize("name", ["vision_rank", "text_rank"])
@pytest.mark.parametrize(
    "bad",
    [
        0,
        -1,
        True,
        False,
        1.0,
        "64",
        "Full",
        "",
        (),
        (1,),
        (1, 2, 3),
        (0, 4),
        (4, True),
        (4, "half"),
        {},
        torch.tensor(4),
    ],
    ids=repr,
)
def test_bad_rank_is_refused_with_got_and_expected(name, bad):
    with pytest.raises(ValueError, match=rf"{name}: got .*expected an int >= 1.*;"):
        PackPolicy(**{name: bad})


@pytest.mark.parametrize("pair", [(None, 4), (4, None), (None, None), ("full", None)])
def test_half_dense_pair_is_refused_with_the_reason(pair):
    with pytest.raises(ValueError, match="packed together or not at all, so use text_rank=None"):
        PackPolicy(text_rank=pair)


@pytest.mark.parametrize("bad", ["rope", None, 1, ["rotated"]])
def test_unknown_key_space(bad):
    with pytest.raises(ValueError, match=r"key_space: got .*expected one of 'rotated', 'unrotated', 'auto'"):
        PackPolicy(key_space=bad)


@pytest.mark.parametrize("bad", [1, 0, "yes", None])
def test_strict_is_a_bool(bad):
    with pytest.raises(ValueError, match=r"strict: got .*expected a bool"):
        PackPolicy(strict=bad)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip_layers": 3}, r"skip_layers: got 3, expected layer numbers; e.g. \(0, -1\)"),
        ({"skip_layers": (True,)}, r"skip_layers: got \(True,\), expected layer numbers"),
        ({"skip_layers": ("first",)}, "skip_layers: got .*expected layer numbers"),
        ({"fold_every": 0, "text_rank": 8}, "fold_every: got 0 .*expected an int >= 1; use None"),
        ({"fold_every": 1.5, "text_rank": 8}, r"fold_every: got 1.5 \(float\), expected an int >= 1"),
        ({"fold_every": True, "text_rank": 8}, "fold_every: got True"),
        ({"recent": -1}, "recent: got -1 .*expected an int >= 0"),
        ({"recent": None}, "recent: got None"),
        ({"max_fold_error": 0, "text_rank": 8, "fold_every": 8}, "max_fold_error: got 0, expected a number > 0"),
        ({"max_fold_error": float("nan"), "text_rank": 8, "fold_every": 8}, "max_fold_error: got nan"),
        ({"max_fold_error": "1%", "text_rank": 8, "fold_every": 8}, "max_fold_error: got '1%'"),
        ({"partial": True}, "partial: got True, expected a Partial, a mapping or None"),
        ({"partial": (0.25, 0.75)}, "partial: got .*expected a mapping with shares"),
        ({"partial": {"share": [1]}}, "partial: got the key 'share'.*did you mean 'shares'"),
        ({"bases": "layer"}, "bases: got 'layer', expected one of 'sample', 'batch', 'a path ending in .safetensors'"),
        ({"bases": ["sample"]}, "bases: got "),
        ({"basis_tolerance": -0.1}, "basis_tolerance: got -0.1, expected a number >= 0"),
        ({"basis_tolerance": float("inf")}, "basis_tolerance: got inf"),
        ({"layers": ()}, r"layers: got \(\), expected one LayerPlan per decoder layer"),
        ({"layers": PLAN}, "layers: got LayerPlan.*expected one LayerPlan per decoder layer"),
        ({"layer_count": 0}, "layer_count: got 0 .*expected an int >= 1"),
        ({"layer_count": 2.0}, "layer_count: got 2.0"),
    ],
)
def test_bad_field_is_refused(given, message):
    with pytest.raises(PolicyError, match=message):
        PackPolicy(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fold_every": 8}, "fold_every: got 8, expected None where text stays dense.*give text_rank"),
        ({"fold_every": 8, "layers": [PLAN]}, "fold_every: got 8, expected None where text stays dense"),
        (
            {"fold_every": 8, "layers": [PLAN, LayerPlan(None, SMALL, "rotated")]},
            r"fold_every: got 8 with quantised text in layers\[1\], expected text blocks of 0 bits.*drop fold_every",
        ),
        ({"max_fold_error": 0.1, "text_rank": 8}, "max_fold_error: got 0.1 without fold_every, expected None"),
        ({"partial": Partial(), "vision_rank": None}, "partial: .*expected None where vision tokens stay dense"),
        ({"partial": {}, "layers": [LayerPlan(None, SMALL, "rotated")]}, "partial: .*vision tokens stay dense"),
        ({"bases": "batch", "text_rank": Energy(0.9)}, "bases: got 'batch' with an energy, expected 'sample'"),
        ({"bases": "batch", "vision_rank": (8, Energy(0.9))}, "bases: got 'batch' with an energy"),
        (
            {
                "bases": "batch",
                "layers": [LayerPlan(Stored(Columns(((4, 0),)), Columns(((4, 0),), 0.9)), None, "rotated")],
            },
            "bases: got 'batch' with an energy",
        ),
        ({"layers": [PLAN], "vision_rank": 8}, "vision_rank: got 8 beside layers, expected its default, 'auto'"),
        ({"layers": [PLAN], "text_rank": 8}, "text_rank: got 8 beside layers, expected its default, None"),
        ({"layers": [PLAN], "skip_layers": (0,)}, r"skip_layers: got \(0,\) beside layers, expected its default, \(\)"),
        (
            {"vision_rank": PerLayer((8, 8)), "text_rank": (4, PerLayer((8, 8, 8)))},
            r"got 2 \(vision_rank, key\), 2 \(vision_rank, value\), 3 \(text_rank, value\), expected one number",
        ),
        ({"layers": [PLAN], "layer_count": 2}, r"got 2 \(layer_count\), 1 \(layers\), expected one number"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(PolicyError, match=message):
        PackPolicy(**given)


def test_numbers_and_forms_are_normalised_so_that_equal_policies_are_equal():
    left = PackPolicy(
        vision_rank=[{"linear": [16, 128]}, {"energy": 1, "at_most": 8}],
        skip_layers=[1, -1, 1],
        partial={"shares": [0.5, 0.5], "momentum": 0},
        basis_tolerance=1,
    )
    right = PackPolicy(
        vision_rank=(Linear(16, 128), Energy(1.0, at_most=8)),
        skip_layers=(-1, 1),
        partial=Partial(shares=(0.5, 0.5), momentum=0.0),
        basis_tolerance=1.0,
    )
    assert left == right
    assert hash(left) == hash(right)
    assert json.dumps(left.to_dict()) == json.dumps(right.to_dict())


@given(policies())
@settings(max_examples=60, deadline=None)
def test_round_trips(policy):
    plain = policy.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    for again in (
        PackPolicy.from_dict(json.loads(json.dumps(plain))),
        PackPolicy.from_options(plain)[0],
        pickle.loads(pickle.dumps(policy)),
    ):
        assert again == policy
        assert hash(again) == hash(policy)


class TestFile:
    POLICY = PackPolicy(layers=(PLAN, PLAN), partial=Partial(store=True), layer_count=2)

    def test_save_and_load(self, tmp_path):
        for path in (tmp_path / "policy.json", str(tmp_path / "named.json")):
            self.POLICY.save(path)
            assert PackPolicy.load(path) == self.POLICY

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            PackPolicy.load(tmp_path / "none.json")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"vision_rank: 64", r"policy\.json: not a JSON file \(Expecting value.*written by PackPolicy.save"),
            (b"\xff\xfe\x00", r"policy\.json: not a JSON file"),
            (b"", "not a JSON file"),
            (b"[1]", "not a policy file: expected {'version': 1, 'policy'"),
            (b'{"vision_rank": 64}', "not a policy file"),
            (b'{"version": 1}', "not a policy file"),
            (b'{"version": "1", "policy": {}}', "version: got '1'"),
            (b'{"version": 0, "policy": {}}', "version: got 0"),
            (b'{"version": 2, "policy": {}}', "version: got 2, expected at most 1.*newer release; upgrade"),
            (b'{"version": 2, "policy": {"new": 1}, "more": 1}', "version: got 2, expected at most 1"),
            (b'{"version": 1, "policy": {}, "more": 1}', "policy file: got the key 'more'"),
            (b'{"version": 1, "policy": [64]}', "policy: got list, expected a mapping"),
            (b'{"version": 1, "policy": {"rnk": 1}}', "policy.json: unknown option: got 'rnk'"),
            (b'{"version": 1, "policy": {"strict": 1}}', "policy.json: strict: got 1"),
            (b'{"version": 1, "policy": {"basis_tolerance": NaN}}', "basis_tolerance: got nan"),
        ],
    )
    def test_a_file_that_holds_no_policy(self, tmp_path, content, message):
        path = tmp_path / "policy.json"
        path.write_bytes(content)
        with pytest.raises(PolicyError, match=message):
            PackPolicy.load(path)


PLAIN = {
    "vision": {"key": {"blocks": [[4, 0]]}, "value": {"blocks": [[2, 8], [3, 4]], "energy": None}},
    "text": None,
    "key_space": "rotated",
}


def test_plans_as_mappings():
    assert PackPolicy(layers=[PLAIN]).layers == (PLAN,)
    assert PackPolicy(layers=[{**PLAIN, "vision": SMALL}]).layers == (PLAN,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vison": None}, r"layers\[1\]: got the key 'vison', expected vision, text, key_space; did you mean 'vision'"),
        ({"key_space": "auto"}, r"layers\[1\]: key_space: got 'auto', expected 'rotated' or 'unrotated'"),
        ({"vision": 64}, r"layers\[1\]\.vision: got 64 \(int\), expected a mapping with key, value"),
        ({"vision": {"key": {"blocks": [[4, 0]]}}}, r"layers\[1\]\.vision: got no 'value', expected all of key, value"),
        (
            {"text": {"key": {"blocks": [[4, 3]]}, "value": {"blocks": [[4, 0]]}}},
            r"layers\[1\]\.text\.key: blocks: got \[4, 3\]",
        ),
        ({"text": {"key": None, "value": {"blocks": [[4, 0]]}}}, r"layers\[1\]\.text: key: got None, expected Columns"),
    ],
)
def test_bad_plan_is_named_by_its_path(change, message):
    with pytest.raises(PolicyError, match=message):
        PackPolicy(layers=[PLAIN, {**PLAIN, **change}])


def uniform(rank, energy=None, value=None):
    return Stored(Columns(((rank, 0),), energy), Columns(((rank if value is None else value, 0),), energy))


class TestLayer:
    @pytest.mark.parametrize("place", [(None, None), (0, None), (3, 4)])
    def test_what_is_the_same_in_every_layer_needs_no_place(self, place):
        assert PackPolicy().layer(*place, 128, 48) == LayerPlan(uniform(UNROTATED, value=48), None, "unrotated")
        assert PackPolicy().layer(*place, 128, 48, rotary=False) == LayerPlan(uniform(64, value=48), None, "rotated")
        policy = PackPolicy(vision_rank=None, text_rank=("full", Energy(0.9, at_most=40)), key_space="rotated")
        expected = Stored(Columns(((128, 0),)), Columns(((40, 0),), 0.9))
        assert policy.layer(*place, 128, 48) == LayerPlan(None, expected, "rotated")

    def test_a_schedule(self):
        policy = PackPolicy(vision_rank=Linear(4, 8), text_rank=PerLayer((1, "full", 3)))
        plans = [policy.layer(number, 3, 32, 16) for number in range(3)]
        assert [plan.vision for plan in plans] == [uniform(4), uniform(6), uniform(8)]
        assert [plan.text for plan in plans] == [uniform(1), uniform(32, value=16), uniform(3)]

    @pytest.mark.parametrize(
        "policy",
        [
            PackPolicy(vision_rank=Linear(4, 8)),
            PackPolicy(text_rank=(4, PerLayer((4, 4)))),
            PackPolicy(skip_layers=(-1,)),
            PackPolicy(layers=(PLAN, PLAN)),
        ],
        ids=["linear", "per layer", "skip from the end", "plan"],
    )
    def test_an_unknown_place_is_an_error_where_it_matters(self, policy):
        with pytest.raises(PolicyError, match=r"graph break may hide the other layers.*pass layer_count"):
            policy.layer(1, None, 64, 64)
        with pytest.raises(PolicyError, match=r"this graph does not show which layers it has"):
            policy.layer(None, 2, 64, 64)
        stated = dataclasses.replace(policy, layer_count=2)
        assert stated.layer(1, None, 64, 64) == policy.layer(1, 2, 64, 64)
        with pytest.raises(PolicyError, match=r"layer_count: got 2, but the model has 3 decoder layers"):
            stated.layer(1, 3, 64, 64)
        with pytest.raises(PolicyError, match=r"layer 2: expected a number below 2, the number of decoder layers"):
            stated.layer(2, None, 64, 64)

    def test_skipped_layers_are_dense(self):
        policy = PackPolicy(text_rank=8, skip_layers=(0, -1))
        dense = [policy.layer(number, 4, 64, 64) == LayerPlan(None, None, "unrotated") for number in range(4)]
        assert dense == [True, False, False, True]
        assert PackPolicy(skip_layers=(1,)).layer(1, None, 64, 64).vision is None
        assert PackPolicy(skip_layers=(1,)).layer(0, None, 64, 64).vision == uniform(UNROTATED, value=64)

    @pytest.mark.parametrize("skipped", [2, -3])
    def test_a_skipped_layer_the_model_has_not(self, skipped):
        with pytest.raises(PolicyError, match=rf"skip_layers: got {skipped}, but this model has 2 .*from -2 to 1"):
            PackPolicy(skip_layers=(skipped,)).layer(0, 2, 64, 64)

    def test_a_plan(self):
        full = LayerPlan(None, Stored(Columns((("full", 4),)), Columns((("full", 0),), 0.9)), "unrotated")
        policy = PackPolicy(layers=(PLAN, full))
        assert policy.layer(0, 2, 64, 32) == PLAN
        fitted = Stored(Columns(((64, 4),)), Columns(((32, 0),), 0.9))
        assert policy.layer(1, 2, 64, 32) == LayerPlan(None, fitted, "unrotated")

    def test_a_plan_for_another_model(self):
        policy = PackPolicy(layers=(PLAN, PLAN))
        with pytest.raises(PolicyError, match="layers: got a plan for 2 decoder layers, but this model has 3"):
            policy.layer(0, 3, 64, 64)
        with pytest.raises(PolicyError, match=r"layers\[1\]\.vision\.value: rank 5 exceeds H \* D = 4.*another model"):
            policy.layer(1, 2, 4, 4)

    @pytest.mark.parametrize("key_space", ["rotated", "unrotated"])
    def test_an_explicit_key_space_wins_over_the_plan(self, key_space):
        other = LayerPlan(SMALL, None, "unrotated")
        policy = PackPolicy(layers=(PLAN, other), key_space=key_space)
        assert {policy.layer(number, 2, 64, 64).key_space for number in (0, 1)} == {key_space}
        automatic = PackPolicy(layers=(PLAN, other))
        assert [automatic.layer(number, 2, 64, 64).key_space for number in (0, 1)] == ["rotated", "unrotated"]

    @pytest.mark.parametrize("keys", [False, True])
    def test_blocks_end_where_the_columns_of_a_group_do(self, keys):
        partial = Partial(shares=(0.2, 0.3, 0.5), fractions=(1, 0.5, 0.25), keys=keys)
        plan = PackPolicy(vision_rank=10, text_rank=10, partial=partial).layer(0, 1, 64, 64)
        cut = Columns(((3, 0), (2, 0), (5, 0)))
        assert plan.vision == Stored(cut if keys else Columns(((10, 0),)), cut)
        assert plan.text == uniform(10)

    def test_a_plan_keeps_its_bits_when_it_is_cut(self):
        blocks = Columns(((2, 8), (6, 4)))
        policy = PackPolicy(layers=(LayerPlan(Stored(blocks, blocks), None, "rotated"),), partial=Partial())
        assert policy.layer(0, 1, 64, 64).vision == Stored(blocks, blocks)
        wider = Columns(((1, 8), (7, 4)))
        policy = PackPolicy(layers=(LayerPlan(Stored(wider, wider), None, "rotated"),), partial=Partial())
        assert policy.layer(0, 1, 64, 64).vision == Stored(wider, Columns(((1, 8), (1, 4), (6, 4))))

    def test_an_energy_is_cut_at_its_largest_rank(self):
        plan = PackPolicy(vision_rank=Energy(0.9, at_most=16), partial=Partial()).layer(0, 1, 8, 64)
        assert plan.vision == Stored(Columns(((8, 0),), 0.9), Columns(((4, 0), (12, 0)), 0.9))

    @given(policies(), st.integers(0, LAYERS - 1))
    @settings(max_examples=60, deadline=None)
    def test_every_policy_is_resolved_to_numbers_or_refused(self, policy, number):
        try:
            plan = policy.layer(number, LAYERS, 64, 48)
        except PolicyError as error:
            assert "exceeds H * D" in str(error)
            return
        assert plan.key_space in ("rotated", "unrotated")
        for kept in (plan.vision, plan.text):
            if kept is not None:
                assert 1 <= kept.key.rank <= 64
                assert 1 <= kept.value.rank <= 48


def test_every_refusal_is_a_policy_error():
    refused = [
        lambda: PackPolicy(vision_rank=0),
        lambda: PackPolicy(vision_rank=(1, None)),
        lambda: PackPolicy(strict=1),
        lambda: ranks(PackPolicy(vision_rank=9), "vision", 8, 8),
        lambda: PackPolicy.from_dict({"rank": 1}),
        lambda: PackPolicy.from_dict([64]),
        lambda: PackPolicy.from_options({"rank": 1}),
        lambda: PackPolicy.from_options({"max_autotune": 3}),
        lambda: PackPolicy.from_options({"mode": "fast"}),
    ]
    for refuse in refused:
        with pytest.raises(PolicyError):
            refuse()


def test_calibrated_plans_of_earlier_releases_are_read():
    """Their files hold the default rank of that time, which the plan replaces."""
    known = PackPolicy(layers=(LayerPlan(Stored(Columns(((4, 0),)), Columns(((4, 0),))), None, "rotated"),))
    assert PackPolicy.from_dict(known.to_dict() | {"vision_rank": 64}) == known
    with pytest.raises(PolicyError, match="vision_rank: got 32 beside layers"):
        PackPolicy.from_dict(known.to_dict() | {"vision_rank": 32})


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("quality-*.json")), ids=lambda path: path.name)
def test_policies_of_committed_results_are_read(path):
    found = _policies(json.loads(path.read_text()))
    assert found
    for policy in found:
        PackPolicy.from_dict(policy)


def _policies(record):
    """Every value under the name `policy`, however deep."""
    if isinstance(record, dict):
        own = [record["policy"]] if isinstance(record.get("policy"), dict) else []
        return own + [each for value in record.values() for each in _policies(value)]
    return [each for value in record for each in _policies(value)] if isinstance(record, list) else []


def test_from_dict_fills_defaults_and_refuses_unknown_fields():
    assert PackPolicy.from_dict({"text_rank": 4}) == PackPolicy(text_rank=4)
    with pytest.raises(ValueError, match=r"got 'vision_rnk', expected one of vision_rank.*did you mean 'vision_rank'"):
        PackPolicy.from_dict({"vision_rnk": 4})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, None),
        (7, (7, 7)),
        ((7, 9), (7, 9)),
        ("full", (512, 256)),
        (("full", 3), (512, 3)),
        ((3, "full"), (3, 256)),
    ],
)
@pytest.mark.parametrize("modality", ["vision", "text"])
def test_ranks(modality, spec, expected):
    assert ranks(PackPolicy(**{f"{modality}_rank": spec}), modality, 512, 256) == expected


def test_ranks_reads_the_named_modality():
    policy = PackPolicy(vision_rank=3, text_rank=5)
    assert ranks(policy, "vision", 8, 8) == (3, 3)
    assert ranks(policy, "text", 8, 8) == (5, 5)


def test_rank_above_the_width_is_refused():
    message = (
        r"vision_rank=5000 exceeds H \* D = 512, the largest rank a key of this model has; "
        r"use a rank <= 512 or 'full'"
    )
    with pytest.raises(ValueError, match=message):
        ranks(PackPolicy(vision_rank=5000), "vision", 512, 512)
    assert ranks(PackPolicy(vision_rank=512), "vision", 512, 512) == (512, 512)
    with pytest.raises(ValueError, match=r"text_rank=9 exceeds H \* D = 8, the largest rank a value"):
        ranks(PackPolicy(text_rank=9), "text", 16, 8)


def test_what_is_clipped():
    assert ranks(PackPolicy(), "vision", 8, 512) == (8, 64)
    assert ranks(PackPolicy(key_space="rotated"), "vision", 48, 512) == (48, 64)
    assert ranks(PackPolicy(vision_rank=64), "vision", 512, 48) == (64, 48)
    for policy, modality in [
        (PackPolicy(vision_rank=65), "vision"),
        (PackPolicy(vision_rank=(64, 64)), "vision"),
        (PackPolicy(text_rank=64), "text"),
    ]:
        with pytest.raises(ValueError, match="exceeds"):
            ranks(policy, modality, 48, 48)


@pytest.mark.parametrize(
    ("spec", "lossless"),
    [
        (None, False),
        (64, False),
        (Energy(1.0), False),
        (PerLayer(("full", "full")), False),
        ("full", True),
        (("full", "full"), True),
        (("full", 64), False),
        ((64, "full"), False),
    ],
)
def test_lossless(spec, lossless):
    policy = PackPolicy(vision_rank=spec, text_rank=7)
    assert policy.lossless("vision") is lossless
    assert policy.lossless("text") is False


def test_a_plan_is_never_called_lossless():
    full = Columns((("full", 0),))
    assert not PackPolicy(layers=(LayerPlan(Stored(full, full), None, "rotated"),)).lossless("vision")


class TestFromOptions:
    @pytest.mark.parametrize("nothing", [None, {}])
    def test_nothing_given(self, nothing):
        assert PackPolicy.from_options(nothing) == (PackPolicy(), {})

    def test_splits_policy_from_inductor_config(self):
        options = MappingProxyType(
            {"vision_rank": (32, 48), "strict": True, "epilogue_fusion": False, "max-autotune": True}
        )
        policy, patches = PackPolicy.from_options(options)
        assert policy == PackPolicy(vision_rank=(32, 48), strict=True)
        assert patches == {"epilogue_fusion": False, "max_autotune": True}

    def test_nested_forms(self):
        policy, patches = PackPolicy.from_options(
            {
                "vision-rank": [{"per_layer": [8, "full"]}, {"energy": 0.99}],
                "skip_layers": [-1],
                "partial": {"fractions": [1, 0.5], "keys": True},
                "key-space": "rotated",
                "max_autotune": True,
            }
        )
        assert policy == PackPolicy(
            vision_rank=(PerLayer((8, "full")), Energy(0.99)),
            skip_layers=(-1,),
            partial=Partial(fractions=(1.0, 0.5), keys=True),
            key_space="rotated",
        )
        assert patches == {"max_autotune": True}
        plan = {"layers": [dataclasses.asdict(PLAN)], "partial": Partial()}
        assert PackPolicy.from_options(plan)[0] == PackPolicy(layers=(PLAN,), partial=Partial())

    def test_no_field_hides_an_inductor_option(self):
        assert not {field.name for field in dataclasses.fields(PackPolicy)} & set(
            torch._inductor.config.get_config_copy()
        )

    def test_does_not_change_what_it_was_given(self):
        options = {"vision-rank": 3, "mode": "default", "max_autotune": True}
        PackPolicy.from_options(options)
        assert options == {"vision-rank": 3, "mode": "default", "max_autotune": True}

    def test_ready_policy(self):
        ready = PackPolicy(text_rank="full")
        policy, patches = PackPolicy.from_options({"policy": ready, "max_autotune": True})
        assert policy is ready
        assert patches == {"max_autotune": True}

    def test_ready_policy_beside_its_own_keys_is_refused(self):
        with pytest.raises(ValueError, match="got 'policy' and 'strict', expected one or the other"):
            PackPolicy.from_options({"policy": PackPolicy(), "strict": True})

    def test_policy_of_another_type_is_refused(self):
        with pytest.raises(ValueError, match="policy: got dict, expected a PackPolicy"):
            PackPolicy.from_options({"policy": {"vision_rank": 3}})

    @pytest.mark.parametrize("bad", [PackPolicy(), [("vision_rank", 3)], "vision_rank", 64])
    def test_options_of_another_type_are_refused(self, bad):
        with pytest.raises(ValueError, match=r"options: got .*expected a mapping"):
            PackPolicy.from_options(bad)

    def test_keys_are_names_and_come_once(self):
        with pytest.raises(ValueError, match="got the key 3, expected names"):
            PackPolicy.from_options({3: 4})
        with pytest.raises(ValueError, match="'vision_rank' twice"):
            PackPolicy.from_options({"vision-rank": 3, "vision_rank": 3})

    @pytest.mark.parametrize(
        ("typo", "meant"),
        [
            ("vision_ranks", "vision_rank"),
            ("max_autotun", "max_autotune"),
            ("polcy", "policy"),
            ("mod", "mode"),
        ],
    )
    def test_unknown_option_names_what_is_allowed_and_what_was_meant(self, typo, meant):
        allowed = "vision_rank, text_rank, .*, strict, policy, mode or any torch._inductor.config key"
        with pytest.raises(ValueError, match=rf"got '{typo}', expected one of {allowed}; did you mean '{meant}'\?"):
            PackPolicy.from_options({typo: 1})

    def test_inductor_values_are_type_checked(self):
        with pytest.raises(ValueError, match=r"'max_autotune': got 'yes' \(str\), expected bool; its default is"):
            PackPolicy.from_options({"max_autotune": "yes"})

    def test_every_inductor_default_of_a_plain_type_is_accepted(self):
        config = torch._inductor.config.get_config_copy()
        plain = {name: value for name, value in config.items() if isinstance(value, (bool, int, float, str))}
        assert len(plain) > 100
        assert PackPolicy.from_options(plain) == (PackPolicy(), plain)

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
    def test_mode_brings_inductors_options(self, mode):
        expected = torch._inductor.list_mode_options(mode)
        assert PackPolicy.from_options(None, mode=mode) == (PackPolicy(), expected)
        assert PackPolicy.from_options({"mode": mode, "text_rank": 3}) == (PackPolicy(text_rank=3), expected)
        assert PackPolicy.from_options({"mode": mode}, mode=mode, dynamic=True) == (PackPolicy(), expected)

    def test_explicit_options_win_over_the_mode(self):
        _, patches = PackPolicy.from_options({"mode": "max-autotune", "triton.cudagraphs": False})
        assert patches["triton.cudagraphs"] is False
        assert patches["max_autotune"] is True
        assert torch._inductor.list_mode_options("max-autotune")["triton.cudagraphs"] is True

    @pytest.mark.parametrize("bad", ["max-autotun", 3, ["default"]])
    def test_unknown_mode(self, bad):
        with pytest.raises(ValueError, match=r"mode: got .*expected one of 'default', .*'max-autotune'"):
            PackPolicy.from_options({"mode": bad})

    def test_two_modes(self):
        with pytest.raises(ValueError, match="mode: got 'default' and, in options, 'max-autotune'"):
            PackPolicy.from_options({"mode": "max-autotune"}, mode="default")
