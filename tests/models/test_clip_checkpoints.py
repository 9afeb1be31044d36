"""CLIP's checkpoints: open_clip's own classes, OpenAI's files, transformers' folders, ours."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPModel

from mmkern.models import clip as builders
from mmkern.models.clip import CLIP
from tests.models.small_clip import (
    CONTEXT,
    END,
    VOCABULARY,
    assert_same,
    batch,
    shake,
    small,
    small_resnet,
    transformers_model,
)

LAYOUTS = ("openai", "open_clip", "open_clip_custom_text", "transformers")


@pytest.fixture(scope="module")
def open_clip() -> Any:
    """open_clip's model module, its folder mounted under another name: torchvision is not there."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("open_clip_torch is not installed")
    package = ModuleType("open_clip_oracle")
    package.__path__ = [str(Path(spec.origin).parent)]
    stubs = {name: ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    misc = ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "open_clip_oracle", package)
        for name, stub in {**stubs, "torchvision.ops.misc": misc}.items():
            patch.setitem(sys.modules, name, stub)
        yield importlib.import_module("open_clip_oracle.model")


def open_clip_model(module: Any, kind: str, resnet: bool, pool: str = "tok") -> Any:
    vision = {"layers": (1, 2, 1, 1), "width": 8, "image_size": 64, "head_width": 64}
    if not resnet:
        vision = {"layers": 3, "width": 64, "image_size": 28, "head_width": 32, "patch_size": 14}
        vision |= {"mlp_ratio": 3.0, "pool_type": pool}
    text = {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 64,
        "heads": 1,
        "layers": 2,
    }
    torch.manual_seed(0)
    build = getattr(module, kind)
    return shake(build(24, module.CLIPVisionCfg(**vision), module.CLIPTextCfg(**text)))


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize(("resnet", "pool"), [(False, "tok"), (False, "avg"), (True, "tok")])
def test_is_open_clip(open_clip: Any, kind: str, resnet: bool, pool: str) -> None:
    """open_clip's checkpoints would not load, or give other features; ours would not load there."""
    theirs = open_clip_model(open_clip, kind, resnet, pool).eval()
    overrides = {} if resnet else {"vision_heads": 2, "vision_pool": pool}
    ours = CLIP.from_state_dict(theirs.state_dict(), quick_gelu=False, **overrides)
    images, ids = batch(64 if resnet else 28)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), **close)
    torch.testing.assert_close(ours.encode_text(ids), theirs.encode_text(ids), **close)
    layout = "open_clip_custom_text" if kind == "CustomTextCLIP" else "open_clip"
    back = ours.to_state_dict(layout)
    assert_same(back, theirs.state_dict())
    theirs.load_state_dict(back, strict=True)


def test_other_image_size_is_open_clips(open_clip: Any) -> None:
    """Weights taken to another resolution would have other positions than in open_clip."""
    theirs = open_clip_model(open_clip, "CLIP", False)
    text = open_clip.CLIPTextCfg(vocab_size=VOCABULARY, layers=1)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    for size in (14, 56):
        ours = CLIP.from_state_dict(state, quick_gelu=False, vision_heads=2, image_size=size)
        vision = open_clip.CLIPVisionCfg(
            layers=3, width=64, image_size=size, head_width=32, patch_size=14, mlp_ratio=3.0
        )
        resized, target = dict(state), open_clip.CLIP(24, vision, text)
        open_clip.resize_pos_embed(resized, target)
        expected = resized["visual.positional_embedding"]
        torch.testing.assert_close(ours.visual.positional_embedding.data, expected)
        assert ours.config.image_size == size
        assert ours.encode_image(torch.randn(1, 3, size, size)).shape == (1, 24)


