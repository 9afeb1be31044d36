"""A training stage as data: what is trained, on which loss, at which rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers.modeling_layers import GradientCheckpointingLayer

from mmkern import ops
from mmkern.train.parameter_groups import GroupRules

# Features by name, and the group that they are spread over -> loss.
Objective = Callable[[Mapping[str, Tensor], "ProcessGroup | None"], Tensor]


@dataclass(frozen=True)
class Stage:
    """One stage of a model's training.

    Attributes:
        name: for messages.
        freeze: shell patterns of parameter names that are not trained; all others are. A module
            whose parameters are all frozen runs in eval mode: no dropout, running statistics
            untouched.
        losses: named losses of the model's output -> weight; their weighted sum is trained. Empty:
            the output's ``loss``.
        objective: computes the loss from the features in the model's output instead, which the
            gradient cache needs; the model is then called with ``return_loss=False``.
        gradient_cache_chunk: rows encoded at once (None: the whole batch, no cache).
        groups: weight decay and rates.
    """

    name: str = "train"
    freeze: Sequence[str] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    objective: Objective | None = None
    gradient_cache_chunk: int | None = None
    groups: GroupRules = field(default_factory=GroupRules)

    def __post_init__(self) -> None:
        chunk = self.gradient_cache_chunk
        if chunk is not None and chunk < 1:
            raise ValueError(f"Stage: gradient_cache_chunk must be at least 1, got {chunk}")
        if chunk is not None and self.objective is None:
            raise ValueError(
                "Stage: gradient_cache_chunk needs an objective, which computes the loss from the "
                "features of all chunks"
            )
        if self.objective is not None and self.losses:
            raise ValueError("Stage: set either losses or objective, not both")

    def apply(self, model: nn.Module) -> None:
        """Set ``requires_grad`` of the model's parameters; see `freeze`.

        What an earlier stage froze is trained again unless this one freezes it too.

        Raises:
            ValueError: a pattern that matches nothing, or nothing left to train.
        """
        names = [name for name, _ in model.named_parameters()]
        for pattern in self.freeze:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"Stage {self.name!r}: no parameter matches freeze pattern {pattern!r}; "
                    f"names look like {names[0]!r}"
                )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(fnmatchcase(name, p) for p in self.freeze))
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"Stage {self.name!r}: freeze={list(self.freeze)} leaves nothing")
        _let_train(model)
        if self.freeze:
            _keep_frozen_in_eval(model)


def _keep_frozen_in_eval(module: nn.Module) -> None:
    """Put the outermost frozen modules into eval mode whenever they run."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        # A hook, because the trainer calls model.train() before every step.
        module.register_forward_pre_hook(_to_eval)
        return
    for child in module.children():
        _keep_frozen_in_eval(child)


def _let_train(model: nn.Module) -> None:
    """Undo `_keep_frozen_in_eval`."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _to_eval]:
            del hooks[key]


def _to_eval(module: nn.Module, arguments: Any) -> None:
    if not module.training:
        return
    module.eval()
    for layer in module.modules():
        # transformers' layers recompute their activations in training mode only. A frozen language
        # model passes gradients on, so its activations count. Its parts stay in eval mode; a layer
        # that drops in its own forward has to stay there too.
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            rate = getattr(layer, "dropout", 0.0)
            layer.training = not (isinstance(rate, float) and rate > 0)


def info_nce(outputs: Mapping[str, Tensor], group: ProcessGroup | None = None) -> Tensor:
    """InfoNCE by :func:`mmkern.ops.info_nce` of a CLIP's output."""
    return ops.info_nce(
        outputs["image_features"], outputs["text_features"], outputs["logit_scale"], group=group
    )


def dense_info_nce(outputs: Mapping[str, Tensor], group: ProcessGroup | None = None) -> Tensor:
    """The same loss in plain PyTorch, by the N x N matrix: what mmkern is compared with.

    With a group both towers are gathered and every rank computes the whole loss; DDP's average of
    the gradients is then the gradient of that loss.
    """
    image, text = outputs["image_features"], outputs["text_features"]
    if group is not None and dist.get_world_size(group) > 1:
        image, text = (torch.cat(distributed.all_gather(f, group)) for f in (image, text))
    logits = outputs["logit_scale"] * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


OBJECTIVES: dict[str, Objective] = {"mmkern": info_nce, "torch": dense_info_nce}
