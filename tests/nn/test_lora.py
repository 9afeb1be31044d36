"""Ordinary LoRA: its formula, gradients, what it wraps and what it merges to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmkern.nn.lora import LoRALinear, add_lora
from tests.testing import assert_within_budget


def layer(**options: object) -> LoRALinear:
    torch.manual_seed(0)
    made = LoRALinear(7, 5, rank=3, alpha=6.0, **options)  # type: ignore[arg-type]
    nn.init.normal_(made.lora_B.weight)
    return made


def plain(made: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """y = Wx + b + 2 B A x, in plain PyTorch."""
    inner = x @ made.lora_A.weight.T
    base = x @ made.weight.T + made.bias
    return base + 2.0 * (inner @ made.lora_B.weight.T)


def test_it_computes_lora_on_every_row() -> None:
    """The adapter would miss rows, or have another scale than it was trained with."""
    made, x = layer(), torch.randn(2, 4, 7)
    exact = plain(made.double(), x.double()).detach()
    assert_within_budget(made.float()(x).detach(), plain(made, x).detach(), exact)
    names = [name for name, _ in made.named_parameters()]
    found = torch.autograd.grad(made(x).square().sum(), list(made.parameters()))
    expected = torch.autograd.grad(plain(made, x).square().sum(), list(made.parameters()))
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert made(x[:, :0]).shape == (2, 0, 5)


def test_new_adapters_change_nothing_and_share() -> None:
    """A model would change by getting adapters, or lose the weights that it was trained with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 4, bias=False)))
    x = torch.randn(3, 6)
    expected, weight = model(x), model[1][0].weight
    assert add_lora(model, ["0"], 2, 4.0, 0.5) == ["0", "1.0"]
    assert model[1][0].weight is weight and model[1][0].bias is None
    assert torch.equal(model.eval()(x), expected)
    nn.init.normal_(model[1][0].lora_B.weight)
    assert not torch.equal(model(x), expected)
    assert not torch.equal(model.train()(x), model(x)), "dropout"
    with pytest.raises(ValueError, match=r"no layers \['up_proj'\]"):
        add_lora(model, ["0", "up_proj"], 2)


def test_merged_layer_computes_the_same() -> None:
    """What is served after merging would not be what was trained."""
    made, x = layer(), torch.randn(4, 7)
    torch.testing.assert_close(made.merged()(x), made(x), rtol=1e-5, atol=1e-5)
    assert type(made.merged()) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 2, "dropout": 1.5}, r"dropout must be in \[0, 1\]"),
    ],
)
def test_impossible_adapters(options: dict[str, float], message: str) -> None:
    """A rank of 0 would train nothing without a word."""
    with pytest.raises(ValueError, match=message):
        LoRALinear(4, 4, **options)  # type: ignore[arg-type]
