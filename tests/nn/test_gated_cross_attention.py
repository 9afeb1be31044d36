"""Gated cross-attention against an einsum formula; who attends to which picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmkern.layout import RowIntervals
from mmkern.nn.gated_cross_attention import GatedCrossAttentionBlock, image_of_token

WIDTH, MEDIA, HEADS, HEAD_WIDTH, LATENTS, IMAGES = 16, 12, 2, 8, 3, 3
IMAGE = 9
# The second sample has text before its first picture, and one picture less.
IDS = torch.tensor([[9, 1, 9, 1, 1, 9, 1], [1, 1, 9, 1, 9, 1, 1]])


def block() -> GatedCrossAttentionBlock:
    torch.manual_seed(0)
    made = GatedCrossAttentionBlock(WIDTH, MEDIA, heads=HEADS, head_width=HEAD_WIDTH)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(torch.randn(value.shape) * 0.4)
    return made.double()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64)
    media = torch.randn(2 * IMAGES, LATENTS, MEDIA, generator=generator, dtype=torch.float64)
    return x, media


def run(made: Any, x: Tensor, media: Tensor, all_previous: bool = False) -> Tensor:
    mask = RowIntervals.media(
        image_of_token(IDS, IMAGE), LATENTS, IMAGES, all_previous=all_previous
    )
    index = torch.arange(2 * IMAGES).view(2, IMAGES)
    return made(x, *made.attn.keys_values(media, index), mask)


def by_einsum(made: Any, x: Tensor, media: Tensor, all_previous: bool) -> Tensor:
    """The formula, with a dense mask and rows of zeros where there is no picture."""
    attn = made.attn
    normed = F.layer_norm(x, (WIDTH,), attn.norm.weight, attn.norm.bias)
    split = (HEADS, HEAD_WIDTH)
    q = torch.einsum("btd,hed->bhte", normed, attn.to_q.weight.view(*split, WIDTH))
    seen = media.view(2, IMAGES * LATENTS, MEDIA)
    key, value = (w.view(*split, MEDIA) for w in attn.to_kv.weight.chunk(2))
    k, v = (torch.einsum("blc,hec->bhle", seen, w) for w in (key, value))
    scores = torch.einsum("bhte,bhle->bhtl", q, k) * HEAD_WIDTH**-0.5
    owner = torch.arange(1, IMAGES + 1).repeat_interleave(LATENTS)
    t = (IDS == IMAGE).cumsum(1)[:, None, :, None]
    allowed = (owner <= t) if all_previous else (owner == t)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    mixed = torch.einsum("bhtl,bhle->bthe", weights, v).flatten(2)
    x = x + made.attn_gate.tanh() * mixed @ attn.to_out.weight.T
    network = made.ff
    inner = F.layer_norm(x, (WIDTH,), network[0].weight, network[0].bias)
    inner = F.gelu(inner @ network[1].weight.T) @ network[3].weight.T
    return x + made.ff_gate.tanh() * inner


@pytest.mark.parametrize("all_previous", [False, True])
def test_equals_the_formula(all_previous: bool) -> None:
    """Outputs or gradients, those of the gates too, would be another model's."""
    made = block()
    x, media = (value.requires_grad_() for value in inputs())
    leaves = [x, media, *made.parameters()]
    out, expected = run(made, x, media, all_previous), by_einsum(made, x, media, all_previous)
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape, dtype=out.dtype)
    for grad, right in zip(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("all_previous", [False, True])
def test_a_picture_changes_its_own_segment(all_previous: bool) -> None:
    """Text would read pictures that are not its own, future ones or those of other samples."""
    made = block()
    x, media = inputs()
    before = run(made, x, media, all_previous)
    owner = image_of_token(IDS, IMAGE)
    for sample in range(2):
        for image in range(IMAGES):
            other = media.clone()
            other[sample * IMAGES + image] += 1.0
            changed = (run(made, x, other, all_previous) != before).any(-1)
            own = owner[sample] > image if all_previous else owner[sample] == image + 1
            expected = torch.zeros_like(changed)
            expected[sample] = own
            assert torch.equal(changed, expected)


@pytest.mark.parametrize("all_previous", [False, True])
def test_rows_before_any_picture_get_nothing(all_previous: bool) -> None:
    """They would read all pictures alike, as OpenFlamingo's do when all previous are seen."""
    made = block()
    x, media = inputs()
    with torch.no_grad():
        made.ff_gate.zero_()
    out = run(made, x, media, all_previous)
    assert torch.equal(out[1, :2], x[1, :2])
    assert not torch.equal(out[1, 2], x[1, 2])


def test_closed_gates_change_no_bit() -> None:
    """A language model would be another one before the first step of training."""
    made = block().float()
    made.reset_parameters()
    x, media = (value.float() for value in inputs())
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = run(made, x.to(dtype), media)
        assert out.dtype == dtype and torch.equal(out, x.to(dtype))


def test_segments_are_separate_attentions() -> None:
    """Skipping other pictures' tiles would not be the attention of each segment to its own."""
    made = block()
    x, media = inputs()
    out = run(made, x, media)
    keys, values = made.attn.keys_values(media[1:2])  # the second picture of the first sample
    torch.testing.assert_close(out[:1, 2:5], made(x[:1, 2:5], keys, values))
