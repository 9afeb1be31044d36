"""Images between text: places, labels, cuts; tiles; questions without pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmkern.data import InterleavedCollator, PairError, PixelTransform, TextQuestions, TileTransform
from mmkern.data.interleaved import interleave, with_images
from mmkern.data.tiles import tile_grid
from tests.data.tokenizers import byte_level

IMAGE = 999


def collator(**options: Any) -> InterleavedCollator:
    """Four tokens for each 8 x 8 pixels."""
    options = {"bos": 0, "spans": True, **options}
    return InterleavedCollator(
        PixelTransform(), byte_level(), lambda h, w: h * w // 16, IMAGE, **options
    )


def sample(index: int, subject: str, answer: str, image: Any = 8) -> dict[str, Any]:
    """A question, its picture `image` pixels a side."""
    found = {"kind": "verbatim", "subject": subject, "answer": answer, "index": index, "epoch": 0}
    if isinstance(image, int):
        found["image"] = torch.full((image, image, 3), 10 * index, dtype=torch.uint8)
    elif image is not None:
        found["image"] = image
    return found


def test_rows_of_words_and_pictures() -> None:
    """A batch would be labelled on the question, or show a picture to another sample."""
    tokenizer = byte_level()
    grid = torch.zeros(16, 16, 3, dtype=torch.uint8)
    samples = [
        sample(0, "what is it?", "a red heart"),
        sample(1, "say yes", "yes", None),
        sample(2, "colour?", "blue", grid),
    ]
    batch = collator()(samples)
    tokens = [4, 0, 16]
    for row, given in enumerate(samples):
        text = f"{given['subject']} {given['answer']}"
        words = tokenizer(text)["input_ids"]
        answer = tokenizer(f" {given['answer']}")["input_ids"]
        ids = [0, *[IMAGE] * tokens[row], *words, 1]
        length = len(ids)
        assert batch["input_ids"][row, :length].tolist() == ids
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == [*answer, 1]
        assert labels[length - len(answer) - 1 : length].tolist() == [*answer, 1]
    assert [p.shape[1] for p in batch["pixel_values"]] == [8, 16]
    assert torch.equal(batch["spans"].to_mask(), batch["input_ids"] == IMAGE)
    alone = collator()([samples[1]])
    assert "pixel_values" not in alone and alone["spans"].runs == ()
    plain = collator()([samples[0], sample(3, "x", "y")])["pixel_values"]
    assert isinstance(plain, torch.Tensor) and plain.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="no samples"):
        collator()([])


def test_prompts_and_answers_continue_each_other() -> None:
    """What is ranked or generated would not follow the prompt that was trained."""
    samples = [sample(0, "what is it?", "a tiger"), sample(1, "which key is this, then?", "b")]
    whole, prompts = collator()(samples), collator().prompts(samples)
    answers = collator().answer_ids([(samples[0], "a tiger"), (samples[1], "b")])
    for row, answer in enumerate(answers):
        prompt = prompts["input_ids"][row][prompts["attention_mask"][row] == 1].tolist()
        ids = whole["input_ids"][row][whole["attention_mask"][row] == 1].tolist()
        assert [*prompt, *answer] == ids
    assert prompts["attention_mask"][0, 0] == 0, "pads stand on the left"
    assert torch.equal(prompts["spans"].to_mask(), prompts["input_ids"] == IMAGE)


def test_pictures_stand_where_the_text_says() -> None:
    """Interleaved documents would have all their pictures in front."""
    pictures = [torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(16, 8, 3, dtype=torch.uint8)]
    asked = sample(0, "first <ImageHere> then <ImageHere> end", "yes", pictures)
    ids = collator()([asked])["input_ids"][0].tolist()
    tokenizer = byte_level()
    parts = [tokenizer(text)["input_ids"] for text in ("first ", " then ", " end yes")]
    expected = [0, *parts[0], *[IMAGE] * 4, *parts[1], *[IMAGE] * 8, *parts[2], 1]
    assert ids == expected
    with pytest.raises(ValueError, match="sample 1 has 2 times <ImageHere> in its text, but 1 im"):
        collator()([sample(0, "a", "b"), sample(1, "<ImageHere> <ImageHere>", "c")])
    with pytest.raises(ValueError, match="sample 0 has 0 times <ImageHere> in its text, but 2 im"):
        with_images("text", "", [1, 2], 0)


def test_articles_in_turns() -> None:
    """A chat model could not be trained on articles, or would read their pictures elsewhere."""
    tokenizer = byte_level()
    chat = ["<start>", "<image>"]
    begin, end = (tokenizer.get_vocab()[token] for token in chat)
    picture = torch.zeros(8, 8, 3, dtype=torch.uint8)
    article = {"pieces": ["see ", picture, "\n", "here"], "answer": "yes", "index": 0, "epoch": 0}
    ids = collator(chat=chat)([article])["input_ids"][0].tolist()
    texts = ("user\nsee ", "\nhere", "\n", "assistant\nyes")
    first, second, feed, last = (tokenizer(text)["input_ids"] for text in texts)
    expected = [0, begin, *first, *[IMAGE] * 4, *second, end, *feed, begin, *last, end]
    assert ids == expected
    # As released: a lone picture without a place stands before the turn.
    lone = collator(chat=chat).prompts([sample(0, "what?", "a")])["input_ids"][0].tolist()
    assert lone[:6] == [0, *[IMAGE] * 4, begin]


def test_pictures_in_an_answer() -> None:
    """What a model composes, text with pictures, could not be trained; or pictures be "said"."""
    tokenizer = byte_level()
    picture = torch.zeros(8, 8, 3, dtype=torch.uint8)
    asked = sample(0, "<ImageHere> then", "a <ImageHere> b", [picture, picture])
    batch = collator()([asked])
    first, last = tokenizer(" a ")["input_ids"], tokenizer(" b")["input_ids"]
    ids = [0, *[IMAGE] * 4, *tokenizer(" then a ")["input_ids"], *[IMAGE] * 4, *last, 1]
    assert batch["input_ids"][0].tolist() == ids
    labels = [*first, *[-100] * 4, *last, 1]
    assert batch["labels"][0].tolist() == [*[-100] * (len(ids) - len(labels)), *labels]
    prompts = collator().prompts([asked])
    assert len(prompts["pixel_values"]) == 1
    assert prompts["input_ids"][0].tolist() == ids[: len(ids) - len(labels)]


def test_a_row_may_lose_words_but_no_part_of_an_image() -> None:
    """A picture cut in two trains on half of it, and its features no longer fit their places."""
    asked = [sample(0, "hi", "yes"), sample(1, "one two three four five six", "yes")]
    cut = collator(max_length=7)(asked)
    assert cut["input_ids"].shape == (2, 7) and not (cut["labels"][1] != -100).any()
    with pytest.raises(ValueError, match=r"sample 1 has \d+ tokens; cut to max_length 8 it would l"
                       r"ose 4 of its 4 image tokens"):  # fmt: skip
        collator(max_length=8)([asked[0], sample(1, "a b c d e f g h <ImageHere>", "yes")])
    end = collator(max_length=5)([sample(0, "", "yes")])
    assert end["input_ids"].tolist() == [[0, *[IMAGE] * 4]]


def test_a_token_over_the_border_belongs_to_the_answer() -> None:
    """Counting the prompt's tokens by themselves labels a token too many, or one too few."""
    tokenizer = byte_level()
    asked, said = interleave(tokenizer, ["a ti"], ["ger face"])
    assert [*asked, *said] == tokenizer("a tiger face")["input_ids"]
    text = tokenizer.decode(said)
    assert text.endswith("ger face") and "a" not in text[: -len("ger face")]


