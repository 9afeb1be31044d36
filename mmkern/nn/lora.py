"""Ordinary LoRA: partial LoRA whose every row is visual.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). Keys are those
of InternLM-XComposer's composition checkpoint: ``weight``, ``bias``, ``lora_A.weight`` [r, K],
``lora_B.weight`` [N, r]. PEFT, where it is installed, wraps the same layers as well; its keys
differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkern import ops
from mmkern.layout import VisualSpans

__all__ = ["LoRALinear", "add_lora"]


class LoRALinear(nn.Linear):
    """nn.Linear plus s · B A dropout(x) on every row, by :func:`mmkern.ops.plora_linear`.

    A starts as kaiming uniform, B as zeros, so a new adapter changes nothing.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's.
        rank: r.
        alpha: s = alpha / r; by default r, so s = 1.
        dropout: of the adapter's input while training.

    Raises:
        ValueError: a rank below 1, a dropout outside [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if rank < 1:
            raise ValueError(f"LoRALinear: rank must be at least 1, got {rank}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"LoRALinear: dropout must be in [0, 1], got {dropout}")
        self.rank, self.dropout = rank, dropout
        self.scaling = 1.0 if alpha is None else alpha / rank
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.lora_A = nn.Linear(in_features, rank, **options)
        self.lora_B = nn.Linear(rank, out_features, **options)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """An adapter that changes nothing yet, but learns: kaiming uniform A, zero B."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        shape = x.shape[:-1]
        total = math.prod(shape)
        rows = torch.arange(total, dtype=torch.int32, device=x.device)
        runs = ((0, total),) if total else ()
        return ops.plora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A.weight,
            self.lora_B.weight,
            VisualSpans(tuple(shape), rows, runs),
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same: weight + s · B A, in fp32, then in its dtype."""
        plain = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        update = self.lora_B.weight.float() @ self.lora_A.weight.float()
        plain.weight.copy_(self.weight.float() + self.scaling * update)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain

    def extra_repr(self) -> str:
        scale = f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
        return f"{super().extra_repr()}, {scale}"


def add_lora(
    model: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> list[str]:
    """Put LoRA around the linear layers of these names (the last part), sharing their parameters.

    Returns:
        Full names of the layers that have an adapter now.

    Raises:
        ValueError: a target that no layer of the model has.
    """
    wanted = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]
    absent = set(targets) - {name.rpartition(".")[2] for name, _ in wanted}
    if absent:
        raise ValueError(f"add_lora: {type(model).__name__} has no layers {sorted(absent)}")
    for name, linear in wanted:
        layer = LoRALinear(
            linear.in_features,
            linear.out_features,
            bias=False,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.train(linear.training))
    return [name for name, _ in wanted]
