"""Models for the tests of the demo."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from attnpack_cli.models import trained_model
from attnpack_fx.demo.load import Loaded, load
from tests.zoo import ZOO

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghij"]


def trained() -> Path:
    """The trained model of the repository."""
    return trained_model()


def loaded_trained() -> Loaded:
    return load(str(trained()))


def tiny_llava() -> Loaded:
    """Random weights and no processor: 16 vision tokens an image."""
    return Loaded("tiny", ZOO["llava-mha"].build("sdpa"), None, True)


def save_text_model(folder: Path) -> str:
    """A random two-layer Llama and its tokenizer, saved below `folder`; returns where."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    place = folder / "text-model"
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(place)
    return str(place)
