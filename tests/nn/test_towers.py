"""CLIP's towers against references written out here."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmkern.nn.towers import (
    AttentionPool2d,
    ModifiedResNet,
    QuickGELU,
    TextTransformer,
    Transformer,
    VisionTransformer,
    resize_positions,
)


def resnet(image_size: int = 64, layers: tuple[int, ...] = (1, 2, 1, 1)) -> ModifiedResNet:
    """A small one, in fp64, with weights that make each part matter."""
    torch.manual_seed(0)
    model = ModifiedResNet(image_size, width=8, layers=layers, heads=4, output_dim=12).double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "bn" in name or "downsample.1" in name:
                value.copy_(torch.randn_like(value) * 0.3 + ("weight" in name))
    return model


def text_tower(**options: int | None) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(50, 12, 32, 3, 2, 8, **options).double()


def norm(state: dict[str, Tensor], name: str, x: Tensor, train: bool) -> Tensor:
    """Batch norm from its definition; updates the running statistics in ``state``."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if train:
        count = x.numel() // x.shape[1]
        batch_mean = x.mean((0, 2, 3))
        batch_var = ((x - batch_mean[:, None, None]) ** 2).mean((0, 2, 3))
        mean.mul_(0.9).add_(0.1 * batch_mean.detach())
        var.mul_(0.9).add_(0.1 * batch_var.detach() * count / (count - 1))
        state[f"{name}.num_batches_tracked"] += 1
        mean, var = batch_mean, batch_var
    x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def average(x: Tensor, size: int) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c, h // size, size, w // size, size).mean((3, 5))


def resnet_reference(state: dict[str, Tensor], x: Tensor, train: bool) -> Tensor:
    """CLIP's ResNet from the paper's description and the state dict's names alone."""
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = F.conv2d(x, state[f"conv{i}.weight"], stride=stride, padding=1)
        x = norm(state, f"bn{i}", x, train).clamp(min=0)
    x = average(x, 2)
    for stage in (1, 2, 3, 4):
        depth = len({k.split(".")[1] for k in state if k.startswith(f"layer{stage}.")})
        for block in range(depth):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            shortcut = x
            if f"{name}.downsample.0.weight" in state:
                shortcut = F.conv2d(average(x, stride), state[f"{name}.downsample.0.weight"])
                shortcut = norm(state, f"{name}.downsample.1", shortcut, train)
            x = F.conv2d(x, state[f"{name}.conv1.weight"])
            x = norm(state, f"{name}.bn1", x, train).clamp(min=0)
            x = F.conv2d(x, state[f"{name}.conv2.weight"], padding=1)
            x = average(norm(state, f"{name}.bn2", x, train).clamp(min=0), stride)
            x = norm(state, f"{name}.bn3", F.conv2d(x, state[f"{name}.conv3.weight"]), train)
            x = (x + shortcut).clamp(min=0)
    tokens = torch.einsum("bchw->bhwc", x).reshape(x.shape[0], -1, x.shape[1])
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
    tokens = tokens + state["attnpool.positional_embedding"]
    heads, projected = 4, {}
    for part in "qkv":
        weight, bias = state[f"attnpool.{part}_proj.weight"], state[f"attnpool.{part}_proj.bias"]
        rows = torch.einsum("blc,dc->bld", tokens, weight) + bias
        projected[part] = rows.reshape(*rows.shape[:2], heads, -1)
    scores = torch.einsum("bhe,blhe->bhl", projected["q"][:, 0], projected["k"])
    weights = (scores / math.sqrt(projected["q"].shape[-1])).softmax(-1)
    pooled = torch.einsum("bhl,blhe->bhe", weights, projected["v"]).flatten(1)
    return pooled @ state["attnpool.c_proj.weight"].T + state["attnpool.c_proj.bias"]


