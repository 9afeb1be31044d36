"""Batches of BLIP-2 and InstructBLIP: what is labelled, padded, cut, and refused."""

import pytest
import torch

from mmkern.data.images import PixelTransform
from mmkern.data.instructions import TEMPLATES
from mmkern.data.language import (
    IGNORE,
    CausalCollator,
    PretrainingCollator,
    Seq2SeqCollator,
    Texts,
    text_id,
)
from mmkern.data.randomness import sample_keys
from mmkern.models.packaged import minilm_tokenizer
from tests.data.tokenizers import byte_level, sentence_pieces

IMAGE, QUERIES = 9_000, 3


def picture(index=0):
    return torch.full((4, 4, 3), index % 256, dtype=torch.uint8)


def caption(text, index=0, epoch=0):
    return {"image": picture(index), "text": text, "index": index, "epoch": epoch}


def question(subject, answer, kind="question", index=0, epoch=0):
    return {
        "image": picture(index),
        "kind": kind,
        "subject": subject,
        "answer": answer,
        "index": index,
        "epoch": epoch,
    }


def collator(kind, tokenizer=None, **options):
    tokenizer = tokenizer or (byte_level() if kind is CausalCollator else sentence_pieces())
    return kind(PixelTransform(), tokenizer, QUERIES, IMAGE, **options)


QUESTIONS = [
    question("what kind of thing is this?", "a tiger face", index=0),
    question("what colour is it?", "red", index=1),
    question("is it a book?", "no", kind="verbatim", index=2),
]


@pytest.mark.parametrize("kind", [CausalCollator, Seq2SeqCollator])
def test_labels_are_the_answers(kind):
    """The model would be trained on its prompt, or never on the first or last word of an answer."""
    made = collator(kind)
    batch = made(QUESTIONS)
    for labels, sample in zip(batch["labels"], QUESTIONS, strict=True):
        kept = labels[labels != IGNORE]
        assert kept[-1] == made.tokenizer.eos_token_id
        assert made.tokenizer.decode(kept[:-1]).strip() == sample["answer"]


def test_causal_row():
    """Image, prompt, answer and pads would not stand where the model expects them."""
    made = collator(CausalCollator, bos=0)
    batch = made(QUESTIONS)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids.shape == mask.shape == labels.shape
    assert (ids[:, :QUERIES] == IMAGE).all() and (ids == IMAGE).sum(1).tolist() == [QUERIES] * 3
    assert (ids[:, QUERIES] == 0).all()
    assert (labels[(ids == IMAGE) | (mask == 0)] == IGNORE).all()
    assert (labels[:, QUERIES] == IGNORE).all()
    labelled = labels != IGNORE
    assert torch.equal(labels[labelled], ids[labelled])
    for row, length in enumerate(mask.sum(1).tolist()):
        assert mask[row, :length].all()
        text = made.tokenizer.decode(ids[row, QUERIES + 1 : length - 1])
        assert text.endswith(QUESTIONS[row]["answer"]) and QUESTIONS[row]["subject"] in text
    assert batch["pixel_values"].shape == (3, 3, 4, 4)


def test_bos_as_a_target():
    """BLIP-2 with OPT learns to begin its text after the picture; InstructBLIP does not."""
    batch = collator(CausalCollator, bos=0, label_bos=True)(QUESTIONS)
    assert (batch["labels"][:, QUERIES] == 0).all()
    assert (batch["labels"][:, :QUERIES] == IGNORE).all()


def test_token_across_the_border_is_labelled():
    """A tokenizer that joins the end of the prompt and the answer would lose part of the answer."""
    made = collator(CausalCollator)
    merged = made.tokenizer("what", add_special_tokens=False)["input_ids"]
    whole, answer = made._split([("wh", "at"), ("", "what")])
    assert whole[0] + whole[1] == made.tokenizer("wh at", add_special_tokens=False)["input_ids"]
    assert answer == ([], merged)


