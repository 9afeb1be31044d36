"""Modules: losses, the towers of CLIP, the Q-Former, partial LoRA."""

from mmkern.nn.losses import ClipLoss, SigLipLoss
from mmkern.nn.plora import PLoRALinear
from mmkern.nn.qformer import QFormer, TextEmbeddings

__all__ = ["ClipLoss", "PLoRALinear", "QFormer", "SigLipLoss", "TextEmbeddings"]
