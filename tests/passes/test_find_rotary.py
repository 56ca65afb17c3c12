"""The rotary embedding of keys is found in every form the supported models write it, exactly, and nothing else is."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from attnpack_fx.kernels.rotary import rotate
from attnpack_fx.passes.find_attention import find_attention
from attnpack_fx.passes.find_rotary import RotaryFinder
from attnpack_fx.passes.patterns import cat_along_tokens
from tests import zoo
from tests.packing_inputs import packed_pair
from tests.passes.capture import capture_graphs

B, H, T, D = 2, 4, 5, 8
K = torch.randn(B, H, T, D)


def by_pair(*size: int, interleaved: bool = False) -> tuple[torch.Tensor, ...]:
    """cos and sin of this size, in which both dims of a pair have the same."""
    each = torch.randn(2, *size[:-1], size[-1] // 2)
    return (torch.stack([each, each], -1).flatten(-2) if interleaved else torch.cat([each, each], -1)).unbind()


COS, SIN = by_pair(B, T, D)
HALF_COS, HALF_SIN = by_pair(B, T, D // 2)


def found(function, *arguments):
    """The rotation of the one tensor that `function` returns, its graph, and that tensor's node."""
    (graph,) = capture_graphs(function, *arguments)
    (key,) = graph.state.results
    return RotaryFinder(graph.state.graph).rotation_of(key), graph, key


def assert_exact(graph, rotation, key):
    """The rotation has the promised shapes, for its fake values too, and gives the very key."""
    nodes = (key, rotation.unrotated, rotation.cos, rotation.sin)
    real = graph.evaluate(*nodes)
    for node, value in zip(nodes, real, strict=True):
        fake = node.meta["example_value"]
        assert fake.dtype == value.dtype and len(fake.shape) == len(value.shape)
        assert all(not isinstance(size, int) or size == is_ for size, is_ in zip(fake.shape, value.shape, strict=True))
    key_value, unrotated, cos, sin = real
    assert (unrotated.shape, unrotated.dtype) == (key_value.shape, key_value.dtype)
    assert cos.shape == sin.shape and cos.dim() == 3 and cos.shape[0] in (1, len(key_value))
    assert cos.shape[1] == key_value.shape[2]
    assert torch.equal(rotate(unrotated, cos[:, None], sin[:, None], rotation.interleaved), key_value)