@pytest.mark.parametrize("length", [2, 5, 100])
def test_long_prompts_lose_their_beginning(length):
    """A long instruction would push out the question, the answer, or part of the picture."""
    made = collator(CausalCollator, prompt_length=length, answer_length=3)
    long = question("the quick brown fox. " * 30 + "what colour is it?", "red " * 20)
    batch = made([long])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert (ids == IMAGE).sum() == QUERIES
    assert (labels != IGNORE).sum() == 3 + 1
    prompt = ids[QUERIES : len(ids) - 4]
    assert len(prompt) == length
    uncut = collator(CausalCollator, prompt_length=10_000, answer_length=3)([long])["input_ids"][0]
    assert torch.equal(prompt, uncut[: len(uncut) - 4][-length:])
    assert len(uncut) > len(ids)


def test_no_samples_and_image_ids_in_the_text():
    """A text that spells the image token would shift every feature of the picture by one."""
    tokenizer = byte_level()
    inside = tokenizer.convert_tokens_to_ids("<image>")
    made = CausalCollator(PixelTransform(), tokenizer, QUERIES, inside)
    batch = made([question("what is <image> here?", "<image>", kind="verbatim")])
    assert (batch["input_ids"] == inside).sum() == QUERIES, "spelled out, it is only text"
    row = [inside] * (QUERIES + 1)
    with pytest.raises(ValueError, match="sample 1 has 4 image tokens, its picture becomes 3"):
        made._check([row[1:], row])
    with pytest.raises(ValueError, match="no samples"):
        made([])


def test_empty_answer_still_ends():
    """An empty answer would leave nothing to learn from, and a loss that is not a number."""
    batch = collator(CausalCollator)([question("what is this?", "", kind="verbatim")])
    assert batch["labels"][batch["labels"] != IGNORE].tolist() == [1]


@pytest.mark.parametrize("kind", [CausalCollator, Seq2SeqCollator])
def test_prompts_for_generation(kind):
    """Generation would see the answer, or pads between the prompt and what is to come."""
    made = collator(kind, texts=Texts(first=True))
    batch = made.prompts(QUESTIONS)
    assert "labels" not in batch
    for row, mask, sample in zip(
        batch["input_ids"], batch["attention_mask"], QUESTIONS, strict=True
    ):
        real = row[mask.bool()]
        assert (real[:QUERIES] == IMAGE).all()
        text = made.tokenizer.decode(real[QUERIES:], skip_special_tokens=True).strip()
        assert sample["subject"] in text and not text.endswith(sample["answer"])
        if kind is CausalCollator:
            assert mask[-1] == 1, "pads are on the left"


def test_prompt_has_the_same_tokens_with_and_without_its_answer():
    """The model would be tested on other tokens than those it was trained on."""
    made = collator(CausalCollator, texts=Texts(first=True))
    for with_answer, alone in zip(
        made(QUESTIONS)["input_ids"], made.prompts(QUESTIONS)["input_ids"], strict=True
    ):
        prompt = alone[(alone != 1).nonzero()[0].item() :]
        assert torch.equal(with_answer[: len(prompt)], prompt)


def test_prefix_language_modelling():
    """T5 would never see a prefix, always the same one, or lose words between prefix and target."""
    made = collator(Seq2SeqCollator, seed=3)
    text = "the quick brown fox kind of thing"
    borders = set()
    for epoch in range(30):
        batch = made([caption(text, epoch=epoch)])
        prefix = made.tokenizer.decode(
            batch["input_ids"][0, QUERIES:], skip_special_tokens=True
        ).strip()
        target = made.tokenizer.decode(batch["labels"][0], skip_special_tokens=True).strip()
        assert f"{prefix} {target}" == text
        borders.add(len(prefix.split()))
    assert borders == {1, 2, 3}
    one = made([caption("fox")])
    assert made.tokenizer.decode(one["labels"][0], skip_special_tokens=True).strip() == "fox"


