"""Small BLIP-2 and InstructBLIP with random weights, ours and transformers', and batches."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, OPTConfig, T5Config

from mmkern.models.blip2_base import Blip2Config
from mmkern.models.blip2_generation import Blip2ForConditionalGeneration
from mmkern.models.instructblip import InstructBlipConfig, InstructBlipForConditionalGeneration

VOCABULARY, IMAGE, QUERIES, QFORMER_VOCABULARY = 70, 69, 5, 61
PAD, BEGIN, END = 1, 0, 2
KINDS = ("opt", "t5", "llama")


def text_config(kind: str, **overrides: Any) -> Any:
    common = {"vocab_size": VOCABULARY, "bos_token_id": BEGIN, "eos_token_id": END}
    common |= {"pad_token_id": PAD, **overrides}
    if kind == "opt":
        sizes = {"hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 40}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40}
        return OPTConfig(**{**sizes, **layers, "dropout": 0.0, **common})
    if kind == "t5":
        sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
        more = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": PAD}
        return T5Config(**{**sizes, **more, "dropout_rate": 0.0, **common})
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40}
    return LlamaConfig(**{**sizes, **heads, **common})


def parts(kind: str, instruct: bool, **text: Any) -> dict[str, Any]:
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    qformer = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    qformer |= {"intermediate_size": 48, "encoder_hidden_size": 24, "hidden_dropout_prob": 0.0}
    qformer |= {"attention_probs_dropout_prob": 0.0}
    if instruct:
        qformer |= {"vocab_size": QFORMER_VOCABULARY, "max_position_embeddings": 16}
    return {
        "vision_config": vision,
        "qformer_config": qformer,
        "text_config": text_config(kind, **text),
        "num_query_tokens": QUERIES,
        "image_token_index": IMAGE,
    }


def shake(model: Any, seed: int = 0) -> Any:
    """Every parameter N(0, 0.2), so that a wrong map or a forgotten bias shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model


def small(kind: str, instruct: bool = False, **options: Any) -> Any:
    """Ours, in eval mode."""
    text = options.pop("text", {})
    config = (InstructBlipConfig if instruct else Blip2Config)(
        **{**parts(kind, instruct, **text), **options}
    )
    cls = InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration
    return shake(cls(config)).eval()


def theirs(kind: str, instruct: bool = False, attention: str = "sdpa") -> Any:
    """transformers', in eval mode."""
    name = "InstructBlip" if instruct else "Blip2"
    config = getattr(transformers, f"{name}Config")(**parts(kind, instruct))
    config._attn_implementation = attention
    for part in (config.vision_config, config.qformer_config, config.text_config):
        part._attn_implementation = attention
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return shake(model).eval()


def pair(kind: str, instruct: bool = False, attention: str = "sdpa") -> tuple[Any, Any]:
    """Ours with the weights of transformers'."""
    reference = theirs(kind, instruct, attention)
    model = small(kind, instruct)
    model.load_state_dict(reference.state_dict())
    return model, reference


def batch(
    kind: str,
    instruct: bool = False,
    *,
    count: int = 3,
    text: int = 7,
    left: bool = False,
    seed: int = 1,
) -> dict[str, Tensor]:
    """[image][text] of unequal lengths, padded at the right or between image and text."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(3, high, shape, generator=generator)

    words = draw(IMAGE, count, text)
    lengths = torch.tensor([text, text - 3, text - 1])[:count]
    place = torch.arange(text)
    kept = place >= (text - lengths)[:, None] if left else place < lengths[:, None]
    images = torch.full((count, QUERIES), IMAGE)
    result = {
        "pixel_values": torch.randn(count, 3, 28, 28, generator=generator),
        "input_ids": torch.cat([images, words.masked_fill(~kept, PAD)], 1),
        "attention_mask": torch.cat([torch.ones_like(images), kept.long()], 1),
    }
    if kind == "t5":
        answer = draw(IMAGE, count, 4)
        answer[0, 2:] = -100
        result["labels"] = answer
    else:
        labels = words.masked_fill(~kept, -100)
        labels[:, :2] = -100
        result["labels"] = torch.cat([torch.full_like(images, -100), labels], 1)
    if instruct:
        result["qformer_input_ids"] = draw(QFORMER_VOCABULARY, count, 6)
        own = torch.tensor([6, 2, 4])[:count]
        mask = (torch.arange(6) < own[:, None]).long()
        result["qformer_attention_mask"] = mask
    return result


def prompt(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name != "labels"}
