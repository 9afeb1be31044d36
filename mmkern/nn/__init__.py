"""Modules: losses, the towers of CLIP, the Q-Former."""

from mmkern.nn.losses import ClipLoss, SigLipLoss
from mmkern.nn.qformer import QFormer, TextEmbeddings

__all__ = ["ClipLoss", "QFormer", "SigLipLoss", "TextEmbeddings"]