def test_batches_depend_on_seed_epoch_and_index_alone():
    """A resumed run would see other prompts than the one that was interrupted."""
    made = collator(CausalCollator, texts=Texts(captions=["a {}", "the {}", "one {}", "{}"]))
    samples = [caption("fox", index) for index in range(8)]
    first = made(samples)
    assert torch.equal(made(samples)["input_ids"], first["input_ids"])
    alone = made(samples[5:6])["input_ids"][0]
    assert torch.equal(first["input_ids"][5][: len(alone)], alone)
    later = made([caption("fox", index, epoch=1) for index in range(8)])
    assert not torch.equal(
        later["input_ids"][:, QUERIES:][:, :1], first["input_ids"][:, QUERIES:][:, :1]
    )


def test_every_kind_uses_all_its_templates():
    """InstructBLIP's variety of wordings would be there on paper only."""
    made = Texts()
    for kind, templates in TEMPLATES.items():
        samples = [question("this", "yes", kind=kind, index=i) for i in range(400)]
        pairs = made(samples, sample_keys(0, 0, range(400)))
        assert {prompt for prompt, _ in pairs} == {t.replace("{}", "this") for t in templates}
    with pytest.raises(ValueError, match="no templates for questions of kind 'smell'"):
        made([question("x", "y", kind="smell")], sample_keys(0, 0, [0]))


def test_qformer_reads_the_instruction():
    """InstructBLIP's Q-Former would read the answer, or not the end of a long question."""
    bert = minilm_tokenizer()
    made = collator(CausalCollator, qformer_tokenizer=bert, prompt_length=12)
    long = question("the quick brown fox " * 20 + "what colour is it?", "red", kind="verbatim")
    batch = made([QUESTIONS[2], long])
    ids, mask = batch["qformer_input_ids"], batch["qformer_attention_mask"]
    assert bert.decode(ids[0][mask[0].bool()]) == "[CLS] is it a book? [SEP]"
    text = bert.decode(ids[1][mask[1].bool()])
    assert text.startswith("[CLS]") and text.endswith("what colour is it? [SEP]")
    assert mask.sum(1).tolist()[1] == 12


def test_pretraining_batch():
    """Stage 1 would see its captions cut, unpadded, or take a second tiger for a negative."""
    bert = minilm_tokenizer()
    made = PretrainingCollator(
        PixelTransform(), bert, texts=Texts(captions=["a picture of {}"]), length=8
    )
    samples = [caption("tiger", 0), caption("red heart", 1), caption("tiger", 2)]
    batch = made(samples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 8)
    words = bert.batch_decode(batch["input_ids"])
    assert words[0] == "[CLS] a picture of tiger [SEP] [PAD] [PAD]"
    assert batch["attention_mask"].sum(1).tolist() == [6, 7, 6]
    assert batch["image_ids"][0] == batch["image_ids"][2] == text_id("tiger")
    assert batch["image_ids"][0] != batch["image_ids"][1]
    grouped = made([{**samples[0], "group": 7}, samples[1]])
    assert grouped["image_ids"][0] == 7
    long = made([caption("the quick brown fox " * 9)])
    assert long["attention_mask"].sum() == 8 and long["input_ids"][0, -1] == bert.sep_token_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_length": 0}, "at least 1"),
        ({"eos": []}, "no end of sequence"),
        ({"tokenizer": object()}, "fast tokenizer"),
    ],
)
def test_settings_that_cannot_work(options, message):
    """A wrong setting would show up as a loss that does not fall."""
    with pytest.raises(ValueError, match=message):
        collator(CausalCollator, **options)


@pytest.mark.parametrize(
    "options",
    [{"captions": []}, {"captions": ["a {} and {}"]}, {"captions": ["a picture"]},
     {"instructions": {"name": ["what is {}?", "what?"]}}],
)  # fmt: skip
def test_templates_that_cannot_be_filled(options):
    """A subject would get lost in some of a task's questions."""
    with pytest.raises(ValueError, match=r"templates of kind|captions need"):
        Texts(**options)
