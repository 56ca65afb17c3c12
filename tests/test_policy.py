import dataclasses
import json
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnpack_fx.policy import PackPolicy, PolicyError

RANKS = st.one_of(st.integers(min_value=1), st.just("full"))
SPECS = st.one_of(st.none(), RANKS, st.tuples(RANKS, RANKS))


def test_defaults_are_the_papers_setting():
    policy = PackPolicy()
    assert (policy.vision_rank, policy.text_rank) == (64, None)
    assert (policy.key_space, policy.strict) == ("auto", False)


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


@given(vision=SPECS, text=SPECS, strict=st.booleans())
def test_dict_round_trip_through_json(vision, text, strict):
    policy = PackPolicy(vision_rank=vision, text_rank=text, strict=strict)
    assert PackPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_every_refusal_is_a_policy_error():
    refused = [
        lambda: PackPolicy(vision_rank=0),
        lambda: PackPolicy(vision_rank=(1, None)),
        lambda: PackPolicy(strict=1),
        lambda: PackPolicy(vision_rank=9).ranks("vision", 8, 8),
        lambda: PackPolicy.from_dict({"rank": 1}),
        lambda: PackPolicy.from_options({"rank": 1}),
        lambda: PackPolicy.from_options({"max_autotune": 3}),
        lambda: PackPolicy.from_options({"mode": "fast"}),
    ]
    for refuse in refused:
        with pytest.raises(PolicyError):
            refuse()


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
    assert PackPolicy(**{f"{modality}_rank": spec}).ranks(modality, 512, 256) == expected


def test_ranks_reads_the_named_modality():
    policy = PackPolicy(vision_rank=3, text_rank=5)
    assert policy.ranks("vision", 8, 8) == (3, 3)
    assert policy.ranks("text", 8, 8) == (5, 5)
    with pytest.raises(ValueError, match="got 'audio', expected 'vision' or 'text'"):
        policy.ranks("audio", 8, 8)


def test_rank_above_the_width_is_refused():
    message = (
        r"vision_rank=5000 exceeds H \* D = 512, the largest rank a key of this model has; "
        r"use a rank <= 512 or 'full'"
    )
    with pytest.raises(ValueError, match=message):
        PackPolicy(vision_rank=5000).ranks("vision", 512, 512)
    assert PackPolicy(vision_rank=512).ranks("vision", 512, 512) == (512, 512)
    with pytest.raises(ValueError, match=r"text_rank=9 exceeds H \* D = 8, the largest rank a value"):
        PackPolicy(text_rank=9).ranks("text", 16, 8)


def test_only_the_default_is_clipped():
    assert PackPolicy().ranks("vision", 48, 512) == (48, 64)
    assert PackPolicy().ranks("vision", 512, 48) == (64, 48)
    for policy, modality in [
        (PackPolicy(vision_rank=65), "vision"),
        (PackPolicy(vision_rank=(64, 64)), "vision"),
        (PackPolicy(text_rank=64), "text"),
    ]:
        with pytest.raises(ValueError, match="exceeds"):
            policy.ranks(modality, 48, 48)


@pytest.mark.parametrize(
    ("spec", "lossless"),
    [
        (None, False),
        (64, False),
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

    def test_passes_are_not_offered(self):
        with pytest.raises(ValueError, match="unknown option: got 'passes'"):
            PackPolicy.from_options({"passes": ()})

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
