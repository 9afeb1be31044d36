"""Contrastive losses as modules, with the constructor and forward signatures of open_clip.

Gradients, after DDP has averaged over W ranks, relative to those of the loss of the whole batch:

==================================  =========  ===========  ==================================
flags                               encoders   logit_scale  open_clip's own (encoders, scale)
==================================  =========  ===========  ==================================
local_loss=F, gather_with_grad=F    1          1            1/W, 1
local_loss=F, gather_with_grad=T    1          1            1, 1
local_loss=T, gather_with_grad=F    1          1            another direction, 1
local_loss=T, gather_with_grad=T    1          1            1, 1
F, F with exact=False               1/W        1            1/W, 1
SigLipLoss, every dist_impl         1          1            1, 1
==================================  =========  ===========  ==================================

Here the flags that choose how features are gathered change nothing: one tower is gathered, no
N x N matrix is formed, and the gradient is exact. The value returned is the loss of the whole
batch on every rank (open_clip's local_loss=True returns the rank's share, whose mean it is).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mmkern import ops


def _world(module: str, rank: int, world_size: int) -> ProcessGroup | None:
    """The default group, once it is there and agrees with the constructor's arguments."""
    if world_size == 1:
        return None
    if not dist.is_initialized():
        raise ValueError(f"{module}: world_size={world_size}, but no process group is initialised")
    actual = dist.get_rank(), dist.get_world_size()
    if actual != (rank, world_size):
        raise ValueError(
            f"{module}: built for rank {rank} of {world_size}, running on rank {actual[0]} of "
            f"{actual[1]}"
        )
    return dist.group.WORLD


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class ClipLoss(nn.Module):
    """InfoNCE in linear memory; a drop-in for ``open_clip.loss.ClipLoss``.

    Args:
        local_loss, gather_with_grad, cache_labels: accepted; see the module's table for the
            gradients. Nothing is cached: there are no labels.
        rank, world_size: of the default process group.
        use_horovod: must be False.
        exact: False multiplies the features' gradients by 1/W where open_clip's
            local_loss=False, gather_with_grad=False does, for runs that must match it.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.

    Raises:
        NotImplementedError: use_horovod; exact=False with local_loss=True, gather_with_grad=False,
            which in open_clip follows another direction than the gradient.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        exact: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise NotImplementedError("ClipLoss: use_horovod=True; torch.distributed is supported")
        if not exact and local_loss and not gather_with_grad:
            raise NotImplementedError(
                "ClipLoss: exact=False with local_loss=True, gather_with_grad=False: open_clip's "
                "gradient there is not a multiple of the true one; pass gather_with_grad=True"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.exact = exact
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of the batch over all ranks.

        Args:
            image_features, text_features: [N, D], this rank's, normalised.
            logit_scale: exp of the learned parameter, as open_clip's models return it.
            logit_bias: shifts every logit alike, so neither the loss nor its gradient depend on it.
            output_dict: return {"contrastive_loss": loss}.

        Raises:
            ValueError, TypeError: as ``mmkern.ops.info_nce``; a group that is missing or differs
                from the constructor's rank and world_size.
        """
        group = _world("ClipLoss", self.rank, self.world_size)
        if not self.exact and not self.gather_with_grad:
            image_features = _ScaleGradient.apply(image_features, 1 / self.world_size)
            text_features = _ScaleGradient.apply(text_features, 1 / self.world_size)
        loss = ops.info_nce(
            image_features,
            text_features,
            logit_scale,
            label_smoothing=self.label_smoothing,
            group=group,
        )
        if logit_bias is not None:
            loss = loss + 0 * logit_bias.sum()  # DDP waits for the gradient of every parameter
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """The sigmoid loss in linear memory; a drop-in for ``open_clip.loss.SigLipLoss``.

    Args:
        cache_labels, dist_impl, chunk_size: accepted; one tower is gathered whatever they say.
        rank, world_size: of the default process group.

    Raises:
        ValueError: a dist_impl that open_clip does not know.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        known = ("bidir", "shift", "reduce", "gather")
        if dist_impl is not None and dist_impl not in known:
            raise ValueError(f"SigLipLoss: dist_impl must be one of {known}, got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Loss of the batch over all ranks.

        Args:
            image_features, text_features: [N, D], this rank's, normalised.
            logit_scale: exp of the learned parameter, as open_clip's models return it.
            logit_bias: added to every logit; None is 0.
            output_dict: return {"contrastive_loss": loss}.

        Raises:
            ValueError, TypeError: as ``mmkern.ops.sigmoid_contrastive``; a group that is missing or
                differs from the constructor's rank and world_size.
        """
        group = _world("SigLipLoss", self.rank, self.world_size)
        bias = 0.0 if logit_bias is None else logit_bias
        loss = ops.sigmoid_contrastive(
            image_features, text_features, logit_scale, bias, group=group
        )
        return {"contrastive_loss": loss} if output_dict else loss
