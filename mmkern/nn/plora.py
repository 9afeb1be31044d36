"""Linear layers with partial LoRA: a low-rank adapter that acts on visual rows only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkern import ops
from mmkern.layout import VisualSpans

# The metadata that says, in every file written here, what plain LoRA must not do with it.
VISUAL_ONLY = "plora_visual_only"


class _FromZero(nn.Linear):
    """A linear layer that starts as zeros, by whatever initialises it."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class PLoRALinear(nn.Linear):
    """nn.Linear plus s · B A dropout(x) on visual rows (InternLM-XComposer2, arXiv 2401.16420).

    It is a linear layer whose call takes the batch's spans beside x. Keys are those of the released
    checkpoints: weight, bias, Plora_A.weight [r, K], Plora_B.weight [N, r]. A starts as kaiming
    uniform, B as zeros, so a new adapter changes nothing. Wrappers that pass further arguments on
    to the layer they wrap, as PEFT's LoRA does, add ordinary LoRA on all rows.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear's.
        rank: r.
        alpha: s = alpha / r; by default r, so s = 1.
        dropout: of the adapter's input while training.
        adapter_dtype: of A and B; by default the layer's. fp32 over a 16-bit layer is cast for the
            product and gets its gradients in fp32.
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
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if rank < 1:
            raise ValueError(f"PLoRALinear: rank must be at least 1, got {rank}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"PLoRALinear: dropout must be in [0, 1], got {dropout}")
        self.rank = rank
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.dropout = dropout
        options: dict[str, Any] = {"device": device, "dtype": adapter_dtype or dtype}
        self.Plora_A = nn.Linear(in_features, rank, bias=False, **options)
        self.Plora_B = _FromZero(rank, out_features, bias=False, **options)

    @classmethod
    def wrap(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> PLoRALinear:
        """A layer with an adapter around `linear`'s own parameters, which it shares.

        Raises:
            TypeError: no nn.Linear, or one whose weight is no floating point matrix (quantised).
        """
        weight = getattr(linear, "weight", None)
        shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
        if not isinstance(linear, nn.Linear) or not isinstance(weight, Tensor):
            raise TypeError(f"PLoRALinear.wrap: expected nn.Linear, got {type(linear).__name__}")
        if not weight.is_floating_point() or tuple(weight.shape) != shape:
            raise TypeError(
                f"PLoRALinear.wrap: {type(linear).__name__}'s weight must be a floating point "
                f"matrix {shape}, got {weight.dtype} {tuple(weight.shape)}"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            device="meta",
            dtype=weight.dtype,
            adapter_dtype=adapter_dtype,
        )
        for adapter in (layer.Plora_A, layer.Plora_B):
            adapter.to_empty(device=weight.device)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.reset_adapter()
        return layer.train(linear.training)

    def reset_adapter(self) -> None:
        """An adapter that changes nothing yet, but learns: kaiming uniform A, zero B."""
        self.Plora_A.reset_parameters()  # which is kaiming uniform with a = √5
        self.Plora_B.reset_parameters()

    def forward(self, x: Tensor, spans: VisualSpans | Tensor | None = None) -> Tensor:
        """[..., K] to [..., N]; `spans` as for ``mmkern.ops.plora_linear``, None for text."""
        if spans is None and not torch.is_grad_enabled():  # decoding: nothing but the linear layer
            return super().forward(x)
        return ops.plora_linear(
            x,
            self.weight,
            self.bias,
            self.Plora_A.weight,
            self.Plora_B.weight,
            spans,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
        )

    @staticmethod
    def together(
        layers: Sequence[PLoRALinear], x: Tensor, spans: VisualSpans | Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Layers that share x (q, k and v; gate and up): one read of it for all adapters.

        Raises:
            ValueError: no layer, or layers that differ in dropout, whose mask they share.
        """
        rates = sorted({layer.dropout if layer.training else 0.0 for layer in layers})
        if len(rates) != 1:
            raise ValueError(f"PLoRALinear.together: layers must have one dropout, got {rates}")
        return ops.plora_linear(
            x,
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            [layer.Plora_A.weight for layer in layers],
            [layer.Plora_B.weight for layer in layers],
            spans,
            scaling=[layer.scaling for layer in layers],
            dropout_p=rates[0],
        )

    def merge(self) -> None:
        """Raises NotImplementedError: one weight cannot serve visual rows and text."""
        raise NotImplementedError(
            "PLoRALinear.merge: the adapter acts on visual rows only; folded into the weight it "
            "would change text as well. Keep it apart, or fold the all-row LoRA that wraps it."
        )

    def extra_repr(self) -> str:
        scale = f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
        return f"{super().extra_repr()}, {scale}"


