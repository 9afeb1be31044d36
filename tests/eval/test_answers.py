"""Scores of captions and answers, and the ranking of candidates by a language model."""

import pytest
import torch

from mmkern.data.images import PixelTransform
from mmkern.data.language import CausalCollator, Seq2SeqCollator, Texts
from mmkern.eval.answers import Answerer, exact_match, majority, normalise, shuffled_pictures
from tests.data.tokenizers import byte_level, sentence_pieces
from tests.models.small_generation import small

WORDS = ["yes", "no", "a red heart"]


def question(index, answer="yes"):
    picture = torch.full((28, 28, 3), 30 * index, dtype=torch.uint8)
    return {
        "image": picture, "kind": "question", "subject": "is it red?" + " well?" * index,
        "answer": answer, "index": index, "epoch": 0,
    }  # fmt: skip


def answerer(kind, instruct=False, **options):
    """A small random model with a tokenizer whose ids it has."""
    tokenizer = sentence_pieces() if kind == "t5" else byte_level()
    model = small(
        kind,
        instruct,
        image_token_index=len(tokenizer) + 7,
        text={"vocab_size": len(tokenizer), "max_position_embeddings": 128}
        if kind != "t5"
        else {"vocab_size": len(tokenizer)},
    )
    made = Seq2SeqCollator if kind == "t5" else CausalCollator
    reads = {}
    if instruct:

        class Reader:  # the Q-Former's 61 ids
            cls_token_id, sep_token_id, pad_token_id = 1, 2, 0

            def __call__(self, texts, **options):
                return {"input_ids": [[3 + len(word) for word in text.split()] for text in texts]}

        reads = {"qformer_tokenizer": Reader(), "prompt_length": 14}
    collator = made(
        PixelTransform(),
        tokenizer,
        model.config.num_query_tokens,
        model.config.image_token_index,
        texts=Texts(first=True),
        **reads,
    )
    return Answerer(model, collator, **options)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Red  Heart.", "red heart"),
        ("an apple", "apple"),
        ("A", "a"),
        ("three o’clock", "three o'clock"),
        ("banana", "banana"),
        ("", ""),
    ],
)
def test_normalise(text, plain):
    """An article or a capital would make a right answer wrong, or eat a word."""
    assert normalise(text) == plain


def test_exact_match_and_majority():
    """Baselines would be computed on other answers than the model's."""
    right = [["red", "dark red"], ["blue"], ["the red"], ["green"]]
    assert exact_match(["Dark red", "red", "Red", ""], right) == 0.5
    assert majority(right) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        exact_match([], [])


def test_shuffled_pictures_are_all_others():
    """Some questions would keep their picture, and the baseline look better than it is."""
    samples = [question(i) for i in range(7)]
    mixed = shuffled_pictures(samples)
    for old, new in zip(samples, mixed, strict=True):
        assert new["subject"] == old["subject"]
        assert not torch.equal(new["image"], old["image"])
    assert {int(s["image"][0, 0, 0]) for s in mixed} == {30 * i for i in range(7)}


@pytest.mark.parametrize(
    ("kind", "instruct"), [("llama", False), ("opt", False), ("t5", False), ("llama", True)]
)
def test_ranking_is_the_likelihood_of_each_answer(kind, instruct):
    """Candidates would be ranked by something else than what the model was trained on."""
    made = answerer(kind, instruct, batch_size=3)
    samples = [question(i) for i in range(4)]
    candidates = [WORDS, WORDS[:2], WORDS[:1], WORDS]
    found = made.rank(samples, candidates)
    for sample, of, scores in zip(samples, candidates, found, strict=True):
        assert len(scores) == len(of)
        for answer, score in zip(of, scores, strict=True):
            batch = made.collator([{**sample, "answer": answer}])
            count = (batch["labels"] != -100).sum()
            with torch.no_grad():
                loss = made.model(**batch).loss
            assert -loss * count == pytest.approx(score.item(), rel=1e-4)
    with pytest.raises(ValueError, match="every sample needs candidates"):
        made.rank(samples[:1], [[]])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation_gives_one_text_each(kind):
    """The prompt would be part of the answer, or samples be mixed up by padding."""
    made = answerer(kind, batch_size=2, max_new_tokens=4)
    samples = [question(i) for i in range(3)]
    said = made.generate(samples)
    alone = [made.generate([sample])[0] for sample in samples]
    assert said == alone
    assert all("is it red" not in text for text in said)
