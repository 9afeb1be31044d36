"""Flamingo's generation, checkpoints and gradient checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmkern.models.clip import CLIP, CLIPConfig
from mmkern.models.flamingo import Flamingo, flamingo_3b, flamingo_9b
from mmkern.models.flamingo_layers import decoder_layers
from tests.models.small_flamingo import END, IMAGE, SIZE, VISION, batch, config, small
from tests.models.small_generation import shake


def prompts(left: bool = True) -> dict[str, Tensor]:
    return {name: value for name, value in batch(left).items() if name != "labels"}


def greedy(model: Flamingo, inputs: dict[str, Tensor], steps: int) -> Tensor:
    """Without any cache: the whole text and all pictures in each step."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits[:, -1]
        logits[:, IMAGE] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize("all_previous", [False, True])
def test_generation_equals_steps_without_a_cache(all_previous: bool) -> None:
    """Cached media, or the place of new tokens, would give other texts than training learned."""
    model = small(only_attend_immediate_media=not all_previous)
    inputs = prompts()
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None, "do_sample": False}
    expected = greedy(model, inputs, 5)
    for cache in (True, False):
        assert torch.equal(model.generate(**inputs, use_cache=cache, **options), expected)


def test_media_are_projected_once_for_all_steps() -> None:
    """Every generated token would cost the pictures' keys and values again."""
    model = small()
    calls = []
    for block in model.gated_cross_attn_layers:
        block.attn.to_kv.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**prompts(), max_new_tokens=4, eos_token_id=None)
    assert len(calls) == len(model.gated_cross_attn_layers) == 2


def test_beams_read_their_own_pictures() -> None:
    """A beam of one sample would read another sample's pictures."""
    model = small()
    inputs = prompts()
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "eos_token_id": None}
    together = model.generate(**inputs, **options)
    for row in range(4):
        kept = inputs["attention_mask"][row].bool()
        index = inputs["image_index"][row : row + 1]
        alone = model.generate(
            pixel_values=inputs["pixel_values"],
            input_ids=inputs["input_ids"][row : row + 1, kept],
            image_index=index[:, : int((index >= 0).sum())],
            **options,
        )
        assert torch.equal(together[row, -4:], alone[0, -4:])


def test_image_tokens_are_never_generated() -> None:
    """The text would go on about a picture that is not there."""
    model = small()
    with torch.no_grad():
        model.special_embeddings[1] *= 50
    ids = model.generate(**prompts(), max_new_tokens=6, eos_token_id=None)
    assert not (ids[:, -6:] == IMAGE).any()


