"""Batches of texts with pictures in any places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmkern.data import InterleavedCollator, PixelTransform, Texts
from mmkern.data.language import IGNORE
from tests.data.tokenizers import byte_level

IMAGE, PLACES = 999, 3


def collator(**options: Any) -> InterleavedCollator:
    transform = PixelTransform(mean=(0, 0, 0), std=(1, 1, 1), train=options.pop("train", False))
    texts = Texts(prompt="a picture of", first=True)
    return InterleavedCollator(
        transform, byte_level(), lambda h, w: PLACES, IMAGE, texts=texts, **options
    )


def grey(value: int) -> Tensor:
    return torch.full((4, 4, 3), value, dtype=torch.uint8)


def sample(index: int, *pieces: Any, answer: str = "tiger") -> dict[str, Any]:
    return {"pieces": list(pieces), "answer": answer, "index": index, "epoch": 0}


def words(ids: Tensor) -> str:
    text: str = byte_level().decode([i for i in ids.tolist() if i != IMAGE])
    return text


def test_pictures_keep_their_places_and_order() -> None:
    """A picture would be read in another's place; the wrong words would be learned."""
    samples = [
        sample(0, "what is ", grey(10), " and ", grey(20), " here?"),
        sample(1, "no picture", answer="yes"),
        sample(2, grey(30), "\nAnswer:", answer="a b"),
    ]
    batch = collator(bos=0)(samples)
    assert batch["image_counts"].tolist() == [2, 0, 1]
    assert [round(float(v) * 255) for v in batch["pixel_values"][:, 0, 0, 0]] == [10, 20, 30]
    ids = batch["input_ids"]
    assert ((ids == IMAGE).sum(1) == PLACES * batch["image_counts"]).all()
    assert (ids[:, 0] == 0).all()
    spans = (ids[0] == IMAGE).nonzero().flatten().tolist()
    assert spans[:PLACES] == list(range(spans[0], spans[0] + PLACES))
    assert words(ids[0][1 : spans[0]]) == "what is " and spans[-1] - spans[0] > 2 * PLACES - 1
    for row, answer in enumerate((" tiger<end>", " yes<end>", " a b<end>")):
        labelled = batch["labels"][row] != IGNORE
        assert words(batch["labels"][row][labelled]) == answer
        assert torch.equal(ids[row][labelled], batch["labels"][row][labelled])
        assert (batch["attention_mask"][row][labelled] == 1).all()
    prompts = collator().prompts(samples)
    assert prompts["attention_mask"][1, 0] == 0 and (prompts["attention_mask"][:, -1] == 1).all()
    assert words(prompts["input_ids"][2]).endswith("Answer:")
    assert torch.equal(prompts["pixel_values"], batch["pixel_values"])


def test_other_samples_become_pieces() -> None:
    """Captions, questions and plain text could not be mixed with articles."""
    samples = [
        {"image": grey(5), "text": "a tiger", "index": 0, "epoch": 0},
        {"image": grey(6), "kind": "class", "subject": "", "answer": "nature", "index": 1,
         "epoch": 0},
        {"text": "the quick brown fox", "index": 2, "epoch": 0},
    ]  # fmt: skip
    batch = collator()(samples)
    assert batch["image_counts"].tolist() == [1, 1, 0]
    assert (batch["input_ids"][:2, :PLACES] == IMAGE).all()
    labelled = [words(row[row != IGNORE]) for row in batch["labels"]]
    assert labelled == [" a tiger<end>", " nature<end>", "the quick brown fox<end>"]
    rows = collator().answer_ids([(samples[0], "fox"), (sample(0, "x", grey(1)), "yes")])
    assert (
        words(torch.tensor(rows[0])) == " fox<end>" and words(torch.tensor(rows[1])) == "yes<end>"
    )


def test_batch_of_text_has_no_pictures() -> None:
    """A batch of plain text would need a picture that nobody has."""
    batch = collator()([sample(0, "a", answer="b"), sample(1, answer="c")])
    assert "pixel_values" not in batch and batch["image_counts"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="got no samples"):
        collator()([])


def test_long_prompts_lose_text_but_no_picture() -> None:
    """Half a picture would stand in the text, and every later one in the wrong place."""
    long = sample(0, "what is this? " * 9, grey(1), " yes?")
    kept = collator(prompt_length=12)([long])
    assert (kept["input_ids"][0] == IMAGE).sum() == PLACES
    assert int((kept["labels"][0] == IGNORE).sum()) == 12
    early = sample(1, grey(1), "what is this? " * 9)
    with pytest.raises(
        ValueError,
        match=r"prompt of sample 1 has \d+ tokens; cut to prompt_length 12 it would lose 3",
    ):
        collator(prompt_length=12)([long, early])
    with pytest.raises(ValueError, match="sample 0 has 4 image tokens, its pictures become 0"):
        token = byte_level()("zz")["input_ids"][0]
        InterleavedCollator(PixelTransform(), byte_level(), lambda h, w: 2, token)(
            [sample(0, "zz zz", "b")]
        )


def test_pictures_of_a_sample_are_augmented_apart() -> None:
    """Equal shifts would tell a model which pictures stand in one sample."""
    batch = collator(train=True)([sample(0, *([grey(100)] * 4)), sample(1, *([grey(100)] * 4))])
    assert len({tuple(p.flatten().tolist()) for p in batch["pixel_values"]}) == 8
    again = collator(train=True)([sample(1, *([grey(100)] * 4))])
    assert torch.equal(again["pixel_values"], batch["pixel_values"][4:])
