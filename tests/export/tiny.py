"""Models of one layer and their policies, small enough to be exported again and again."""

from typing import Any

import torch
import transformers

from attnpack_fx import PackPolicy
from attnpack_fx.export import profiles, program
from attnpack_fx.export.model import exporting, parts_of
from attnpack_fx.export.policies import exportable
from attnpack_fx.export.program import Program
from attnpack_fx.export.steps import AnglesStep, DecodeStep
from attnpack_fx.passes.quantize import Quantize
from tests.zoo import ZOO, llava_config

#: A model in float16, its policy, and inputs with images or None.
Tiny = tuple[transformers.PreTrainedModel, PackPolicy, dict[str, Any] | None]


def coded_llava() -> Tiny:
    """A LLaVA with grouped heads, whose vision tokens are packed in 8 bits, further columns in 4."""
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(llava_config(num_hidden_layers=1)).half().eval()
    policy = PackPolicy(vision_rank=(16, 8), passes=(Quantize(bits=((8, 8), (None, 4))),))
    return model, policy, ZOO["llava-gqa"].inputs(1, 0)


def folding_llama() -> Tiny:
    """A Llama with grouped heads, whose text is packed before rotary embedding, and folded."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llava_config(num_hidden_layers=1).text_config).half().eval()
    return model, PackPolicy(text_rank=(16, 8), key_space="unrotated", fold_every=8), None


def captured(tiny: Tiny, *kinds: type[AnglesStep] | type[DecodeStep]) -> list[Program]:
    """Some of a model's steps, for the sizes of TensorRT's engines; without a prefill, which takes longest."""
    model, policy, _ = tiny
    parts = parts_of(model)
    layout, ranges = exportable(policy, parts), program._ranges(profiles.chosen(None), 0)
    with exporting(parts):
        return [profiles.within(program._captured(kind(parts, layout), parts, ranges)) for kind in kinds]
