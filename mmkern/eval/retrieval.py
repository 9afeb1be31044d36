"""Image-text retrieval: recall at k in both directions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkern.eval.ranking import best_rank


@torch.no_grad()
def recall_at_k(
    image: Tensor,
    text: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Share of queries with a match among the k nearest, images to texts and texts to images.

    Picture i and text j match iff ``image_ids[i] == text_ids[j]``. With several captions a picture
    (COCO has five) pass ``text_ids`` = index of each caption's picture: an image query succeeds
    when *any* of its captions is among the k nearest, a text query when its picture is. A candidate
    that does not match and has the same score as the best match stands before it, so equal
    embeddings never earn anything by their order.

    Memory is ``chunk`` times the number of candidates; the whole similarity matrix never exists.

    Args:
        image: [N, D] embeddings, made unit here.
        text: [M, D] embeddings, made unit here.
        image_ids: [N] integers; default 0 .. N-1.
        text_ids: [M] integers; default 0 .. M-1 (then N = M).
        ks: the k of "R@k".
        chunk: queries scored at a time.

    Returns:
        ``{"image_to_text_r1": ..., "text_to_image_r1": ..., ...}``, shares in [0, 1].

    Raises:
        ValueError: shapes or lengths that do not fit, or a query that matches nothing.
    """
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(
            f"recall_at_k: expected image [N, D] and text [M, D], "
            f"got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if not len(image) or not len(text) or chunk < 1:
        raise ValueError(
            f"recall_at_k: expected images, texts and chunk >= 1, "
            f"got {len(image)}, {len(text)} and {chunk}"
        )
    image_ids = _ids("image_ids", image_ids, image)
    text_ids = _ids("text_ids", text_ids, text)
    unit_image = F.normalize(image.float(), dim=-1)
    unit_text = F.normalize(text.float(), dim=-1)
    directions = {
        "image_to_text": (unit_image, image_ids, unit_text, text_ids),
        "text_to_image": (unit_text, text_ids, unit_image, image_ids),
    }
    result = {}
    for direction, (query, query_ids, key, key_ids) in directions.items():
        ranks = []
        for start in range(0, len(query), chunk):
            stop = start + chunk
            match = query_ids[start:stop, None] == key_ids[None]
            if not match.any(1).all():
                row = start + int((~match.any(1)).nonzero()[0])
                raise ValueError(f"recall_at_k: {direction} query {row} matches no candidate")
            ranks.append(best_rank(query[start:stop] @ key.T, match))
        rank = torch.cat(ranks)
        result.update({f"{direction}_r{k}": (rank < k).double().mean().item() for k in ks})
    return result


def recall_from_scores(
    image_to_text: Tensor, text_to_image: Tensor, match: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """The same from score matrices, which may differ by direction (after re-ranking).

    Args:
        image_to_text: [N, M], texts ranked along each row.
        text_to_image: [N, M], pictures ranked along each column.
        match: [N, M] bool.
        ks: the k of "R@k".

    Raises:
        ValueError: shapes that differ, or a query that matches nothing.
    """
    if not image_to_text.shape == text_to_image.shape == match.shape:
        raise ValueError(
            f"recall_from_scores: expected three matrices of one shape, got "
            f"{tuple(image_to_text.shape)}, {tuple(text_to_image.shape)} and {tuple(match.shape)}"
        )
    ranks = {
        "image_to_text": best_rank(image_to_text, match),
        "text_to_image": best_rank(text_to_image.T, match.T),
    }
    return {
        f"{way}_r{k}": (rank < k).double().mean().item() for way, rank in ranks.items() for k in ks
    }


@torch.no_grad()
def encode_pairs(
    model: Any, batches: Iterable[Mapping[str, Tensor]], limit: int
) -> tuple[Tensor, Tensor]:
    """Image and text embeddings, [n, D] each, of the first ``limit`` pairs of ``batches``.

    Args:
        model: with ``encode_image``, ``encode_text`` and ``device``, such as ``CLIP``.
        batches: of ``pixel_values`` and ``input_ids``.
        limit: pairs.
    """
    images, texts, count = [], [], 0
    for batch in batches:
        images.append(model.encode_image(batch["pixel_values"].to(model.device), normalize=True))
        texts.append(model.encode_text(batch["input_ids"].to(model.device), normalize=True))
        count += len(images[-1])
        if count >= limit:
            break
    if not images:
        raise ValueError("encode_pairs: expected at least one batch, got none")
    return torch.cat(images)[:limit], torch.cat(texts)[:limit]


def _ids(name: str, ids: Tensor | None, rows: Tensor) -> Tensor:
    if ids is None:
        return torch.arange(len(rows), device=rows.device)
    if ids.ndim != 1 or len(ids) != len(rows):
        raise ValueError(
            f"recall_at_k: expected {name} of shape [{len(rows)}], got {tuple(ids.shape)}"
        )
    return ids.to(rows.device)