@pytest.mark.parametrize("build", [small, small_resnet])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_equal(tmp_path: Path, build: Callable[[], CLIP], layout: str) -> None:
    """Saving for another library and loading again would change weights."""
    model = build()
    if layout == "transformers" and build is small_resnet:
        with pytest.raises(ValueError, match=r"no place for.*attnpool"):
            model.to_state_dict(layout)
        return
    save_file(model.to_state_dict(layout), tmp_path / "model.safetensors")
    back = CLIP.from_state_dict(
        tmp_path / "model.safetensors",
        quick_gelu=False,
        **({"vision_heads": 2} if build is small else {}),
    )
    assert_same(back.state_dict(), model.state_dict())
    ignored = {"init_logit_scale", "_name_or_path", "architectures", "dtype"}
    ours, theirs = back.config.to_dict(), model.config.to_dict()
    for name in ours.keys() - ignored:
        assert ours[name] == theirs[name], name
    assert not back.training


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    """A folder for transformers' users would not load there, or compute something else."""
    ours = small(quick_gelu=True).eval()
    ours.to_transformers().save_pretrained(tmp_path)
    theirs = CLIPModel.from_pretrained(tmp_path).eval()
    images, ids = batch()
    expected = theirs(pixel_values=images, input_ids=ids)
    actual = ours(pixel_values=images, input_ids=ids)
    torch.testing.assert_close(actual.image_features, expected.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.text_features, expected.text_embeds, rtol=0, atol=1e-5)
    # The file itself, with the position ids that older versions wrote.
    state = load_file(tmp_path / "model.safetensors")
    for tower in ("text", "vision"):
        state[f"{tower}_model.embeddings.position_ids"] = torch.arange(5)[None]
    back = CLIP.from_state_dict(state, quick_gelu=True, vision_heads=2)
    assert_same(back.state_dict(), ours.state_dict())


def openai_state(model: CLIP) -> dict[str, Tensor]:
    """What OpenAI published: matrices in fp16, norms in fp32, and three sizes."""
    state = {k: v.half() if v.ndim > 1 else v for k, v in model.state_dict().items()}
    sizes = {
        "input_resolution": model.config.image_size,
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
    }
    return state | {key: torch.tensor(value) for key, value in sizes.items()}


@pytest.mark.parametrize("build", [small, small_resnet])
def test_openai_state_dict_loads(build: Callable[[], CLIP]) -> None:
    """OpenAI's fp16 weights with their extra keys would be refused, or train in fp16."""
    model = build()
    state = openai_state(model)
    heads = {"vision_heads": 2} if build is small else {}
    loaded = CLIP.from_state_dict(state, **heads)
    assert loaded.config.quick_gelu
    for name, value in loaded.state_dict().items():
        assert not value.is_floating_point() or value.dtype == torch.float32
        torch.testing.assert_close(value, state[name].to(value.dtype), rtol=0, atol=0)
    assert set(state) >= {"input_resolution"}, "the caller's dictionary was changed"


class Holder(nn.Module):
    """A module tree with the tensors of a state dict, for a TorchScript archive of them."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = value
            else:
                self.register_buffer(head, value)
        for head, below in children.items():
            self.add_module(head, Holder(below))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore")
def test_files_load(tmp_path: Path) -> None:
    """OpenAI's JIT archive, or a training checkpoint of open_clip, would have to be unpacked."""
    model = small()
    state = openai_state(model)
    torch.jit.script(Holder(state)).save(tmp_path / "jit.pt")
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "t"
    )
    torch.save(state, tmp_path / "plain.pt")
    for name in ("jit.pt", "t", "plain.pt"):
        loaded = CLIP.from_state_dict(tmp_path / name, vision_heads=2)
        assert loaded.config.quick_gelu
        assert torch.equal(loaded.visual.proj, state["visual.proj"].float())


def test_activation_must_be_named() -> None:
    """OpenAI's weights would run with GELU (two points of accuracy lost, and no message)."""
    with pytest.raises(ValueError, match="quick_gelu=True"):
        CLIP.from_state_dict(small().state_dict(), vision_heads=2)
    with pytest.raises(ValueError, match="either config or overrides"):
        CLIP.from_state_dict(small().state_dict(), config=small().config, vision_heads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_keys_raise_with_their_names(layout: str) -> None:
    """A damaged or foreign checkpoint would load in part, and the model run with random weights."""
    good = small().to_state_dict(layout)
    lost = next(name for name in good if "layer_norm2.bias" in name or "ln_2.bias" in name)
    bad = {k: v for k, v in good.items() if k != lost} | {"visual.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing: .*unexpected: visual\.extra") as caught:
        CLIP.from_state_dict(bad, quick_gelu=False, vision_heads=2)
    assert lost.removeprefix("text.") in str(caught.value)


def test_wrong_shapes_and_unknown_layouts_raise() -> None:
    """A checkpoint of another size would fail without saying where."""
    state = small().state_dict()
    state["ln_final.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"misshapen: ln_final.weight \[3\] instead of \[64\]"):
        CLIP.from_state_dict(state, quick_gelu=False, vision_heads=2)
    with pytest.raises(ValueError, match=r"none of the layouts.*'encoder.weight'"):
        CLIP.from_state_dict({"encoder.weight": torch.zeros(1)}, quick_gelu=False)
    with pytest.raises(ValueError, match=r"missing key 'visual.conv1.weight'"):
        state = {k: v for k, v in small().state_dict().items() if k != "visual.conv1.weight"}
        CLIP.from_state_dict(state, quick_gelu=False)
    with pytest.raises(ValueError, match="layout must be one of"):
        small().to_state_dict("onnx")


def test_transformers_cannot_hold_every_model() -> None:
    """A model that CLIPModel cannot express would be exported as one that computes otherwise."""
    with pytest.raises(ValueError, match="a ResNet"):
        small_resnet().to_transformers()
    with pytest.raises(ValueError, match="'avg' pooling"):
        small(vision_pool="avg").to_transformers()
    theirs = transformers_model("sdpa", "gelu", END)
    theirs.config.text_config.hidden_act = "quick_gelu"
    theirs.config.vision_config.layer_norm_eps = 1e-6
    with pytest.raises(ValueError, match="hidden_act, layer_norm_eps"):
        CLIP.from_transformers(theirs)


@pytest.mark.parametrize("build", [small, small_resnet])
def test_save_pretrained_round_trip(tmp_path: Path, build: Callable[..., CLIP]) -> None:
    """A trained model would not come back from disk, by our class or by AutoModel."""
    model = build(eot_token_id=END).eval()
    model.save_pretrained(tmp_path)
    images, ids = batch(model.config.image_size)
    expected = model(images, ids)
    for loaded in (CLIP.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is CLIP
        assert_same(loaded.state_dict(), model.state_dict())
        actual = loaded(images, ids)
        assert torch.equal(actual.loss, expected.loss)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    # transformers' own CLIP is still found under its own configuration.
    assert type(AutoModel.from_config(transformers_model("sdpa", "gelu", 2).config)) is CLIPModel


def test_from_pretrained_is_strict(tmp_path: Path) -> None:
    """transformers would initialise lost weights at random after a warning."""
    model = small()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["stray"] = state.pop("visual.proj")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: visual\.proj; unexpected: stray"):
        CLIP.from_pretrained(tmp_path)
    loaded, info = CLIP.from_pretrained(tmp_path, strict=False, output_loading_info=True)
    assert set(info["missing_keys"]) == {"visual.proj"}
    # What is there is loaded, what is not has the paper's initialisation.
    assert torch.equal(loaded.visual.positional_embedding, model.visual.positional_embedding)
    assert torch.equal(loaded.token_embedding.weight, model.token_embedding.weight)
    assert loaded.visual.proj.std().item() == pytest.approx(64**-0.5, rel=0.2)


@pytest.mark.parametrize(
    ("name", "parameters", "embed_dim", "image_size"),
    [
        ("clip_vit_b_32", 151_277_313, 512, 224),
        ("clip_vit_b_16", 149_620_737, 512, 224),
        ("clip_vit_l_14", 427_616_513, 768, 224),
        ("clip_vit_l_14_336", 427_944_193, 768, 336),
        ("clip_rn50", 102_007_137, 1024, 224),
        ("clip_rn101", 119_688_033, 512, 224),
        ("clip_rn50x4", 178_300_601, 640, 288),
        ("clip_rn50x16", 290_979_217, 768, 384),
        ("clip_rn50x64", 623_258_305, 1024, 448),
    ],
)
def test_published_sizes(
    open_clip: Any, name: str, parameters: int, embed_dim: int, image_size: int
) -> None:
    """A published checkpoint would not fit the builder of its name."""
    with torch.device("meta"):
        model = getattr(builders, name)()
        config = model.config
        resnet = config.vision_patch_size is None
        layers = tuple(config.vision_layers) if resnet else config.vision_layers
        vision = open_clip.CLIPVisionCfg(
            layers=layers,
            width=config.vision_width,
            image_size=image_size,
            patch_size=config.vision_patch_size,
        )
        width = config.text_width
        text = open_clip.CLIPTextCfg(width=width, heads=width // 64, layers=12)
        theirs = open_clip.CLIP(embed_dim, vision, text, quick_gelu=True)
    assert sum(p.numel() for p in model.parameters()) == parameters
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}
    assert config.quick_gelu and config.embed_dim == embed_dim