@pytest.mark.parametrize("train", [True, False])
def test_resnet_is_its_reference(train: bool) -> None:
    """Published RN50 weights would give other features, or train with other batch statistics."""
    model = resnet().train(train)
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for name, _ in model.named_parameters():
        state[name].requires_grad_()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    if not train:
        for key, value in state.items():
            if "running" in key:
                value.copy_(torch.rand_like(value) + 0.5)
        model.load_state_dict(state)
    for _ in range(2):  # the second time with running statistics that have moved
        out, expected = model(images), resnet_reference(state, images, train)
        torch.testing.assert_close(out, expected)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, msg=name)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, state[name], msg=name)


def test_attention_pool_features_before_the_projection() -> None:
    """A linear probe would read projected features, or ones of another layer."""
    pool = AttentionPool2d(2, 16, 4, 6)
    x = torch.randn(3, 16, 2, 2)
    torch.testing.assert_close(pool.c_proj(pool(x, project=False)), pool(x))


def test_quick_gelu_is_its_formula() -> None:
    """Models trained with QuickGELU would lose accuracy under another approximation."""
    x = torch.linspace(-30, 30, 301, dtype=torch.float64, requires_grad=True)
    y = x * torch.sigmoid(1.702 * x)
    torch.testing.assert_close(QuickGELU()(x), y)
    (expected,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(torch.autograd.grad(QuickGELU()(x).sum(), x)[0], expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("row", [0, 4, "each"])
def test_last_block_for_one_row_is_the_whole_block(causal: bool, row: int | str) -> None:
    """Skipping rows that nobody reads would change the pooled feature or a gradient."""
    torch.manual_seed(0)
    model = Transformer(16, 3, 2, causal=causal).double()
    x = torch.randn(4, 7, 16, dtype=torch.float64)
    rows = torch.tensor([0, 6, 3, 3]) if row == "each" else torch.full((4,), int(row))
    whole = model(x)[torch.arange(4), rows]
    probe = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * probe).sum(), list(model.parameters()))
    short = model(x, row=rows if row == "each" else int(row))[:, 0]
    torch.testing.assert_close(short, whole)
    actual = torch.autograd.grad((short * probe).sum(), list(model.parameters()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_vision_transformer_pools() -> None:
    """pool="avg" would average the class token in, or skip the norm, and not load open_clip's."""
    torch.manual_seed(0)
    for pool in ("tok", "avg"):
        model = VisionTransformer(16, 4, 32, 2, 2, 8, pool=pool).double()
        images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
        x = patches.flatten(1, 2) @ model.conv1.weight.flatten(1).T
        x = torch.cat([model.class_embedding.expand(3, 1, -1), x], 1) + model.positional_embedding
        x = model.ln_post(model.transformer(model.ln_pre(x)))
        pooled = x[:, 0] if pool == "tok" else x[:, 1:].mean(1)
        torch.testing.assert_close(model(images), pooled @ model.proj)
        torch.testing.assert_close(model(images, project=False), pooled)


def test_text_behind_the_end_changes_nothing() -> None:
    """The pad id or the width a collator pads to would change a caption's feature or gradient."""
    model = text_tower()
    ids = torch.tensor([[48, 5, 49, 0, 0, 0], [48, 5, 6, 7, 49, 0]])
    other = torch.tensor([[48, 5, 49, 1, 2, 3, 4], [48, 5, 6, 7, 49, 9, 9]])
    assert torch.equal(model(ids), model(other))
    model(ids).sum().backward()
    assert model.positional_embedding.grad is not None
    assert model.positional_embedding.grad[5:].abs().max() == 0
    assert model.positional_embedding.grad[:5].abs().min() > 0


def test_text_is_causal_and_pools_the_end() -> None:
    """The feature would come from another token, or early tokens would see later ones."""
    model = text_tower()
    ids = torch.tensor([[48, 5, 49, 0, 0, 0], [48, 5, 6, 7, 49, 0]])
    x = model.token_embedding(ids) + model.positional_embedding[:6]
    hidden = model.ln_final(model.transformer(x)) @ model.text_projection
    torch.testing.assert_close(model(ids), hidden[torch.arange(2), torch.tensor([2, 4])])
    early = model.transformer(x[:, :3])
    torch.testing.assert_close(early, model.transformer(x)[:, :3])


def test_named_end_token_pools_its_first_occurrence() -> None:
    """With an end token below other ids the largest id would be pooled instead."""
    ids = torch.tensor([[48, 5, 7, 49, 7]])
    named = text_tower(eot_token_id=7)
    x = named.token_embedding(ids[:, :3]) + named.positional_embedding[:3]
    pooled = named.ln_final(named.transformer(x))[:, 2] @ named.text_projection
    torch.testing.assert_close(named(ids), pooled)


def test_text_initialisation_is_the_papers() -> None:
    """Training from scratch would start elsewhere than in the paper (and diverge when deep)."""
    torch.manual_seed(0)
    width, layers = 128, 8
    model = TextTransformer(5000, 77, width, layers, 2, 64)
    residual = width**-0.5 * (2 * layers) ** -0.5
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": width**-0.5,
        "attn.in_proj_weight": width**-0.5,
        "attn.out_proj.weight": residual,
        "mlp.c_fc.weight": (2 * width) ** -0.5,
        "mlp.c_proj.weight": residual,
    }
    seen = set()
    for name, value in model.named_parameters():
        for suffix, deviation in expected.items():
            if name.endswith(suffix):
                seen.add(suffix)
                assert value.std().item() == pytest.approx(deviation, rel=0.05), name
                assert abs(value.mean().item()) < 4 * deviation / value.numel() ** 0.5, name
                # Normal, not uniform: kurtosis 3.
                assert ((value / deviation) ** 4).mean().item() == pytest.approx(3, rel=0.2), name
        if "ln_" in name or name.endswith(("in_proj_bias", "out_proj.bias")):
            assert torch.equal(value, torch.full_like(value, float("ln_" in name and "we" in name)))
    assert seen == expected.keys()


def test_vision_initialisation_is_the_papers() -> None:
    """The image tower would start with transformers' initialisation, which is not the paper's."""
    torch.manual_seed(0)
    width = 128
    model = VisionTransformer(64, 8, width, 4, 2, 96)
    for value in (model.class_embedding, model.positional_embedding, model.proj):
        assert value.std().item() == pytest.approx(width**-0.5, rel=0.2)
    for block in model.transformer.resblocks:
        attention = block.attn
        bound = (6 / (width + 3 * width)) ** 0.5  # Xavier, as MultiheadAttention does
        assert attention.in_proj_weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert attention.out_proj.weight.abs().max().item() == pytest.approx(width**-0.5, rel=0.01)
        assert not attention.in_proj_bias.any() and not attention.out_proj.bias.any()
        assert block.mlp.c_proj.weight.abs().max().item() == pytest.approx(
            (4 * width) ** -0.5, rel=0.01
        )


def test_resnet_initialisation_is_the_papers() -> None:
    """Residual branches would not start at zero, and the attention pool at another scale."""
    torch.manual_seed(0)
    model = ModifiedResNet(64, 16, (1, 2, 1, 1), 8, 64)
    branches = [v for k, v in model.named_parameters() if k.endswith("bn3.weight") and "layer" in k]
    assert len(branches) == 5 and not any(v.any() for v in branches)
    assert model.bn3.weight.eq(1).all()
    for part in ("q", "k", "v", "c"):
        weight = model.attnpool.get_submodule(f"{part}_proj").weight
        assert weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert model.attnpool.positional_embedding.std().item() == pytest.approx(512**-0.5, rel=0.1)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (7, 12)])