def test_generation_ends_with_the_chunk() -> None:
    """Answers would run on into the next shot."""
    model = small()
    with torch.no_grad():
        model.special_embeddings[0] = 0
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda m, a, out: out.index_fill(-1, torch.tensor([END]), 99.0))
    ids = model.generate(**prompts(), max_new_tokens=6)
    assert ids.shape[1] == batch()["input_ids"].shape[1] + 1 and (ids[:, -1] == END).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Two forwards before their backwards would recompute with the pictures of the second."""
    plain = small()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = batch()
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    grads = []
    for model in (plain, saving):
        model.train()
        first, second = model(**inputs).loss, model(**other).loss
        (2 * first + second).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_copy_has_its_own_blocks() -> None:
    """A deep copy would run, and train, the blocks of the original."""
    model = small()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.gated_cross_attn_layers:
            block.attn_gate.add_(1)
    inputs = prompts(False)
    before = model(**inputs).logits
    assert not torch.equal(other(**inputs).logits, before)
    assert torch.equal(model(**inputs).logits, before)


def test_save_and_load(tmp_path: Path) -> None:
    """A trained model would come back as another, or not at all."""
    model = small(max_media=3)
    inputs = batch()
    model.save_pretrained(tmp_path)
    loaded = Flamingo.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
    kwargs: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        loaded.generate(**prompts(), **kwargs), model.generate(**prompts(), **kwargs)
    )
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    # The language model's keys are transformers', as if it were alone.
    alone = {f"language_model.{k}" for k in AutoModelForCausalLM.from_config(
        config().text_config).state_dict()}  # fmt: skip
    assert {k for k in model.state_dict() if k.startswith("language_model.")} == alone


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (None, "model.layers"),
        ({"model_type": "opt", "hidden_size": 24, "ffn_dim": 32, "word_embed_proj_dim": 24,
          "num_hidden_layers": 4, "num_attention_heads": 4}, "model.decoder.layers"),
        ({"model_type": "mpt", "d_model": 24, "n_heads": 4, "n_layers": 4}, "transformer.blocks"),
        ({"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 4}, "transformer.h"),
        ({"model_type": "gpt_neox", "hidden_size": 24, "intermediate_size": 32,
          "num_hidden_layers": 4, "num_attention_heads": 4}, "gpt_neox.layers"),
    ],
)  # fmt: skip
def test_any_causal_language_model(text: dict[str, Any] | None, path: str) -> None:
    """Only Llamas would learn to see."""
    model = small(text)
    assert decoder_layers(model.language_model)[0] == path
    inputs = batch()
    out = model(**inputs)
    torch.testing.assert_close(model(**inputs, return_logits=True).loss, out.loss)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    ids = prompts()
    expected = greedy(model, ids, 3) if path != "transformer.blocks" else None
    found = model.generate(**ids, max_new_tokens=3, eos_token_id=None, do_sample=False)
    assert expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("every", [1, 2])
def test_openflamingo_files_both_ways(every: int, tmp_path: Path) -> None:
    """Published checkpoints would not load, or load beside what they trained."""
    model = small(cross_attn_every_n_layers=every)
    state = model.to_openflamingo()
    last = "lang_encoder.model.layers.3.gated_cross_attn_layer.attn.to_kv.weight"
    blocks = model.gated_cross_attn_layers
    assert torch.equal(state[last], blocks[-1].attn.to_kv.weight)
    assert state["lang_encoder.model.embed_tokens.weight"][IMAGE].equal(model.special_embeddings[1])
    assert {k.split(".")[0] for k in state} == {"perceiver", "lang_encoder"}
    torch.save(
        {"model_state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pt"
    )
    other = shake(Flamingo(model.config), seed=1).eval()
    for name in ("vision_model", "language_model"):
        getattr(other, name).load_state_dict(getattr(model, name).state_dict())
    other.load_openflamingo(tmp_path / "a.pt")
    inputs = batch()
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).loss, model(**inputs).loss)
    # Aliases that files of the whole model have.
    alias = {f"lang_encoder.gated_cross_attn_layers.{3}.attn_gate": torch.zeros(1)}
    other.load_openflamingo({**state, **alias})


def test_openflamingo_files_are_strict() -> None:
    """A file of another size, or half of one, would load without a word."""
    model = small()
    state = model.to_openflamingo()
    key = "perceiver.layers.1.0.to_q.weight"
    with pytest.raises(ValueError, match=key):
        model.load_openflamingo({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=key):
        model.load_openflamingo({**state, key: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"perceiver\.extra"):
        model.load_openflamingo({**state, "perceiver.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"layers\.0\.gated"):
        name = "lang_encoder.model.layers.0.gated_cross_attn_layer.attn_gate"
        model.load_openflamingo({**state, name: torch.zeros(1)})
    with pytest.raises(ValueError, match="surprise"):
        model.load_openflamingo({**state, "surprise": torch.zeros(1)})


@pytest.mark.parametrize("ln_post", [False, True])
def test_patches_are_those_of_clip(ln_post: bool) -> None:
    """The frozen tower would not be CLIP's, or its last norm come and go with a version."""
    clip = CLIP(
        CLIPConfig(
            embed_dim=8, image_size=SIZE, vision_patch_size=14, vision_layers=2, vision_width=16,
            vision_heads=2, text_width=16, text_heads=2, text_layers=1, context_length=8,
            vocab_size=32,
        )
    ).eval()  # fmt: skip
    shake(clip)
    model = small(apply_ln_post=ln_post)
    model.vision_model.load_clip(clip)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        tokens = clip.visual.transformer(clip.visual.tokens(pixels))
        expected = (clip.visual.ln_post(tokens) if ln_post else tokens)[:, 1:]
        assert torch.equal(model.vision_model(pixels), expected)
    assert any("ln_post" in n for n in model.state_dict()) == ln_post
    wrong = Flamingo(config(), None)
    wrong.vision_model = type(wrong.vision_model)(
        type(wrong.config.vision_config)(**{**VISION, "hidden_size": 32}), False
    )
    with pytest.raises(ValueError, match="class_embedding"):
        wrong.vision_model.load_clip(clip)


def test_published_sizes() -> None:
    """A recipe "as OpenFlamingo" would build another model."""
    with torch.device("meta"):
        three, nine = flamingo_3b(), flamingo_9b()
    for model, blocks, width in ((three, 24, 2048), (nine, 8, 4096)):
        assert len(model.gated_cross_attn_layers) == blocks
        assert model.get_input_embeddings().weight.shape == (50280, width)
        assert model.config.apply_ln_post is False

    def millions(part: Any) -> float:
        return sum(p.numel() for p in part.parameters()) / 1e6

    assert round(millions(three.perceiver)) == 63
    assert round(millions(three.gated_cross_attn_layers)) == 881
