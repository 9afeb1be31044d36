"""Modules: losses, the towers of CLIP, the Q-Former, LoRA and partial LoRA."""

from mmkern.nn.lora import LoRALinear
from mmkern.nn.losses import ClipLoss, SigLipLoss
from mmkern.nn.plora import PLoRALinear
from mmkern.nn.qformer import QFormer, TextEmbeddings

__all__ = ["ClipLoss", "LoRALinear", "PLoRALinear", "QFormer", "SigLipLoss", "TextEmbeddings"]
