"""What a language model makes of plain text: the yardstick of training that must not touch it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["text_loss"]


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 64) -> float:
    """Mean loss a token over texts, next-token cross-entropy, no pictures; in eval mode.

    Equal models give equal numbers to the last digit.

    Raises:
        ValueError: no text with two tokens.
    """
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError("text_loss: needs a text of two tokens")
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.long, device=model.device)
        labels = torch.full_like(ids, -100)
        for number, row in enumerate(part):
            ids[number, : len(row)] = labels[number, : len(row)] = torch.tensor(row)
        found = model(
            input_ids=ids,
            attention_mask=(labels != -100).long(),
            labels=labels,
            num_items_in_batch=1,
        )
        total += float(found.loss)
        count += sum(len(row) - 1 for row in part)
    return total / count
