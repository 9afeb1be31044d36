"""Modules: losses, and the towers of CLIP."""

from mmkern.nn.losses import ClipLoss, SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss"]