def test_positions_are_resampled_as_pillow_does(old: int, new: int) -> None:
    """A model taken to another resolution would read positions shifted or aliased."""
    image = pytest.importorskip("PIL.Image")
    positions = torch.randn(old * old + 1, 5)
    resized = resize_positions(positions, new)
    assert torch.equal(resized[0], positions[0])
    for channel in range(5):
        plane = image.fromarray(positions[1:, channel].reshape(old, old).numpy(), mode="F")
        expected = torch.tensor(list(plane.resize((new, new), image.Resampling.BICUBIC).getdata()))
        torch.testing.assert_close(resized[1:, channel], expected, rtol=1e-4, atol=1e-5)


def test_set_image_size() -> None:
    """After a change of resolution the model would still take the old images only."""
    vit, res = VisionTransformer(16, 4, 32, 1, 2, 8), resnet()
    before = vit.positional_embedding.detach().clone()
    vit.set_image_size(24)
    assert vit(torch.randn(1, 3, 24, 24)).shape == (1, 8)
    vit.set_image_size(24)
    assert vit.positional_embedding.shape == (37, 32)
    assert torch.equal(vit.positional_embedding[0], before[0])
    res.set_image_size(96)
    assert res(torch.randn(2, 3, 96, 96)).shape == (2, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_towers_take_float_images(dtype: torch.dtype) -> None:
    """A model in half precision would refuse what every image transform gives."""
    images = torch.randn(2, 3, 64, 64)
    for tower in (VisionTransformer(64, 16, 32, 1, 2, 8), resnet().eval()):
        assert tower.to(dtype)(images).dtype == dtype


def test_towers_compile_whole() -> None:
    """torch.compile would break the graph at the checks or at the pooled row."""
    vit, text = VisionTransformer(16, 4, 32, 2, 2, 8), text_tower()
    images, ids = torch.randn(2, 3, 16, 16), torch.tensor([[48, 5, 49, 0], [48, 5, 6, 49]])
    for model, argument in ((vit, images), (text, ids)):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(argument), model(argument))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 16, 17), ValueError, r"\[batch, 3, 16, 16\], got \[2, 3, 16, 17\]"),
        (torch.zeros(3, 16, 16), ValueError, r"got \[3, 16, 16\]"),
        (torch.zeros(2, 1, 16, 16), ValueError, r"got \[2, 1, 16, 16\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), TypeError, "uint8"),
    ],
)
def test_bad_images_raise(images: Tensor, error: type[Exception], message: str) -> None:
    """Wrong images would fail deep inside, or silently lose rows that no patch covers."""
    with pytest.raises(error, match=message):
        VisionTransformer(16, 4, 32, 1, 2, 8)(images)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 13, dtype=torch.long), "1 to 12 columns.*got 13"),
        (torch.zeros(2, 0, dtype=torch.long), "got 0"),
        (torch.tensor([[48, 50]]), r"\[0, 50\).*48 to 50"),
        (torch.tensor([[-1, 49]]), "-1 to 49"),
        (torch.zeros(12, dtype=torch.long), r"\[batch, length\]"),
        (torch.zeros(2, 3), "float32"),
    ],
)
def test_bad_ids_raise(ids: Tensor, message: str) -> None:
    """Wrong ids would index out of range, on a GPU with no more than a device-side assertion."""
    with pytest.raises(ValueError, match=message):
        text_tower()(ids)


