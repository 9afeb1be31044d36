"""Checkpoints of BLIP-2: transformers' folders and LAVIS's files, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import Blip2Config as TransformersConfig
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from mmkern.models.blip2 import Blip2ForPretraining
from mmkern.models.blip2_checkpoints import from_lavis, to_lavis
from tests.models.small_blip2 import (
    HIDDEN,
    INNER,
    LAYERS,
    POSITIONS,
    QUERIES,
    SIZES,
    TEXT,
    VISION,
    VOCABULARY,
    WIDTH,
    assert_same_gradients,
    batch,
    config,
    draw,
    gradients,
    redraw,
    small_stage1,
)

OURS_ALONE = {
    "temp",
    "cls.predictions.bias",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def retrieval(attention: str) -> Any:
    fields = config().to_dict()
    model = redraw(Blip2ForImageTextRetrieval(TransformersConfig.from_dict(fields)))
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_is_transformers_retrieval(tmp_path: Path, attention: str) -> None:
    """Published weights would give other scores, or train otherwise."""
    theirs = retrieval(attention)
    theirs.save_pretrained(tmp_path)
    ours = Blip2ForPretraining.from_pretrained(tmp_path)
    inputs = batch()
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    close = {"rtol": 0, "atol": 1e-5}

    expected = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    image = ours.encode_image(inputs["pixel_values"])
    actual = ours.itm_logits(image, **text)
    torch.testing.assert_close(actual, expected, **close)
    weights = draw(*actual.shape)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    trained = {n: g for n, g in gradients(theirs).items() if "vision_model.e" not in n}
    assert_same_gradients(gradients(ours), trained)

    expected = theirs(**inputs).logits_per_image
    z, t = (
        ours.image_features(ours.encode_image(inputs["pixel_values"])),
        ours.text_features(**text),
    )
    actual = ours.itc_scores(z, t)
    torch.testing.assert_close(actual, expected, **close)
    weights = draw(*actual.shape)
    for model in (ours, theirs):
        model.zero_grad()
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    trained = {n: g for n, g in gradients(theirs).items() if "vision_model.e" not in n}
    assert_same_gradients(gradients(ours), trained)


def test_transformers_round_trip(tmp_path: Path) -> None:
    """Weights would change on the way, or the folder not load in transformers."""
    theirs = retrieval("sdpa")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = Blip2ForPretraining.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert set(info["missing_keys"]) == OURS_ALONE and not info["unexpected_keys"]
    assert ours.temp.item() == pytest.approx(0.07)
    assert ours.state_dict().keys() - theirs.state_dict().keys() == OURS_ALONE
    shared = {k: v for k, v in ours.state_dict().items() if k not in OURS_ALONE}
    assert_same(shared, theirs.state_dict())

    ours.save_pretrained(tmp_path / "ours")
    back, info = Blip2ForImageTextRetrieval.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == OURS_ALONE
    assert_same(back.state_dict(), theirs.state_dict())
    inputs = batch()
    logits = theirs(**inputs).logits_per_image
    torch.testing.assert_close(back.eval()(**inputs).logits_per_image, logits)


def test_own_round_trip(tmp_path: Path) -> None:
    """A trained model would not come back from disk."""
    model = small_stage1(vision_norm_eps=1e-5, lavis_gradients=True)
    model.save_pretrained(tmp_path)
    back = Blip2ForPretraining.from_pretrained(tmp_path)
    assert_same(back.state_dict(), model.state_dict())
    assert back.config.lavis_gradients and back.config.vision_norm_eps == 1e-5
    inputs = batch()
    loss = model(**inputs, negatives_seed=1).loss
    assert torch.equal(back(**inputs, negatives_seed=1).loss, loss)


def test_from_pretrained_is_strict(tmp_path: Path) -> None:
    """transformers would initialise lost weights at random after a warning."""
    small_stage1().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["stray"] = state.pop("itm_head.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: itm_head\.weight; unexpected: stray"):
        Blip2ForPretraining.from_pretrained(tmp_path)
    loaded = Blip2ForPretraining.from_pretrained(tmp_path, strict=False)
    assert torch.equal(loaded.query_tokens, state["query_tokens"])


# ---- LAVIS


def lavis_bert(text: bool = True, embeddings: bool = True) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of LAVIS's ``Qformer.bert``, as its classes name them."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int = HIDDEN) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    root = "Qformer.bert"
    if embeddings:
        shapes[f"{root}.embeddings.position_ids"] = (1, POSITIONS)
        shapes[f"{root}.embeddings.word_embeddings.weight"] = (VOCABULARY, HIDDEN)
        shapes[f"{root}.embeddings.position_embeddings.weight"] = (POSITIONS, HIDDEN)
    norm(f"{root}.embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"{root}.encoder.layer.{i}"
        for kind in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            source = HIDDEN if kind == "attention" else WIDTH
            linear(f"{layer}.{kind}.self.query", HIDDEN, HIDDEN)
            linear(f"{layer}.{kind}.self.key", source, HIDDEN)
            linear(f"{layer}.{kind}.self.value", source, HIDDEN)
            linear(f"{layer}.{kind}.output.dense", HIDDEN, HIDDEN)
            norm(f"{layer}.{kind}.output.LayerNorm")
        for suffix in ("", "_query") if text else ("_query",):
            linear(f"{layer}.intermediate{suffix}.dense", HIDDEN, INNER)
            linear(f"{layer}.output{suffix}.dense", INNER, HIDDEN)
            norm(f"{layer}.output{suffix}.LayerNorm")
    return shapes


def lavis_vision() -> dict[str, tuple[int, ...]]:
    """The image encoder's own file: EVA's keys."""
    width, inner = VISION["hidden_size"], VISION["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(VISION["num_hidden_layers"]):
        for name, shape in {
            "norm1.weight": (width,), "norm1.bias": (width,),
            "norm2.weight": (width,), "norm2.bias": (width,),
            "attn.q_bias": (width,), "attn.v_bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,),
            "mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
    return shapes


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def lavis_stage1() -> dict[str, Tensor]:
    shapes = {f"visual_encoder.{name}": shape for name, shape in lavis_vision().items()}
    shapes |= lavis_bert()
    shapes |= {
        "query_tokens": (1, QUERIES, HIDDEN),
        "temp": (),
        "ln_vision.weight": (WIDTH,),
        "ln_vision.bias": (WIDTH,),
        "vision_proj.weight": (16, HIDDEN),
        "vision_proj.bias": (16,),
        "text_proj.weight": (16, HIDDEN),
        "text_proj.bias": (16,),
        "itm_head.weight": (2, HIDDEN),
        "itm_head.bias": (2,),
        "Qformer.cls.predictions.bias": (VOCABULARY,),
        "Qformer.cls.predictions.transform.dense.weight": (HIDDEN, HIDDEN),
        "Qformer.cls.predictions.transform.dense.bias": (HIDDEN,),
        "Qformer.cls.predictions.transform.LayerNorm.weight": (HIDDEN,),
        "Qformer.cls.predictions.transform.LayerNorm.bias": (HIDDEN,),
    }
    state = fill(shapes)
    head = "Qformer.cls.predictions"
    words = state["Qformer.bert.embeddings.word_embeddings.weight"]
    return state | {
        f"{head}.decoder.weight": words.clone(),
        f"{head}.decoder.bias": state[f"{head}.bias"].clone(),
    }


def test_lavis_stage1(tmp_path: Path) -> None:
    """Published .pth files would not load, load in part, or change on the way back."""
    state = lavis_stage1()
    torch.save({"model": state, "epoch": 3}, tmp_path / "blip2.pth")
    settings = config(vision_norm_eps=1e-5)
    model = Blip2ForPretraining.from_lavis(tmp_path / "blip2.pth", settings)
    assert not model.training and model.vision_model.post_layernorm.eps == 1e-5
    attention = model.vision_model.encoder.layers[1].self_attn
    q, k, v = attention.qkv.bias.chunk(3)
    assert torch.equal(q, state["visual_encoder.blocks.1.attn.q_bias"]) and not k.any()
    assert torch.equal(v, state["visual_encoder.blocks.1.attn.v_bias"])
    name = "Qformer.bert.encoder.layer.2.crossattention.self.value.weight"
    assert torch.equal(model.qformer.encoder.layer[2].crossattention.attention.value.weight,
                       state[name])  # fmt: skip
    back = model.to_lavis()
    del state["Qformer.bert.embeddings.position_ids"]
    assert_same(back, state)
    assert torch.equal(model.temp, state["temp"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "temp" in trained and "vision_model.embeddings.class_embedding" not in trained
    # LAVIS leaves frozen weights out; the encoder's file brings them.
    small = {name: v for name, v in state.items() if not name.startswith("visual_encoder.")}
    with pytest.raises(ValueError, match=r"missing: vision_model\.embeddings\.class_embedding"):
        Blip2ForPretraining.from_lavis(small, settings)
    vision = {
        name.removeprefix("visual_encoder."): value
        for name, value in state.items()
        if name.startswith("visual_encoder.")
    }
    again = Blip2ForPretraining.from_lavis(small, settings, vision=vision)
    assert_same(again.state_dict(), model.state_dict())


def test_wrong_lavis_keys_raise() -> None:
    """A damaged or foreign checkpoint would load in part, and the model run with random weights."""
    good = lavis_stage1()
    lost = "Qformer.bert.encoder.layer.1.intermediate_query.dense.bias"
    bad = {k: v for k, v in good.items() if k != lost}
    with pytest.raises(ValueError, match=r"missing: qformer\.encoder\.layer\.1\.intermediate_q"):
        Blip2ForPretraining.from_lavis(bad, config())
    with pytest.raises(ValueError, match=r"unexpected: Qformer\.pooler"):
        from_lavis(good | {"Qformer.pooler": torch.zeros(1)})
    bad = {k: v for k, v in good.items() if not k.endswith("0.attn.v_bias")}
    with pytest.raises(ValueError, match=r"missing: visual_encoder\.blocks\.0\.attn\.v_bias"):
        from_lavis(bad)
    words = "Qformer.cls.predictions.decoder.weight"
    with pytest.raises(ValueError, match="to which it is tied"):
        from_lavis(good | {words: good[words] + 1})
    with pytest.raises(ValueError, match=r"misshapen: query_tokens \[1, 9, 32\] instead of"):
        Blip2ForPretraining.from_lavis(good | {"query_tokens": draw(1, 9, HIDDEN)}, config())
    with pytest.raises(ValueError, match="language must be one of"):
        to_lavis({}, language="gpt")
    with pytest.raises(ValueError, match=r"unexpected: stray"):
        to_lavis({"stray": torch.zeros(1)})


LANGUAGES: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16,
            "num_attention_heads": 2, "vocab_size": 40, "word_embed_proj_dim": 16},
    "t5": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1,
           "num_decoder_layers": 1, "num_heads": 2, "vocab_size": 40},
    "llm": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40},
}  # fmt: skip


@pytest.mark.parametrize(
    ("language", "instruct"), [("opt", False), ("t5", False), ("t5", True), ("llm", True)]
)
def test_lavis_with_a_language_model(language: str, instruct: bool) -> None:
    """Stage 2's and InstructBLIP's files would miss keys of transformers' classes."""
    fields = {
        "vision_config": VISION,
        "qformer_config": {**SIZES, **({"vocab_size": VOCABULARY, "max_position_embeddings":
                                        POSITIONS} if instruct else {})},
        "text_config": LANGUAGES[language],
        "num_query_tokens": QUERIES,
    }  # fmt: skip
    theirs: nn.Module
    if instruct:
        theirs = InstructBlipForConditionalGeneration(InstructBlipConfig(**fields))
    else:
        theirs = Blip2ForConditionalGeneration(TransformersConfig(**fields))
    redraw(theirs)
    expected = theirs.state_dict()
    shapes = {f"visual_encoder.{name}": shape for name, shape in lavis_vision().items()}
    shapes |= lavis_bert(text=instruct, embeddings=instruct)
    shapes |= {"ln_vision.weight": (WIDTH,), "ln_vision.bias": (WIDTH,)}
    shapes |= {"query_tokens": (1, QUERIES, HIDDEN)}
    state = fill(shapes)
    for name, value in expected.items():
        for ours, lavis in (("language_model", "model"), ("language_projection", "proj")):
            if name.startswith(f"{ours}."):
                state[name.replace(ours, f"{language}_{lavis}", 1)] = value
    mapped = from_lavis(state, instruct=instruct)
    theirs.load_state_dict(mapped, strict=True)
    back = to_lavis(theirs.state_dict(), instruct=instruct, language=language)
    state.pop("Qformer.bert.embeddings.position_ids", None)
    assert_same(back, state)
    assert TEXT  # sizes shared with stage 1
