"""What BLIP-2's stages share: configuration, image encoders, freezing, loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import Blip2Config as TransformersConfig
from transformers import Blip2ForImageTextRetrieval, Blip2VisionModel

from mmkern.models.blip2_base import Blip2Base, Blip2Config, ClipVisionConfig, vision_tower
from mmkern.models.clip import CLIP, CLIPConfig
from tests.models.small_blip2 import QUERIES, SIZES, TEXT, VISION, draw, redraw


class ImageSide(Blip2Base):
    """The shared part alone."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        self.build_image_side(config)
        self.post_init()


def config(**overrides: Any) -> Blip2Config:
    fields: dict[str, Any] = {
        "vision_config": VISION,
        "qformer_config": {**SIZES, **TEXT},
        "num_query_tokens": QUERIES,
    }
    return Blip2Config(**{**fields, **overrides})


def small(**overrides: Any) -> ImageSide:
    return redraw(ImageSide(config(**overrides)))


def test_configuration_reads_transformers():
    """A published config.json would be refused, or lose fields on the way."""
    theirs = TransformersConfig(num_query_tokens=7, qformer_config={"vocab_size": 30523})
    ours = Blip2Config.from_dict(theirs.to_dict())
    assert ours.num_query_tokens == 7 and ours.dec_token_id == 30522
    assert ours.vision_config.hidden_size == ours.qformer_config.encoder_hidden_size == 1408
    back = TransformersConfig.from_dict(ours.to_dict())
    assert back.qformer_config.to_dict() == theirs.qformer_config.to_dict()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_image_encoder_is_transformers(attention: str):
    """What the Q-Former reads would not be what published weights were trained on."""
    model = small()
    theirs = Blip2VisionModel(model.config.vision_config)
    theirs.set_attn_implementation(attention)
    theirs.load_state_dict(model.vision_model.state_dict())
    pixels = draw(2, 3, 28, 28)
    expected = theirs.eval()(pixels).last_hidden_state
    torch.testing.assert_close(model.encode_image(pixels), expected, rtol=0, atol=1e-5)


def test_frozen_encoder():
    """The image encoder would train or drop out, or its last norm would not train."""
    model = small().train()
    assert not model.vision_model.training and model.qformer.training
    model.encode_image(draw(2, 3, 28, 28)).square().sum().backward()
    for name, value in model.vision_model.named_parameters():
        assert value.requires_grad == name.startswith("post_layernorm")
        assert (value.grad is not None) == value.requires_grad
    free = small(freeze_vision=False).train()
    assert free.vision_model.training
    free.encode_image(draw(2, 3, 28, 28)).square().sum().backward()
    assert all(p.grad is not None for p in free.vision_model.parameters())


def test_norm_is_fp32_and_has_its_own_epsilon():
    """LAVIS's weights would be read with transformers' ε, or in the encoder's half precision."""
    model = small(vision_norm_eps=1e-5)
    assert model.vision_model.post_layernorm.eps == 1e-5
    assert small().vision_model.post_layernorm.eps == 1e-6
    tokens = draw(2, 5, 24).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.norm_image(tokens)
    torch.testing.assert_close(out, model.vision_model.post_layernorm(tokens.float()))
    assert out.dtype == torch.float32


def test_save_and_load(tmp_path: Path):
    """A trained model would come back with other weights, a trained encoder, or too few keys."""
    model = small(vision_norm_eps=1e-5)
    model.save_pretrained(tmp_path)
    back = ImageSide.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert back.vision_model.post_layernorm.eps == 1e-5
    trained = [name for name, p in back.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    # transformers' folders hold more than this part: all that is too much is named.
    redraw(Blip2ForImageTextRetrieval(config())).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"unexpected: embeddings\.position_embeddings"):
        ImageSide.from_pretrained(tmp_path / "theirs")
    ImageSide.from_pretrained(tmp_path / "theirs", strict=False)


def test_half_precision(tmp_path: Path):
    """A model loaded in half precision would run its Q-Former there (LAVIS: infinite losses)."""
    small().save_pretrained(tmp_path)
    model = ImageSide.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert model.qformer.encoder.layer[0].output_query.dense.weight.dtype == torch.float32
    assert model.vision_model.post_layernorm.weight.dtype == torch.float32
    assert model.encode_image(draw(2, 3, 28, 28)).dtype == torch.float32


CLIP_SIZES: dict[str, Any] = {
    "embed_dim": 16,
    "image_size": 28,
    "vision_layers": 3,
    "vision_width": 32,
    "vision_patch_size": 14,
    "vision_heads": 2,
    "text_width": 16,
    "text_heads": 2,
    "text_layers": 1,
    "vocab_size": 30,
    "quick_gelu": True,
}


def test_clip_tower(tmp_path: Path):
    """A trained CLIP could not serve as the image encoder, or would not come back from disk."""
    torch.manual_seed(0)
    sizes = CLIPConfig(**CLIP_SIZES)
    clip = CLIP(sizes).eval()
    model = small(vision_config=ClipVisionConfig.from_clip(sizes))
    model.vision_model.load_clip(clip)
    pixels = draw(2, 3, 28, 28)
    x = clip.visual.tokens(pixels)
    for block in clip.visual.transformer.resblocks[:2]:
        x = block(x)
    torch.testing.assert_close(model.image_tokens(pixels), x)
    assert model.encode_image(pixels).shape == (2, 5, 32)
    assert model.qformer.encoder_hidden_size == 32
    trained = {n for n, p in model.vision_model.named_parameters() if p.requires_grad}
    assert trained == {"post_layernorm.weight", "post_layernorm.bias"}
    model.save_pretrained(tmp_path)
    back = ImageSide.from_pretrained(tmp_path)
    assert isinstance(back.config.vision_config, ClipVisionConfig)
    assert torch.equal(back.encode_image(pixels), model.encode_image(pixels))


def test_bad_images_and_towers_raise():
    """Images of another size, or a ResNet, would fail somewhere inside the encoder."""
    with pytest.raises(ValueError, match=r"28, 28\], got \[2, 3, 32, 32\]"):
        small().encode_image(draw(2, 3, 32, 32))
    with pytest.raises(TypeError, match="floating point, got"):
        small().encode_image(torch.zeros(2, 3, 28, 28).long())
    with pytest.raises(ValueError, match="must leave a block of 3, got 3"):
        ClipVisionConfig.from_clip(CLIPConfig(**CLIP_SIZES), drop_layers=3)
    resnet = CLIPConfig(vision_layers=(1, 1, 1, 1), vision_patch_size=None)
    with pytest.raises(ValueError, match="needs a ViT"):
        ClipVisionConfig.from_clip(resnet)


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        # EVA ViT-g without its last block; CLIP's ViT-L/14 without its last.
        (lambda: config(vision_config=None).vision_config, 985_952_256),
        (ClipVisionConfig, 303_179_776 - 12_596_224),
    ],
)
def test_published_encoders(build: Any, parameters: int):
    """A published image encoder would not fit."""
    with torch.device("meta"):
        tower = vision_tower(build())
    assert sum(p.numel() for p in tower.parameters()) == parameters
