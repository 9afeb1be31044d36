"""Conversations: templates, LLaVA's JSON, labels, truncation, batches of several pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmkern.data import (
    CONVERSATIONS,
    ClipTransform,
    ConversationCollator,
    ConversationDataset,
    ImageError,
    PairError,
    Turn,
    read_turns,
)
from tests.data.tokenizers import byte_level, sentence_pieces

IMAGE_ID, TOKENS, BOS = 400, 3, 0
RED, BLUE = Image.new("RGB", (20, 16), "red"), Image.new("RGB", (16, 20), "blue")
TURNS = [
    Turn("what is this?", "a tiger face", 1),
    Turn("which colour?", "red  and blue, half past ten"),
    Turn("yes?", "no"),
]
TOKENIZERS = {"byte level": byte_level, "sentence pieces": sentence_pieces}


def collator(name: str = "byte level", **options: Any) -> ConversationCollator:
    tokenizer = TOKENIZERS[name]()
    return ConversationCollator(
        ClipTransform(8), tokenizer, TOKENS, IMAGE_ID, **{"bos": BOS, **options}
    )


def sample(turns: list[Turn], images: list[Any], index: int = 0) -> dict[str, Any]:
    return {"turns": turns, "images": images, "index": index, "epoch": 0}


def spans(labels: torch.Tensor) -> list[list[int]]:
    """Runs of labelled ids."""
    runs: list[list[int]] = [[]]
    for label in labels.tolist():
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    return [run for run in runs if run]


@pytest.mark.parametrize("tokens", TOKENIZERS)
@pytest.mark.parametrize("template", ["v1", "llama_2", "bare"])
def test_decoded_labels_are_the_answers(template: str, tokens: str) -> None:
    """The model would be trained on questions, on parts of answers, or without an end."""
    collate = collator(tokens, template=template)
    batch = collate([sample(TURNS, [RED])])
    found = spans(batch["labels"][0])
    end = collate.tokenizer.eos_token_id
    assert [run[-1] for run in found] == [end] * 3
    said = [" ".join(collate.tokenizer.decode(run[:-1]).split()) for run in found]
    assert said == [" ".join(turn.answer.split()) for turn in TURNS]
    # Where there is a label it is the row's own id.
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


def test_an_empty_answer_is_only_its_end() -> None:
    """An empty answer would join its round to the next, as it does upstream."""
    collate = collator()
    whole = spans(collate([sample(TURNS, [RED])])["labels"][0])
    turns = [TURNS[0], TURNS[1]._replace(answer=""), TURNS[2]]
    found = spans(collate([sample(turns, [RED])])["labels"][0])
    assert found == [whole[0], [collate.tokenizer.eos_token_id], whole[2]]


def test_templates_write_the_authors_texts() -> None:
    """A released model would be asked in words that it was not trained on."""

    def text(template: str) -> str:
        parts = []
        for number, turn in enumerate(TURNS[::2]):
            before, prompt, answer = CONVERSATIONS[template].round(number, turn)
            parts.append("<image>".join([*before, prompt]) + answer)
        return "|".join(parts)

    assert text("v1").endswith(
        "polite answers to the user's questions. USER: <image>\nwhat is this? ASSISTANT: a tiger "
        "face|USER: yes? ASSISTANT: no"
    )
    assert text("llama_2").endswith(
        "<</SYS>>\n\n<image>\nwhat is this? [/INST] a tiger face |[INST] yes? [/INST] no "
    )
    caption = CONVERSATIONS["plain"].round(0, Turn("what is this?", "a tiger face", 1))
    assert caption == ([""], "", "a tiger face\n")


def test_plain_is_picture_and_caption() -> None:
    """Stage 1 would train on the question, or on a caption that never ends."""
    collate = collator(template="plain")
    caption = {"image": RED, "text": "a red heart", "index": 4, "epoch": 0}
    batch = collate([caption])
    assert batch["input_ids"][0, : TOKENS + 1].tolist() == [BOS, *[IMAGE_ID] * TOKENS]
    (run,) = spans(batch["labels"][0])
    assert collate.tokenizer.decode(run) == "a red heart\n"
    assert run[-1] == collate.eos[-1] != collate.tokenizer.eos_token_id
    prompt = collate.prompts([caption])
    assert prompt["input_ids"].tolist() == [[BOS, *[IMAGE_ID] * TOKENS]]
    assert collate.answer_ids([(caption, "a red heart")]) == [run]


def test_prompt_and_answer_make_the_training_row() -> None:
    """Generation would begin from other tokens than training, and rank other candidates."""
    collate = collator(template="llama_2")
    whole = collate([sample(TURNS, [RED])])["input_ids"][0].tolist()
    prompt = collate.prompts([sample(TURNS, [RED])])["input_ids"][0].tolist()
    (answer,) = collate.answer_ids([(sample(TURNS, [RED]), TURNS[-1].answer)])
    assert prompt + answer == whole
    assert whole.count(BOS) == 3


def test_batches_of_0_1_and_2_pictures() -> None:
    """A picture would go to another sample, or a text without one could not be trained on."""
    collate = collator()
    two = [Turn("red or blue?", "a red heart", 2)]
    batch = collate([sample(TURNS, [RED], 3), sample(TURNS[2:], [], 4), sample(two, [RED, BLUE])])
    assert batch["image_counts"].tolist() == [1, 0, 2]
    assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [TOKENS, 0, 2 * TOKENS]
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert "pixel_values" not in collate([sample(TURNS[2:], [])])
    left = collate.prompts([sample(TURNS, [RED]), sample(TURNS[2:], [])])
    assert left["attention_mask"][:, -1].tolist() == [1, 1] and not left["attention_mask"][1, 0]


def test_special_tokens_in_a_text_are_only_text() -> None:
    """Words of a user could end a sequence or stand for a picture."""
    collate = collator()
    batch = collate([sample([Turn("<end> <start> <image>", "no")], [])])
    assert (batch["input_ids"] == collate.tokenizer.eos_token_id).sum() == 1
    assert (batch["input_ids"] == BOS).sum() == 1


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        (TURNS, [], "sample 1 has 0 pictures, its 3 rounds have places for 1"),
        (TURNS[2:], [RED], "sample 1 has 1 pictures, its 1 rounds have places for 0"),
        ([], [], "sample 1 has 0 pictures, its 0 rounds"),
    ],
)
def test_pictures_that_do_not_fit(turns: Any, images: Any, message: str) -> None:
    """A picture without a place, or a place without one, would shift all pictures after it."""
    with pytest.raises(ValueError, match=message):
        collator()([sample(TURNS, [RED]), sample(turns, images)])


def test_long_conversations() -> None:
    """A cut would leave part of a picture, or an answerless sample would make the loss NaN."""
    collate = collator(template="bare", max_length=40)
    batch = collate([sample([Turn("why? " * 60, "no")], []), sample(TURNS[2:], [], 1)])
    assert batch["input_ids"].shape[1] <= 40
    assert (batch["labels"] != -100).any(1).tolist() == [False, True]
    assert collate.skipped == 1
    late = [Turn("why? " * 60, "no"), Turn("and this?", "no", 1)]
    with pytest.raises(ValueError, match=r"sample 0 takes .* max_length is 40: .*cut a picture"):
        collate([sample(late, [RED])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "v2"}, "template must be one of"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ],
)
def test_collators_that_cannot_be(options: dict[str, Any], message: str) -> None:
    """A misspelt template would be found out after loading a model."""
    with pytest.raises(ValueError, match=message):
        collator(**options)


def test_tags_stand_before_the_question() -> None:
    """A tag in the middle of a question would be text, and its picture have no place."""
    given = [
        {"from": "gpt", "value": "hello"},
        {"from": "human", "value": "what is\n<image>this <image>?"},
        {"from": "gpt", "value": " a tiger "},
    ]
    assert read_turns(given) == [Turn("what is\nthis ?", "a tiger", 2)]


def rows(folder: Path) -> list[dict[str, Any]]:
    RED.save(folder / "a.png")
    asked = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a heart"}]
    text = [{"from": "human", "value": "why? " * 9}, {"from": "gpt", "value": "no"}]
    two = [{"from": "human", "value": "<image><image> both?"}, {"from": "gpt", "value": "yes"}]
    return [
        {"id": "1", "image": "a.png", "conversations": asked},
        {"id": "2", "conversations": text},
        {"id": "3", "image": ["a.png", "a.png"], "conversations": two},
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llavas_json(suffix: str, tmp_path: Path) -> None:
    """The authors' files could not be trained on."""
    table = tmp_path / f"data.{suffix}"
    made = rows(tmp_path)
    table.write_text(json.dumps(made) if suffix == "json" else "\n".join(map(json.dumps, made)))
    data = ConversationDataset.from_json(table)
    assert len(data) == 3 and data.pictured.tolist() == [True, False, True]
    assert data.lengths(100).tolist() == [103, 10, 202]
    assert [len(data[i]["images"]) for i in range(3)] == [1, 0, 2]
    assert data[-1]["turns"] == [Turn("both?", "yes", 2)]
    batch = collator()([data[i] for i in range(3)])
    assert batch["image_counts"].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "row 0: 1 <image> tags for 0 pictures"),
        ({"image": ["a.png", "a.png"]}, "row 0: 1 <image> tags for 2 pictures"),
        ({"image": "b.png"}, "row 0: no such file"),
        ({"image": 7}, "row 0: 'image' must be a path"),
        ({"conversations": []}, "row 0: .*pairs of turns, got 0"),
        ({"conversations": "hello"}, "row 0: .*list of turns"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "row 0: .*alternate"),
        ({"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "a"}]},
         "row 0: a turn's value must be text"),
    ],
)  # fmt: skip
def test_bad_rows(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A broken row would be found in the middle of a run, or trained on with another's picture."""
    made = rows(tmp_path)
    made[0] |= change
    table = tmp_path / "data.json"
    table.write_text(json.dumps(made))
    with pytest.raises(PairError, match=message):
        ConversationDataset.from_json(table)
    data = ConversationDataset.from_json(table, on_error="skip")
    assert (len(data), data.dropped) == (2, 1)


def test_broken_pictures(tmp_path: Path) -> None:
    """One broken picture would end a run that was told to skip it."""
    made = rows(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    made[0]["image"] = "broken.png"
    table = tmp_path / "data.json"
    table.write_text(json.dumps(made))
    with pytest.raises(ImageError, match=r"broken\.png"):
        ConversationDataset.from_json(table)[0]
    data = ConversationDataset.from_json(table, on_error="skip")
    assert data[0]["turns"] in (data[1]["turns"], data[2]["turns"])
    assert data.skipped == 1


def test_padding_to_a_square_keeps_the_whole_picture() -> None:
    """LLaVA 1.5 would be shown the middle of a wide picture only."""
    wide = Image.new("RGB", (40, 10), "red")
    wide.paste("blue", (0, 0, 10, 10))
    zero = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (1.0, 1.0, 1.0)}
    pixels = ClipTransform(8, **zero, pad=True)(wide)
    shown = pixels + torch.tensor(zero["mean"]).view(3, 1, 1)
    assert shown[2, 3, 0] > 0.9 and shown[0, 3, -1] > 0.9  # blue left, red right
    border = (255 * shown[:, 0, 0]).round().int().tolist()
    assert border == [122, 116, 104]
    cropped = ClipTransform(8, **zero)(wide) + torch.tensor(zero["mean"]).view(3, 1, 1)
    assert cropped[2].max() < 0.1
