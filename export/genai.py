"""genai_config.json: how onnxruntime-genai drives the decode step.

It keeps `past_key_values` and `present` itself, from an empty window on. The packed prompt is given once, by
`Generator.set_model_input`, with `position_offset`, `prompt_mask` and the like.
"""

from typing import Any

from attnpack_fx.export.layout import Layout

NAME = "genai_config.json"


def config(facts: dict[str, Any], layout: Layout, file: str) -> dict[str, Any]:
    """facts: of the manifest; file: the decode step."""
    ends = facts["eos"]
    # A pad token has to be named, though batches of one have none.
    pad = facts["pad"] if facts["pad"] is not None else (ends[0] if ends else 0)
    return {
        "model": {
            "type": "llama",
            "bos_token_id": facts["bos"] if facts["bos"] is not None else pad,
            "eos_token_id": ends or pad,
            "pad_token_id": pad,
            "vocab_size": facts["vocabulary"],
            "context_length": facts["context"] or 131072,
            "decoder": {
                "filename": file,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": layout.key_dim,
                "hidden_size": facts["hidden"],
                "num_attention_heads": facts["heads"],
                "num_hidden_layers": facts["layers"],
                "num_key_value_heads": layout.heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": facts["context"] or 131072,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }
