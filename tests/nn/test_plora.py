"""nn.PLoRALinear: initialisation, ordinary LoRA around it, files, and ranks without an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkern.layout import VisualSpans
from mmkern.nn import PLoRALinear
from mmkern.nn.plora import adapter_state, export_peft, load_adapters, save_adapters
from tests.testing import run_ranks

SPANS = VisualSpans.from_lengths([2, 9], [4, 3], (2, 8))


def filled(layer: PLoRALinear) -> PLoRALinear:
    """With an adapter that does something."""
    nn.init.normal_(layer.Plora_B.weight)
    return layer


class Block(nn.Module):
    """Layers of mixed ranks under the decoder's names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wqkv = filled(PLoRALinear(6, 10, bias=False, rank=3, alpha=6))
        self.wo = filled(PLoRALinear(10, 6, rank=5))

    def forward(self, x: Tensor, spans: VisualSpans | None) -> Tensor:
        return self.wo(self.wqkv(x, spans).relu(), spans)


@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_fresh_adapter_changes_nothing(adapter_dtype: torch.dtype | None):
    """Upstream draws B at random: its first step starts from a damaged language model."""
    linear = nn.Linear(6, 10).bfloat16()
    layer = PLoRALinear.wrap(linear, 4, alpha=8, adapter_dtype=adapter_dtype)
    x = torch.randn(2, 8, 6).bfloat16()
    assert torch.equal(layer(x, SPANS), linear(x)) and torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert layer.scaling == 2.0 and layer.Plora_A.weight.abs().max() > 0
    assert layer.Plora_A.weight.dtype == layer.Plora_B.weight.dtype
    assert layer.Plora_B.weight.dtype == (adapter_dtype or torch.bfloat16)
    assert layer.Plora_A.weight.abs().max() <= 6**-0.5 * 1.01  # kaiming uniform, a = √5
    layer(x, SPANS).float().sum().backward()
    assert layer.Plora_B.weight.grad.any()  # yet it learns


def test_visual_rows_only():
    """The layer must be the formula, dropout only while it trains."""
    torch.manual_seed(1)
    layer = filled(PLoRALinear(6, 10, rank=4, alpha=2, dropout=0.5)).eval()
    x = torch.randn(2, 8, 6)
    a, b = layer.Plora_A.weight, layer.Plora_B.weight
    visual = SPANS.to_mask()[..., None]
    expected = F.linear(x, layer.weight, layer.bias) + visual * 0.5 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x, SPANS), expected)
    torch.testing.assert_close(layer(x, SPANS.to_mask()), expected)
    dropped = layer.train()(x, SPANS)
    changed = (dropped != expected).any(-1)
    assert changed[SPANS.to_mask()].any() and torch.equal(dropped[0, 6:], layer(x, None)[0, 6:])


def test_layers_together():
    """q, k and v share one read of x; their outputs must be those of three layers."""
    torch.manual_seed(1)
    layers = [filled(PLoRALinear(6, n, rank=r, alpha=2)) for n, r in ((10, 3), (4, 8), (4, 1))]
    x = torch.randn(2, 8, 6)
    for got, layer in zip(PLoRALinear.together(layers, x, SPANS), layers, strict=True):
        torch.testing.assert_close(got, layer(x, SPANS))
    layers[1].dropout = 0.1
    with pytest.raises(ValueError, match=r"one dropout, got \[0.0, 0.1\]"):
        PLoRALinear.together(layers, x, SPANS)


class Lora(nn.Module):
    """How PEFT adds LoRA: calls the layer with whatever it was given, then adds to every row."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs) + self.lora_B(self.lora_A(x))


def test_with_ordinary_lora():
    """Upstream's fine-tuning trains LoRA on all rows on top: both must act and both learn."""
    torch.manual_seed(1)
    layer = filled(PLoRALinear(6, 10, rank=4))
    both, x = Lora(layer), torch.randn(2, 8, 6)
    y = both(x, spans=SPANS)
    torch.testing.assert_close(y, layer(x, SPANS) + both.lora_B(both.lora_A(x)))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in both.parameters())


