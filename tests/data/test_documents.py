"""Document documents, pairs and prompts: tokens, labels, pictures, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmkern.data import DocumentCollator, DocumentDataset
from mmkern.data.pairs import PairError
from tests.data.tokenizers import byte_level

IMAGE, END = 1001, 1000


class Flat:
    """A transform that fills each picture with its number."""

    def batch(self, pictures: Any, keys: Any) -> Tensor:
        assert len(keys) == len(pictures) == len(set(keys.tolist()))
        return torch.stack([torch.full((3, 2, 2), float(p)) for p in pictures])


def collator(**options: Any) -> DocumentCollator:
    eos = byte_level().eos_token_id
    return DocumentCollator(Flat(), byte_level(), IMAGE, END, **{"eos": eos, **options})


def document(images: list[int], texts: list[str], **more: Any) -> dict[str, Any]:
    return {"images": images, "texts": texts, "index": 0, "epoch": 0, **more}


def decoded(batch: dict[str, Tensor], row: int) -> str:
    """The labelled tokens as text, ends as |."""
    labels = batch["labels"][row]
    kept = labels[labels != -100].tolist()
    parts = [byte_level().decode([t]) if t < END else {END: "|", IMAGE: "#"}[t] for t in kept]
    return "".join(parts)


def test_documents_are_trained_from_pictures_to_ends() -> None:
    """Text without a picture, or picture tokens, would be trained on."""
    sample = document([1, 2], ["the quick", " a tiger", " a red heart"])
    batch = collator()([sample])
    assert decoded(batch, 0) == " a tiger| a red heart|"
    ids = batch["input_ids"][0].tolist()
    assert ids.count(IMAGE) == ids.count(END) == 2 and ids[-1] == byte_level().eos_token_id
    assert ids.index(END) + 1 == len(ids) - 1 - ids[::-1].index(IMAGE)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2]


def test_pairs_are_trained_whole() -> None:
    """The end of a caption, which pairs alone train, would never be learned."""
    pair = {"image": 3, "text": "a tiger", "index": 0, "epoch": 0}
    batch = collator()([pair, document([], ["yes no"], index=1)])
    assert decoded(batch, 0) == "a tiger|<end>"
    assert decoded(batch, 1) == ""
    assert batch["image_index"].tolist() == [[0], [-1]]
    assert batch["labels"][0, 0] == -100 and batch["input_ids"][0, 0] == IMAGE


def test_literal_special_strings_are_text() -> None:
    """A caption that spells <image> would ask for a picture that is not there."""
    sample = document([1], ["", " an <image> <start> <|endofchunk|>"])
    ids = collator()([sample])["input_ids"][0].tolist()
    assert ids.count(IMAGE) == ids.count(END) == 1
    assert byte_level().bos_token_id not in ids
    text = collator()
    text.image = ids[-3]  # a token of the text, in front of its end
    with pytest.raises(ValueError, match="has the id of a special token"):
        text([sample])


@pytest.mark.parametrize("length", range(2, 30))
def test_cut_text_keeps_whole_pictures(length: int) -> None:
    """A picture would stay without its token, and be read by another segment."""
    samples = [document([1, 2, 3], ["no", " a tiger", " a red heart", " yes"]),
               document([4], ["", " what"], index=1)]  # fmt: skip
    batch = collator(length=length)(samples)
    assert batch["input_ids"].shape[1] <= length
    tokens = (batch["input_ids"] == IMAGE).sum(1)
    assert torch.equal(tokens, (batch["image_index"] >= 0).sum(1))
    assert int(tokens.sum()) == len(batch.get("pixel_values", ()))


def test_samples_without_labels_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Text before the first picture alone would train nothing, and nobody know."""
    made = collator(length=2)
    batch = made([document([1], ["the quick brown fox", " a"], index=7)])
    assert made.unlabelled == 1 and "sample 7" in caplog.text
    assert batch["loss_weights"].isfinite().all() and "pixel_values" not in batch


def test_weights_of_sources() -> None:
    """0.2 of the pairs' mean and 1 of the documents' would be another sum."""
    pairs = [{"image": 1, "text": t, "index": i, "epoch": 0, "source": "laion"}
             for i, t in enumerate(["a tiger", "a red heart and a blue book"])]  # fmt: skip
    mixed = [*pairs, document([2], ["", " yes"], source="mmc4", index=2)]
    batch = collator(weights={"laion": 0.2})(mixed)
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    expected = [0.2 / int(counts[:2].sum())] * 2 + [1 / int(counts[2])]
    assert batch["loss_weights"].tolist() == pytest.approx(expected)
    plain = collator()(mixed)["loss_weights"]
    assert plain.tolist() == pytest.approx([1 / int(counts.sum())] * 3)


def test_prompts_are_open_and_padded_on_the_left() -> None:
    """Generation would begin behind an end, or behind pads."""
    samples = [document([1, 2], ["", " a tiger", " a"]), document([3], ["", " a"], index=1)]
    batch = collator().prompts(samples)
    assert batch["input_ids"][0].tolist().count(END) == 1
    assert batch["input_ids"][0, -1] == batch["input_ids"][1, -1] != END
    assert batch["attention_mask"][1, 0] == 0 and batch["attention_mask"][:, -1].all()
    with pytest.raises(ValueError, match="the prompt of sample 0 has"):
        collator(length=3).prompts(samples)


def test_errors() -> None:
    """Bad samples would fail deep in a worker, without a name."""
    with pytest.raises(ValueError, match="got no samples"):
        collator()([])
    with pytest.raises(ValueError, match="2 pictures need 3 texts, got 2"):
        collator()([document([1, 2], ["", "a"])])
    with pytest.raises(ValueError, match="length must be at least 2"):
        collator(length=1)


def test_documents_from_files(tmp_path: Path) -> None:
    """MMC4's pictures would stand before other sentences, or bad lines pass for documents."""
    for name in "abc":
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    info = [
        {"image_name": "a.png", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "b.png", "matched_text_index": 0, "matched_sim": 0.25},
        {"image_name": "c.png", "matched_text_index": 1, "matched_sim": 0.1},
    ]
    lines = [
        {"text_list": ["zero.", "one.", "two.", "three."], "image_info": info},
        {"images": ["c.png"], "texts": ["before", "after"]},
        {"text_list": ["nothing"], "image_info": []},
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    data = DocumentDataset(path)
    assert len(data) == 2
    assert data[0]["texts"] == ["", "zero. one.", "two. three."]
    assert data[0]["images"][0].size == (4, 4) and len(data[0]["images"]) == 2
    assert data[1]["texts"] == ["before", "after"]
    assert DocumentDataset(path, max_images=1)[0]["texts"] == ["", "zero. one."]
    for line, message in (
        ("{", "line 1: not JSON"),
        ("[]", "expected an object"),
        ('{"images": ["a.png"], "texts": ["a"]}', "one text more than images"),
        ('{"images": ["no.png"], "texts": ["", "a"]}', "no such picture"),
        ('{"text_list": ["a"], "image_info": [{}]}', "not a document of MMC4"),
        ('{"images": [], "texts": ["a"]}', "no document has a picture"),
    ):
        path.write_text(line)
        with pytest.raises(PairError, match=message):
            DocumentDataset(path)