def test_missing_end_token_raises() -> None:
    """A caption cut without its end token would be pooled at its first token."""
    with pytest.raises(ValueError, match=r"input_ids\[1\] has no end token 7"):
        text_tower(eot_token_id=7)(torch.tensor([[48, 7], [48, 6]]))


def test_impossible_sizes_raise() -> None:
    """Sizes that cannot be built would give a model that fails at its first image."""
    with pytest.raises(ValueError, match="patch_size 32"):
        VisionTransformer(16, 32, 32, 1, 2, 8)
    with pytest.raises(ValueError, match="multiple of 32"):
        resnet(image_size=100)
    with pytest.raises(ValueError, match="four positive"):
        resnet(layers=(1, 1, 1))
    with pytest.raises(ValueError, match="pool"):
        VisionTransformer(16, 4, 32, 1, 2, 8, pool="max")
    with pytest.raises(ValueError, match="heads 3"):
        VisionTransformer(16, 4, 32, 1, 3, 8)
    with pytest.raises(ValueError, match="layers"):
        VisionTransformer(16, 4, 32, 0, 2, 8)


def test_empty_batch() -> None:
    """The last, empty chunk of an evaluation would raise."""
    assert VisionTransformer(16, 4, 32, 1, 2, 8)(torch.zeros(0, 3, 16, 16)).shape == (0, 8)
    assert text_tower()(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 8)
