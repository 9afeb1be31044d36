"""Retrieval by BLIP-2's first stage: by contrast, then the best ranked again by matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.eval.retrieval import recall_from_scores

__all__ = ["retrieve"]


@torch.no_grad()
def retrieve(
    model: Any,
    tokens: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    match: Tensor,
    rerank: int = 128,
    contrast_weight: float = 1.0,
    batch_size: int = 128,
    ks: Sequence[int] = (1, 5),
) -> dict[str, dict[str, float]]:
    """Recall both ways: ``contrast``, ``reranked``, and by contrast with ``shuffled`` pictures.

    Args:
        model: ``Blip2ForPretraining``, in eval mode.
        tokens: [N, L, W] of its ``encode_image``.
        input_ids, attention_mask: [M, T].
        match: [N, M] bool, which text is right for which picture.
        rerank: candidates of each query that matching scores again.
        contrast_weight: of the cosine beside the match logit, as ``model.rerank`` has it.
        batch_size: pictures, texts, or pairs, at once.
        ks: the k of "R@k".
    """
    device = model.device
    image = torch.cat([model.image_features(t.to(device)) for t in tokens.split(batch_size)])
    rows = zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
    text = torch.cat([model.text_features(i.to(device), m.to(device)) for i, m in rows])
    scores = model.itc_scores(image, text).cpu()
    again = model.rerank(
        scores,
        tokens,
        input_ids,
        attention_mask,
        k=rerank,
        contrast_weight=contrast_weight,
        batch_size=batch_size,
    )
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    return {
        "contrast": recall_from_scores(scores, scores, match, ks),
        "reranked": recall_from_scores(again[0], again[1], match, ks),
        "shuffled": recall_from_scores(scores[order], scores[order], match, ks),
    }