def test_turns_of_a_conversation() -> None:
    """Markers in a user's text would end his turn; the assistant's end must be learnt."""
    chat = ["<start>", "<image>"]
    found = collator(chat=chat)([sample(0, "hi <image> you", "yes", None)])
    ids = found["input_ids"][0].tolist()
    tokenizer = byte_level()
    begin, end = (tokenizer.get_vocab()[token] for token in chat)
    assert ids.count(end) == 2 and ids.count(begin) == 3  # with the bos
    labels = [label for label in found["labels"][0].tolist() if label != -100]
    assert labels == [*tokenizer("yes")["input_ids"], end]
    prompts = collator(chat=chat).prompts([sample(0, "hi <image> you", "yes", None)])
    assert prompts["input_ids"][0].tolist() == ids[: -len(labels)]
    with pytest.raises(ValueError, match=r"two tokens of the tokenizer, got \['<a>', '<b>'\]"):
        collator(chat=["<a>", "<b>"])


@pytest.mark.parametrize(
    ("size", "tiles", "expected"),
    [
        ((336, 336), 9, (3, 3)),
        ((1000, 500), 9, (4, 2)),
        ((500, 1000), 9, (2, 4)),
        ((5000, 336), 9, (9, 1)),
        ((336, 9000), 25, (1, 25)),
        ((336, 5000), 25, (1, 14)),
        ((1920, 1080), 25, (6, 4)),
        ((1, 1), 1, (1, 1)),
        ((3000, 1000), 2, (2, 1)),
    ],
)
def test_tile_grids_are_the_papers(
    size: tuple[int, int], tiles: int, expected: tuple[int, int]
) -> None:
    """Another grid means other tokens than the released model was trained on."""
    assert tile_grid(*size, tiles) == expected
    assert expected[0] * expected[1] <= tiles