def test_released_keys_and_files(tmp_path: Path):
    """Released checkpoints name Plora_A and Plora_B: other names load nothing and say nothing."""
    model, other = Block(), Block()
    assert set(model.state_dict()) == {
        "wqkv.weight", "wqkv.Plora_A.weight", "wqkv.Plora_B.weight",
        "wo.weight", "wo.bias", "wo.Plora_A.weight", "wo.Plora_B.weight",
    }  # fmt: skip
    path = tmp_path / "adapters.safetensors"
    save_adapters(model, path)
    for layer in (other.wqkv, other.wo):
        layer.reset_adapter()
    load_adapters(other, path)
    for key, values in adapter_state(model).items():
        assert torch.equal(values, other.state_dict()[key])
    x = torch.randn(2, 8, 6)
    assert torch.equal(model(x, SPANS), other(x, SPANS))


def test_files_that_do_not_fit_are_refused(tmp_path: Path):
    """A half-loaded adapter trains on, and nobody knows from where."""
    model, path = Block(), tmp_path / "adapters.safetensors"
    save_adapters(model, path)
    other = Block()
    other.wqkv = PLoRALinear(6, 10, bias=False, rank=4, alpha=8)
    before = other.wo.Plora_A.weight.clone()
    with pytest.raises(ValueError, match=r"wqkv.Plora_A.weight has shape \(3, 6\), the model's"):
        load_adapters(other, path)
    other.wqkv = PLoRALinear(6, 10, bias=False, rank=3, alpha=3)
    with pytest.raises(ValueError, match=r"wqkv was trained at scale 2.0, not 1.0"):
        load_adapters(other, path)
    other.wqkv = nn.Linear(6, 10)
    with pytest.raises(ValueError, match=r"wqkv.Plora_B.weight is unknown"):
        load_adapters(other, path)
    assert torch.equal(before, other.wo.Plora_A.weight)
    with pytest.raises(ValueError, match="Linear has no PLoRALinear"):
        save_adapters(nn.Linear(2, 2), path)


def test_peft_export_says_that_it_is_visual_only(tmp_path: Path):
    """Read as plain LoRA it would change text too: the files must say so, and carry each rank."""
    from safetensors import safe_open

    model = Block()
    export_peft(model, tmp_path / "peft", "some/base")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["plora_visual_only"] is True
    assert config["rank_pattern"] == {"wqkv": 3, "wo": 5}
    assert config["alpha_pattern"] == {"wqkv": 6.0, "wo": 5.0}
    assert config["target_modules"] == ["wo", "wqkv"]
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["plora_visual_only"] == "true"
        values = file.get_tensor("base_model.model.wqkv.lora_A.weight")
        assert torch.equal(values, model.wqkv.Plora_A.weight) and len(file.keys()) == 4
    model.wo.dropout = 0.5
    with pytest.raises(ValueError, match="one dropout"):
        export_peft(model, tmp_path)
    with pytest.raises(ValueError, match="under some name"):
        export_peft(model.wo, tmp_path)


def test_merge_says_why_not():
    """Merged, the adapter would silently change every answer to text."""
    with pytest.raises(NotImplementedError, match="visual rows only"):
        PLoRALinear(2, 2, rank=1).merge()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PLoRALinear(2, 2, rank=0), ValueError, "rank must be at least 1, got 0"),
        (lambda: PLoRALinear(2, 2, rank=1, dropout=2.0), ValueError, r"in \[0, 1\], got 2.0"),
        (lambda: PLoRALinear.wrap(nn.ReLU(), 2), TypeError, "expected nn.Linear, got ReLU"),
    ],
)
def test_bad_arguments(build: Any, error: type[Exception], message: str):
    """What cannot be honoured is refused at construction."""
    with pytest.raises(error, match=message):
        build()


def _ranked(rank: int, world: int) -> dict[str, Tensor]:
    """One step under DDP; only the last rank has an image."""
    model = nn.parallel.DistributedDataParallel(Block())
    spans = SPANS if rank == world - 1 else VisualSpans.all_text((2, 8))
    x = torch.randn(world, 2, 8, 6, generator=torch.Generator().manual_seed(4))[rank]
    model(x, spans).square().mean().backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


def test_a_rank_without_images():
    """DDP waits for every gradient: a rank of text must give zeros, not nothing, or all hang."""
    results = run_ranks(2, _ranked)
    model = Block()
    x = torch.randn(2, 2, 8, 6, generator=torch.Generator().manual_seed(4))
    losses = [model(x[0], None).square().mean(), model(x[1], SPANS).square().mean()]
    (sum(losses) / 2).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(results[0][name], parameter.grad)
