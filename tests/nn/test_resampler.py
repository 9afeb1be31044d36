"""The perceiver resampler against transformers' IDEFICS, and its embeddings and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from mmkern.nn.resampler import PerceiverResampler

WIDTH, HEADS, HEAD_WIDTH, LATENTS, DEPTH = 24, 2, 8, 4, 2


def shake(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.eval()


def ours(**options: Any) -> PerceiverResampler:
    sizes = {"depth": DEPTH, "latents": LATENTS, "heads": HEADS, "head_width": HEAD_WIDTH}
    return shake(PerceiverResampler(WIDTH, **sizes, **options))


def theirs(model: PerceiverResampler, activation: nn.Module | None) -> Any:
    """transformers' with our weights."""
    config = IdeficsConfig(vision_config={"embed_dim": WIDTH}, qk_layer_norms_perceiver=False)
    config.perceiver_config.qk_layer_norms_perceiver = False
    other = IdeficsPerceiverResampler(config, WIDTH, DEPTH, HEADS, HEAD_WIDTH, LATENTS)
    state = model.state_dict()
    with torch.no_grad():
        other.latents.copy_(state["latents"])
        other.layer_norm.load_state_dict(model.norm.state_dict())
        for block, layer in zip(other.blocks, model.layers, strict=True):
            attend, network = layer
            block[0].context_layer_norm.load_state_dict(attend.norm_media.state_dict())
            block[0].latents_layer_norm.load_state_dict(attend.norm_latents.state_dict())
            block[0].q_proj.weight.copy_(attend.to_q.weight)
            block[0].k_proj.weight.copy_(attend.to_kv.weight.chunk(2)[0])
            block[0].v_proj.weight.copy_(attend.to_kv.weight.chunk(2)[1])
            block[0].output_proj.weight.copy_(attend.to_out.weight)
            block[1].ln.load_state_dict(network[0].state_dict())
            block[1].fc.weight.copy_(network[1].weight)
            block[1].c_proj.weight.copy_(network[3].weight)
            if activation is not None:
                block[1].act = activation
    return other.eval()


def media(count: int = 3) -> Tensor:
    return torch.randn(count, 10, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 + 1


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_parity_with_idefics(activation: str) -> None:
    """The folded norm, or the order of keys and values, would give other latents or gradients."""
    model = ours(activation=activation).double()
    reference = theirs(model.float(), nn.GELU() if activation == "gelu" else None).double()
    model = model.double()
    x = media().double().requires_grad_()
    y = x.detach().clone().requires_grad_()
    out, expected = model(x), reference(y)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double()
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-9)
    attend, other = model.layers[1][0], reference.blocks[1][0]
    for grad, right in (
        (attend.norm_media.weight.grad, other.context_layer_norm.weight.grad),
        (attend.norm_media.bias.grad, other.context_layer_norm.bias.grad),
        (attend.to_kv.weight.grad.chunk(2)[1], other.v_proj.weight.grad),
        (model.latents.grad, reference.latents.grad),
    ):
        torch.testing.assert_close(grad, right, rtol=1e-8, atol=1e-9)


def test_in_fp32_and_under_autocast() -> None:
    """Folding γ into the projection would cost digits that the plain order keeps."""
    model = ours()
    exact = theirs(model, nn.GELU()).double()(media().double())
    torch.testing.assert_close(model(media()).double(), exact, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(media()).double()
    assert (half - exact).abs().max() < 0.1


def test_frames_and_places() -> None:
    """Frames of a video, or the pictures of a sample, could not be told apart."""
    model = ours(frames=3, media=5)
    x = media().view(3, 2, 5, WIDTH)
    places = torch.tensor([0, 1, 4])
    tables = model.frame_embs, model.media_time_embs
    by_hand = (x + tables[0][:2, None]).flatten(1, 2) + tables[1][places]
    plain = ours()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "embs" not in k})
    torch.testing.assert_close(model(x, places), plain(by_hand))
    with pytest.raises(ValueError, match="at most 3 frames, got 4"):
        model(torch.zeros(1, 4, 5, WIDTH), places[:1])
    with pytest.raises(ValueError, match=r"places must be \[3\], got None"):
        model(x)


def test_a_batch_of_no_pictures() -> None:
    """A batch of plain text would crash, or leave gradients out that DDP waits for."""
    model = ours()
    out = model(torch.zeros(0, 10, WIDTH))
    assert out.shape == (0, LATENTS, WIDTH)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_errors() -> None:
    """Sizes that cannot be would fail deep inside, without a name."""
    with pytest.raises(ValueError, match="latents must be at least 1, got 0"):
        PerceiverResampler(8, latents=0)
    with pytest.raises(ValueError, match="activation must be one of"):
        PerceiverResampler(8, activation="swish")
    with pytest.raises(ValueError, match=r"\[M, V, 24\]"):
        ours()(torch.zeros(2, 3, 7))