def test_tiles_keep_an_images_shape() -> None:
    """Text in a document would be stretched, or its edge lost."""
    array = np.zeros((50, 100, 3), dtype=np.uint8)
    array[:, :50] = (255, 0, 0)
    transform = TileTransform(10, 3, mean=(0, 0, 0), std=(1, 1, 1))
    found = transform(Image.fromarray(array))
    # 3 tiles across would take 2 down: 2 x 1, without any white.
    assert found.shape == (3, 10, 20)
    assert found[0, :, :8].min() > 0.9 and found[:, :, 12:].max() < 0.1
    wide = transform(Image.fromarray(np.zeros((50, 200, 3), dtype=np.uint8)))
    assert wide.shape == (3, 10, 30)
    assert (wide[:, 0] == 1).all() and (wide[:, -1] == 1).all() and (wide[:, 5] == 0).all()
    tall = transform(Image.fromarray(np.zeros((200, 50, 3), dtype=np.uint8)))
    assert torch.equal(tall, wide.transpose(1, 2))
    assert [
        p.shape for p in transform.batch([Image.fromarray(array)] * 2, np.zeros(2, np.uint64))
    ] == [found.shape] * 2
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="size and tiles must be >= 1"):
            TileTransform(*wrong)
    with pytest.raises(ValueError, match="must be at least 1, got 0, 3, 4"):
        tile_grid(0, 3, 4)


def test_questions_without_pictures(tmp_path: Path) -> None:
    """The tenth of plain text in instruction tuning would not load."""
    table = tmp_path / "text.jsonl"
    rows = [{"question": "one?", "answer": "yes"}, {"question": "two?", "answer": "no"}]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = TextQuestions.from_jsonl(table)
    assert len(found) == 2 and found[-1]["answer"] == "no" and "image" not in found[0]
    batch = collator()([found[0], found[1]])
    assert (batch["labels"] != -100).any() and "pixel_values" not in batch
    table.write_text(json.dumps({"question": "one?", "answer": ""}) + "\n")
    with pytest.raises(PairError, match="'answer' must be text, got ''"):
        TextQuestions.from_jsonl(table)
    with pytest.raises(PairError, match="got 0 questions and 0 answers"):
        TextQuestions([], [])