def _layers(model: nn.Module) -> Iterator[tuple[str, PLoRALinear]]:
    """Adapted layers and their names; "" for the model itself. A shared layer comes once."""
    for name, module in model.named_modules():
        if isinstance(module, PLoRALinear):
            yield name, module


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' part of a model's state dict, under the released checkpoints' key names."""
    return {
        f"{name}.{part}.weight".lstrip("."): getattr(layer, part).weight.detach()
        for name, layer in _layers(model)
        for part in ("Plora_A", "Plora_B")
    }


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the adapters alone, as safetensors; their scales are in the file's metadata."""
    from safetensors.torch import save_file

    state = adapter_state(model)
    if not state:
        raise ValueError(f"save_adapters: {type(model).__name__} has no PLoRALinear")
    scaling = {name: layer.scaling for name, layer in _layers(model)}
    metadata = {"format": "pt", VISUAL_ONLY: "true", "scaling": json.dumps(scaling)}
    save_file({key: t.contiguous() for key, t in state.items()}, str(path), metadata)


def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Read what ``save_adapters`` wrote, or the Plora_ keys of any safetensors file.

    Raises:
        ValueError: adapters that are missing, of another shape, unknown to the model, or trained
            with another scale; nothing is loaded then.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys() if "Plora_" in key}  # noqa: SIM118
        metadata = file.metadata() or {}
    state, layers = adapter_state(model), dict(_layers(model))
    problems = [f"{key} is missing" for key in state.keys() - found.keys()]
    problems += [f"{key} is unknown" for key in found.keys() - state.keys()]
    problems += [
        f"{key} has shape {tuple(found[key].shape)}, the model's {tuple(state[key].shape)}"
        for key in state.keys() & found.keys()
        if found[key].shape != state[key].shape
    ]
    for name, scale in json.loads(metadata.get("scaling", "{}")).items():
        if name in layers and not math.isclose(layers[name].scaling, scale):
            problems.append(f"{name} was trained at scale {scale}, not {layers[name].scaling}")
    if problems:
        raise ValueError(f"load_adapters: {path}: {'; '.join(sorted(problems))}")
    for key, values in found.items():
        state[key].copy_(values)


def export_peft(model: nn.Module, directory: str | Path, base_model: str | None = None) -> None:
    """Write the adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors.

    PEFT applies a LoRA to every row, so this is for tools that read its format. Both files carry
    ``plora_visual_only``: PEFT warns about a key that it does not know when it loads the
    configuration.

    Args:
        model: with PLoRALinear layers, any ranks and scales.
        directory: made if need be.
        base_model: name or path for ``base_model_name_or_path``.

    Raises:
        ValueError: no adapters, or layers that differ in dropout, for which PEFT has one number.
    """
    from safetensors.torch import save_file

    layers = dict(_layers(model))
    if not layers or "" in layers:
        raise ValueError("export_peft: the model must hold PLoRALinear layers under some name")
    rates = sorted({layer.dropout for layer in layers.values()})
    if len(rates) != 1:
        raise ValueError(f"export_peft: layers must have one dropout, got {rates}")
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "r": first.rank,
        "lora_alpha": first.scaling * first.rank,
        "lora_dropout": rates[0],
        "target_modules": sorted(layers),
        "rank_pattern": {name: layer.rank for name, layer in layers.items()},
        "alpha_pattern": {name: layer.scaling * layer.rank for name, layer in layers.items()},
        VISUAL_ONLY: True,
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {
        f"base_model.model.{name}.lora_{letter}.weight": part.weight.detach().contiguous()
        for name, layer in layers.items()
        for letter, part in (("A", layer.Plora_A), ("B", layer.Plora_B))
    }
    metadata = {"format": "pt", VISUAL_ONLY: "true"}
    save_file(state, str(folder / "adapter_model.safetensors"), metadata)
