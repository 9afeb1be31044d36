"""The operators. Each is a folder: public function, reference, and kernels side by side."""

from mmkern.ops.attention import attention
from mmkern.ops.info_nce import info_nce
from mmkern.ops.linear_cross_entropy import linear_cross_entropy
from mmkern.ops.plora_linear import plora_linear
from mmkern.ops.query_info_nce import query_info_nce
from mmkern.ops.sigmoid_contrastive import sigmoid_contrastive

__all__ = [
    "attention",
    "info_nce",
    "linear_cross_entropy",
    "plora_linear",
    "query_info_nce",
    "sigmoid_contrastive",
]