def half_turn(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def pair_turn(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotated(x, cos, sin, turn=half_turn, heads=1):
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    return (x * cos) + (turn(x) * sin)


# ---- forms of one rotation ---------------------------------------------------------------------------------


def reversed_operands(k, cos, sin):
    return sin[:, None] * half_turn(k) + cos[:, None] * k


def by_chunk(k, cos, sin):
    x1, x2 = k.chunk(2, dim=-1)
    return k * cos[:, None] + torch.cat([-x2, x1], -1) * sin[:, None]


def by_split(k, cos, sin):
    x1, x2 = torch.split(k, D // 2, dim=-1)
    return k * cos[:, None] + torch.cat([x2.neg(), x1], 3) * sin[:, None]


def by_narrow(k, cos, sin):
    x1, x2 = k.narrow(-1, 0, D // 2), k.narrow(3, D // 2, D // 2)
    return k * cos[:, None] + torch.cat([-x2, x1], -1) * sin[:, None]


def in_place_sum(k, cos, sin):
    key = k * cos.unsqueeze(1)
    key += half_turn(k) * sin.unsqueeze(1)
    return key


def in_place_method(k, cos, sin):
    return (k * cos.unsqueeze(1)).add_(half_turn(k) * sin.unsqueeze(1)).contiguous()


def written_before(k, cos, sin):
    k = k + 1
    k += 1
    return rotated(k, cos, sin)


def in_float32(k, cos, sin):
    return rotated(k.float(), cos.float(), sin.float()).to(k.dtype)


def cast_apart(k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (k.float() * cos + pair_turn(k).float() * sin).type_as(k)


def tokens_first(k, cos, sin):
    return rotated(k.transpose(1, 2) * 2, cos, sin, heads=2).transpose(1, 2)


def gptj(k, cos, sin):
    cos, sin = (torch.repeat_interleave(angle[:, :, None, :], 2, 3) for angle in (cos, sin))
    k = (k * 2).permute(0, 2, 1, 3)
    return (k * cos + pair_turn(k) * sin).permute(0, 2, 1, 3)


def unbound_pairs(k, cos, sin):
    x1, x2 = k.reshape(*k.shape[:-1], -1, 2).unbind(dim=-1)
    turned = torch.stack([-x2, x1], dim=-1).reshape(k.shape)
    return k * cos[:, None] + turned * sin[:, None]


def sectioned(k, cos, sin):
    """Qwen2-VL as it was: axis i % 3 gives section i of the dims."""
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(angle.split([1, 1, 2] * 2, dim=-1))], dim=-1).unsqueeze(1)
        for angle in (cos, sin)
    )
    return k * cos + half_turn(k) * sin


def first_dims(k, cos, sin):
    k_rot, k_pass = k[..., : cos.shape[-1]], k[..., cos.shape[-1] :]
    return torch.cat([rotated(k_rot, cos, sin), k_pass], dim=-1)


def first_dims_in_pairs(k, cos, sin):
    """GLM: every layer repeats the half-width cos itself, in the four-dimensional form."""
    cos, sin = (angle.unsqueeze(1)[..., : angle.shape[-1] // 2].repeat_interleave(2, dim=-1) for angle in (cos, sin))
    k_rot, k_pass = k.split([4, D - 4], dim=-1)
    return torch.cat((k_rot * cos + pair_turn(k_rot) * sin, k_pass), dim=-1)


def first_dims_of_many(k, cos, sin):
    """Keys that are a slice of a fused projection."""
    fused = torch.cat([k, k * 2, k * 3], -1)
    return first_dims(fused[..., D : 2 * D], cos, sin)


def halves_apart(k, cos, sin):
    """GPT-OSS: cos and sin hold one entry a pair."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = torch.chunk(k, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def pairs_apart(k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = k[..., ::2], k[..., 1::2]
    return torch.stack((a * cos - b * sin, sin * a + cos * b), dim=-1).flatten(-2)


WHOLE = (K, COS, SIN)
BF16 = tuple(tensor.bfloat16() for tensor in WHOLE)
MIXED = (K.bfloat16(), COS, SIN)
NEIGHBOURS = (K, *by_pair(B, T, D, interleaved=True))
FORMS = [
    (rotated, WHOLE, False),
    (rotated, BF16, False),
    (lambda k, cos, sin: rotated(k, cos, sin, pair_turn), NEIGHBOURS, True),
    (lambda k, cos, sin: rotated(k, cos, sin).to(k.dtype), MIXED, False),
    (rotated, MIXED, False),  # the key is float32, and so must be what is rotated
    (reversed_operands, WHOLE, False),
    (by_chunk, WHOLE, False),
    (by_split, WHOLE, False),
    (by_narrow, WHOLE, False),
    (in_place_sum, WHOLE, False),
    (in_place_method, BF16, False),
    (written_before, WHOLE, False),
    (in_float32, BF16, False),
    (cast_apart, tuple(tensor.bfloat16() for tensor in NEIGHBOURS), True),
    (cast_apart, (K.bfloat16(), *NEIGHBOURS[1:]), True),
    (tokens_first, WHOLE, False),
    (gptj, (K, HALF_COS, HALF_SIN), True),
    (unbound_pairs, NEIGHBOURS, True),
    (sectioned, (K, *by_pair(3, B, T, D)), False),
    (first_dims, (K, HALF_COS, HALF_SIN), False),
    (first_dims, WHOLE, False),
    (lambda k, cos, sin: first_dims(k.float(), cos, sin).to(k.dtype), (K.bfloat16(), HALF_COS, HALF_SIN), False),
    (first_dims_in_pairs, (K, HALF_COS, HALF_SIN), True),
    (first_dims_of_many, (K, HALF_COS, HALF_SIN), False),
    (halves_apart, (K, HALF_COS, HALF_SIN), False),
    (pairs_apart, (K, HALF_COS, HALF_SIN), True),
    (rotated, (K, COS[:1], SIN[:1]), False),  # the same positions in every sample
    (lambda k, cos, sin: k * cos + half_turn(k) * sin, (K, COS[0], SIN[0]), False),
    (lambda k, cos, sin: k * cos + half_turn(k) * sin, (K, COS[:1], SIN[:1]), False),
    (lambda k, cos, sin: rotated(k.mT.mT.transpose(1, 2), cos, sin).transpose(1, 2), (K, COS[0], SIN[0]), False),
]


@pytest.mark.parametrize(("function", "arguments", "interleaved"), FORMS)
def test_a_rotation_is_found_and_exact(function, arguments, interleaved):
    rotation, graph, key = found(function, *arguments)
    assert rotation is not None
    assert rotation.interleaved is interleaved
    assert_exact(graph, rotation, key)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    pairs=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    turn=st.sampled_from([half_turn, pair_turn]),
    swapped=st.booleans(),
)
def test_any_size_dtype_and_layout(sizes, pairs, dtype, turn, swapped):
    batch, heads, tokens = sizes
    rotated_dims, passed = 2 * pairs[0], pairs[1]
    k = torch.randn(batch, tokens, heads, rotated_dims + passed, dtype=dtype)
    cos, sin = by_pair(batch, tokens, rotated_dims, interleaved=turn is pair_turn)

    def function(k, cos, sin):
        k = k if swapped else k.transpose(1, 2)
        turning = rotated(k[..., :rotated_dims].float(), cos, sin, turn, heads=2 if swapped else 1).to(k.dtype)
        key = torch.cat([turning, k[..., rotated_dims:]], -1) if passed else turning
        return key.transpose(1, 2) if swapped else key

    rotation, graph, key = found(function, k, cos, sin)
    assert rotation.interleaved is (turn is pair_turn)
    assert_exact(graph, rotation, key)


def test_layers_that_expand_cos_themselves_share_the_node():
    def function(k, cos, sin):
        return first_dims_in_pairs(k, cos, sin), first_dims_in_pairs(k * 2, cos, sin)

    (graph,) = capture_graphs(function, K, HALF_COS, HALF_SIN)
    finder, keys = RotaryFinder(graph.state.graph), graph.state.results
    first, second = (finder.rotation_of(key) for key in keys)
    assert first.cos is second.cos and first.sin is second.sin
    assert first.unrotated is not second.unrotated
    for rotation, key in zip((first, second), keys, strict=True):
        assert_exact(graph, rotation, key)


def test_cos_that_changes_between_layers_is_not_shared():
    def function(k, cos, sin):
        angle = cos * 1
        first = rotated(k, angle[..., :D] * 1, sin)
        angle += 1
        return first, rotated(k, angle[..., :D] * 1, sin)

    (graph,) = capture_graphs(function, *WHOLE)
    finder, keys = RotaryFinder(graph.state.graph), graph.state.results
    first, second = (finder.rotation_of(key) for key in keys)
    assert first.cos is not second.cos
    for rotation, key in zip((first, second), keys, strict=True):
        assert_exact(graph, rotation, key)


def test_beside_a_packed_past():
    past, _, _, _ = packed_pair(heads=H)

    def function(past, k, cos, sin):
        return torch.cat([past, rotated(k, cos, sin)], dim=2)

    (graph,) = capture_graphs(function, past, *WHOLE)
    key = cat_along_tokens(graph.state.results[0])[1]
    assert_exact(graph, RotaryFinder(graph.state.graph).rotation_of(key), key)


def test_a_width_that_is_a_symbol():
    """As where Dynamo compiles a layer by itself, and has seen another width."""
    cos, sin = COS.clone(), SIN.clone()
    for tensor in (cos, sin):
        torch._dynamo.maybe_mark_dynamic(tensor, 2)
    rotation, graph, key = found(rotated, K, cos, sin)
    assert_exact(graph, rotation, key)


def test_asking_again_inserts_nothing():
    rotation, graph, key = found(gptj, K, HALF_COS, HALF_SIN)
    assert rotation is not None
    finder = RotaryFinder(graph.state.graph)
    first = finder.rotation_of(key)
    before = len(graph.state.graph.nodes)
    assert finder.rotation_of(key) == first
    assert len(graph.state.graph.nodes) == before


# ---- what only resembles a rotation ------------------------------------------------------------------------


def other_sign(x):
    x1, x2 = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((x2, -x1), dim=-1)


def swapped_halves(x):
    x1, x2 = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((-x1, x2), dim=-1)


def unequal_halves(x):
    return torch.cat((-x[..., 3:], x[..., :3]), dim=-1)


def one_half_twice(x):
    return torch.cat((-x[..., D // 2 :], x[..., D // 2 :]), dim=-1)


def swapped_pairs(x):
    return torch.stack((-x[..., ::2], x[..., 1::2]), dim=-1).flatten(-2)


def pairs_turned_into_halves(x):
    return torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1)


def halves_turned_into_pairs(x):
    return torch.stack((-x[..., D // 2 :], x[..., : D // 2]), dim=-1).flatten(-2)


def turned_along_tokens(x):
    return torch.cat((-x[:, :, T // 2 :], x[:, :, : T // 2]), dim=2)


TURNS = [
    other_sign,
    swapped_halves,
    unequal_halves,
    one_half_twice,
    swapped_pairs,
    pairs_turned_into_halves,
    halves_turned_into_pairs,
    turned_along_tokens,
]


def test_another_turn_is_no_rotation():
    (graph,) = capture_graphs(lambda k, cos, sin: [rotated(k, cos, sin, turn) for turn in [*TURNS, half_turn]], *WHOLE)
    finder = RotaryFinder(graph.state.graph)
    matches = [finder.rotation_of(key) is not None for key in graph.state.results]
    assert matches == [False] * len(TURNS) + [True]


def scaled_in_place_after(k, cos, sin):
    key = rotated(k, cos, sin)
    key.mul_(2)
    return key


def keys_changed_after(k, cos, sin):
    k = k * 2
    key = rotated(k, cos, sin)
    k[..., 0] = 1.0
    return key


def turned_then_changed(k, cos, sin):
    k = k * 2
    turned = half_turn(k)
    k *= cos.unsqueeze(1)
    return k + turned * sin.unsqueeze(1)


def pairs_changed_between(k, cos, sin):
    k = k * 2
    pairs = k.reshape(B, H, T, -1, 2)
    pairs.mul_(2)
    x1, x2 = pairs.unbind(-1)
    return k * cos[:, None] + torch.stack((-x2, x1), -1).flatten(-2) * sin[:, None]


def term_changed_between(k, cos, sin):
    plain = k * cos.unsqueeze(1)
    plain.relu_()
    torch.nn.functional.silu(plain, inplace=True)
    return plain + half_turn(k) * sin.unsqueeze(1)


def passed_from_elsewhere(k, cos, sin):
    return torch.cat([rotated(k[..., :4], cos[..., :4], sin[..., :4]), (k * 2)[..., 4:]], -1)


def passed_with_a_gap(k, cos, sin):
    return torch.cat([rotated(k[..., :4], cos[..., :4], sin[..., :4]), k[..., 6:]], -1)


def passed_first(k, cos, sin):
    """DeepSeek: the last dims are rotated."""
    return torch.cat([k[..., :4], rotated(k[..., 4:], cos[..., :4], sin[..., :4])], -1)


def deinterleaved(k, cos, sin):
    """DeepSeek V3: pairs are turned and stored as halves."""
    cos, sin = cos[..., : D // 2].unsqueeze(1), sin[..., : D // 2].unsqueeze(1)
    a, b = k[..., 0::2], k[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def halves_with_another_sign(k, cos, sin):
    cos, sin = cos[..., : D // 2].unsqueeze(1), sin[..., : D // 2].unsqueeze(1)
    a, b = k.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def halves_with_two_cosines(k, cos, sin):
    one, other, sin = cos[..., : D // 2].unsqueeze(1), cos[..., D // 2 :].unsqueeze(1), sin[..., : D // 2].unsqueeze(1)
    a, b = k.chunk(2, -1)
    return torch.cat([a * one - b * sin, b * other + a * sin], dim=-1)


def complex_product(k, cos, sin):
    """Llama 4."""
    angle = torch.complex(cos, sin)[:, None, :, : D // 2]
    return torch.view_as_real(torch.view_as_complex(k.reshape(*k.shape[:-1], -1, 2)) * angle).flatten(3)


NEAR_MISSES = [
    (lambda k, cos, sin: k * cos[:, None] - half_turn(k) * sin[:, None], WHOLE),
    (lambda k, cos, sin: torch.add(k * cos[:, None], half_turn(k) * sin[:, None], alpha=2.0), WHOLE),
    (lambda k, cos, sin: k * cos[:, None] + half_turn(k * 2) * sin[:, None], WHOLE),
    (lambda k, cos, sin: half_turn(k) * cos[:, None] + half_turn(k) * sin[:, None], WHOLE),
    (lambda k, cos, sin: k * cos[:, None] + half_turn(k) / sin[:, None], WHOLE),
    (lambda k, cos, sin: rotated(k, cos, sin) * 2, WHOLE),
    (lambda k, cos, sin: rotated(k, cos, sin) + sin[:, None], WHOLE),
    (lambda k, cos, sin: rotated(k, cos, sin).flip(2), WHOLE),
    (lambda k, cos, sin: rotated(k, cos, sin).transpose(2, 3).transpose(1, 2), WHOLE),
    (lambda k, cos, sin: rotated(k, cos, sin).bfloat16().float(), WHOLE),  # rounded more than the key's dtype says
    (lambda k, cos, sin: rotated(k.bfloat16(), cos.bfloat16(), sin.bfloat16()).float(), WHOLE),
    (lambda k, cos, sin: rotated(k, cos, sin).bfloat16(), WHOLE),  # float32 before, which the cache would not hold
    (lambda k, cos, sin: k * cos + half_turn(k) * sin, (K, *torch.randn(2, B, H, T, D))),  # an angle a head
    (rotated, (K, COS[:, :1], SIN[:, :1])),  # one angle for all tokens
    (rotated, (K, COS[..., :1], SIN[..., :1])),  # one for all dims
    (rotated, (K[:1], COS, SIN)),  # more samples than keys
    (lambda k, cos, sin: k * cos + half_turn(k) * sin, (K, COS[0, 0], SIN[0, 0])),
    (lambda k, cos, sin: rotated(k, cos, sin, heads=2), (torch.randn(B, T, T, D), COS, SIN)),  # an angle a head
    (lambda k, cos, sin: k + cos[:, None], WHOLE),  # learned positions
    (scaled_in_place_after, WHOLE),
    (keys_changed_after, WHOLE),
    (turned_then_changed, WHOLE),
    (pairs_changed_between, WHOLE),
    (term_changed_between, WHOLE),
    (passed_from_elsewhere, WHOLE),
    (passed_with_a_gap, WHOLE),
    (passed_first, WHOLE),
    (deinterleaved, WHOLE),
    (halves_with_another_sign, WHOLE),
    (halves_with_two_cosines, WHOLE),
    (complex_product, WHOLE),
]


@pytest.mark.parametrize(("function", "arguments"), NEAR_MISSES)
def test_what_only_resembles_a_rotation_is_none(function, arguments):
    rotation, graph, _ = found(function, *arguments)
    assert rotation is None
    graph.state.graph.lint()


# ---- models ------------------------------------------------------------------------------------------------

_SMALL = {**zoo._DECODER, "head_dim": 16}
_GPTJ = {"vocab_size": zoo.VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64}
ADDED = {
    "glm": lambda: transformers.GlmForCausalLM(transformers.GlmConfig(**_SMALL)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**zoo._DECODER)),
    "ernie4.5": lambda: transformers.Ernie4_5ForCausalLM(transformers.Ernie4_5Config(**_SMALL)),
    "stablelm": lambda: transformers.StableLmForCausalLM(transformers.StableLmConfig(**zoo._DECODER)),
    "gpt-j": lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig(**_GPTJ, bos_token_id=1, eos_token_id=2)),
}
# The zoo's other models have one of these decoders, or Llama, Gemma, Mistral or Qwen2, which rotate as Qwen3 does; gpt2
# has learned positions.
ZOO = [
    *("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "gemma3", "mllama", "qwen3"),
    *("gpt-neox", "phi3"),
]
# Every layer of GPT-J has a table of angles of its own.
UNSHARED = ("gpt-j",)


def decoder_of(name):
    """The language model of an architecture, which takes `inputs_embeds`."""
    model = ADDED[name]().eval() if name in ADDED else zoo.ZOO[name].build("sdpa")
    return model.get_decoder() if name in ADDED else getattr(model.base_model, "language_model", model.base_model)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in (*ZOO, "gpt-j")),
        *((name, torch.bfloat16) for name in ("glm", "cohere", "ernie4.5", "stablelm")),  # two rotate in float32
    ],
)
def test_every_cached_site_of_a_model(name, dtype):
    decoder = decoder_of(name).to(dtype)
    inputs = {"inputs_embeds": torch.randn(2, 7, zoo.HIDDEN, dtype=dtype)}
    if name.startswith("qwen") and name.endswith("vl"):
        # Positions that differ between the three axes.
        inputs["position_ids"] = torch.randint(0, 50, (3, 2, 7))
    checked = 0
    for graph in capture_graphs(decoder, **inputs, use_cache=True):
        find_attention(graph.state)
        finder = RotaryFinder(graph.state.graph)
        keys = [(cat_along_tokens(site.key) or [site.key])[-1] for site in graph.state.sites]
        rotations = [finder.rotation_of(key) for key in keys]
        for rotation, key in zip(rotations, keys, strict=True):
            assert rotation is not None
            assert_exact(graph, rotation, key)
        if name != "gemma3" and name not in UNSHARED:  # sliding and full layers of Gemma 3 turn differently
            assert len({(rotation.cos, rotation.sin) for rotation in rotations}) == 1
        if name == "gemma3":
            assert rotations[0].cos is rotations[2].cos is not rotations[1].cos
        checked += len(rotations)
    assert checked == (3 if name == "gemma3" else 2)


def test_a_decode_step_with_sizes_that_change():
    model = zoo.ZOO["llama"].build("sdpa")
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.randint(10, 300, (2, 7)), past_key_values=cache)
    torch._dynamo.reset()
    for layer in cache.layers:
        torch._dynamo.mark_dynamic(layer.keys, 2)
        torch._dynamo.mark_dynamic(layer.values, 2)
    ids = torch.randint(10, 300, (2, 3))
    torch._dynamo.mark_dynamic(ids, 1)
    (graph,) = capture_graphs(model, input_ids=ids, past_key_values=cache)
    assert find_attention(graph.state) == 2
    finder = RotaryFinder(graph.state.graph)
    keys = [cat_along_tokens(site.key)[1] for site in graph.state.sites]
    rotations = [finder.rotation_of(key) for key in keys]
    assert rotations[0].cos is rotations[1].cos
    assert isinstance(keys[0].meta["example_value"].shape[2], torch.SymInt)
    for rotation, key in zip(rotations, keys, strict=True):
        assert_exact(graph, rotation, key)
