"""InternLM-XComposer: places, loss, generation, keys, and batches without images on ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from mmkern.models.xcomposer import XComposer, XComposerConfig, internlm_7b, xcomposer_7b
from mmkern.nn.lora import LoRALinear
from tests.models.small_generation import IMAGE, parts, shake, text_config
from tests.testing import run_ranks

PLACES = 7  # 5 queries, start, end


def small(**options: Any) -> Any:
    """In eval mode, biases in attention as InternLM's, start and end not zero."""
    fields = parts("llama", False)
    fields["text_config"] = text_config("llama", attention_bias=True, max_position_embeddings=64)
    model = shake(XComposer(XComposerConfig(**{**fields, **options}))).eval()
    model.flag_image_start.fill_(0.3)
    model.flag_image_end.fill_(-0.2)
    return model


def batch(*layouts: str, seed: int = 1) -> dict[str, Tensor]:
    """Rows of letters: "t" a token of text, "i" a whole image, "p" a pad; texts are labelled."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    for layout in layouts:
        row: list[int] = []
        for letter in layout:
            word = int(torch.randint(3, IMAGE, (1,), generator=generator))
            row += {"t": [word], "i": [IMAGE] * PLACES, "p": [1]}[letter]
        rows.append(row)
    width = max(map(len, rows))
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    counts = torch.tensor([layout.count("i") for layout in layouts])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    mask[ids == 1] = 0
    result = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((ids == IMAGE) | (mask == 0), -100),
        "image_counts": counts,
    }
    if int(counts.sum()):
        result["pixel_values"] = torch.randn(int(counts.sum()), 3, 28, 28, generator=generator)
    return result


def by_hand(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The embeddings, one position after another."""
    features = iter(model.image_features(inputs["pixel_values"]))
    table = model.get_input_embeddings()
    rows = []
    for ids in inputs["input_ids"].tolist():
        row: list[Tensor] = []
        place = 0
        while place < len(ids):
            if ids[place] == IMAGE:
                row += list(next(features))
                place += PLACES
            else:
                row.append(table.weight[ids[place]])
                place += 1
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_images_stand_in_their_places() -> None:
    """An image would be read as another's, or without its start and end."""
    model = small()
    inputs = batch("titti", "ttttttttttttttttt", "iitt", "ttit")
    embeddings = by_hand(model, inputs)
    features = model.image_features(inputs["pixel_values"])
    assert features.shape == (5, PLACES, 24)
    assert (features[:, 0] == 0.3).all() and (features[:, -1] == -0.2).all()
    assert torch.equal(model.embed(inputs["input_ids"], features), embeddings)
    mask = inputs["attention_mask"]
    output = model.language_model(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    )
    targets = inputs["labels"][:, 1:].reshape(-1)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets)
    torch.testing.assert_close(model(**inputs).loss, expected)
    got = model(**inputs, return_logits=True)
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(got.logits, output.logits)
    # The same without the numbers of images.
    del inputs["image_counts"]
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_generation_goes_on_after_images() -> None:
    """Generation would read other embeddings than training."""
    model = small()
    inputs = batch("tit", "itt")
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    said = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(said[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    embeddings = by_hand(model, inputs)
    table = model.get_input_embeddings()
    for step in range(4):
        logits = model.language_model(inputs_embeds=embeddings).logits[:, -1]
        following = said[:, inputs["input_ids"].shape[1] + step]
        alive = (said[:, inputs["input_ids"].shape[1] :][:, :step] != 2).all(1)
        assert torch.equal(logits.argmax(1)[alive], following[alive])
        embeddings = torch.cat([embeddings, table(following)[:, None]], 1)
    alone = model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=2)
    assert (alone[:, 0] == 0).all() and (alone[:, 1 : 1 + PLACES] == IMAGE).all()
    assert alone.shape[1] > 1 + PLACES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: b["input_ids"][1, :3].fill_(5),
            f"sample 1 has 4 .*expected a multiple of {PLACES}: it is cut inside an image",
        ),
        (lambda b: b["input_ids"][1, :PLACES].fill_(5), "sample 1 has 0 .*its 1 images become"),
        (
            lambda b: b.update(pixel_values=b["pixel_values"][:2]),
            "for 3 images, pixel_values has 2",
        ),
        (lambda b: b.pop("pixel_values"), "for 3 images, pixel_values has 0"),
        (lambda b: b.update(image_counts=b["image_counts"][:1]), r"image_counts must be \[2\]"),
        (lambda b: b["labels"][0, 1].fill_(4), "sample 0 has labels at 1 image tokens"),
        (lambda b: b["input_ids"][0, 0].fill_(99), "must lie in .*got .* to 99"),
        (lambda b: b.update(attention_mask=b["attention_mask"][:, 1:]), "attention_mask must be"),
        (lambda b: b.update(pixel_values=b["pixel_values"][..., 1:]), r"must be \[batch, 3, 28"),
        (lambda b: b.update({k: b[k].repeat(1, 5) for k in ("input_ids",)}), "at most 64 columns"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, message: str) -> None:
    """Images would be shifted by one, silently, for all samples that follow."""
    inputs = batch("titti", "ittttttttt")
    change(inputs)
    with pytest.raises(ValueError, match=message):
        small()(**inputs)


def test_batch_without_images_has_zero_gradients() -> None:
    """DistributedDataParallel would wait for ever for the sampler's gradients."""
    model = small().train()
    inputs = batch("tttt", "tt")
    output = model(**inputs)
    plain = model.language_model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    targets = inputs["labels"][:, 1:].reshape(-1)
    expected = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), targets)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert value.grad is not None, name
            assert name.startswith("language_model.") or not value.grad.any(), name


def _step(rank: int, world: int) -> list[dict[str, Tensor]]:
    """Three steps' gradients; in the second rank 1 has no image, in the third nobody."""
    model = DistributedDataParallel(small(lora_rank=2, freeze_language_model=True))
    found = []
    for layouts in (("tit", "it"), ("titt", "tttt"), ("ttt", "tt")):
        model.zero_grad()
        model(**batch(layouts[rank], seed=3 + rank)).loss.backward()
        grads = {n: p.grad for n, p in model.module.named_parameters() if p.requires_grad}
        found.append({name: grad.clone() for name, grad in grads.items()})
    return found


def test_ranks_without_images_do_not_hang() -> None:
    """A rank whose batch is all text would stop the others for ever."""
    first, second = run_ranks(2, _step)
    alone = small(lora_rank=2, freeze_language_model=True)
    for step, layouts in enumerate((("tit", "it"), ("titt", "tttt"), ("ttt", "tt"))):
        alone.zero_grad()
        for rank in range(2):
            (alone(**batch(layouts[rank], seed=3 + rank)).loss / 2).backward()
        for name, value in alone.named_parameters():
            if value.requires_grad:
                assert torch.equal(first[step][name], second[step][name])
                torch.testing.assert_close(first[step][name], value.grad, rtol=1e-4, atol=1e-6)


def test_adapters_leave_a_new_model_as_it_was() -> None:
    """The second stage would not begin where the first ended, or train what it freezes."""
    plain, adapted = small(), small(lora_rank=3, lora_alpha=6.0, freeze_language_model=True)
    layers = {n: m for n, m in adapted.named_modules() if isinstance(m, LoRALinear)}
    assert {name.rpartition(".")[2] for name in layers} == set(adapted.config.lora_targets)
    for layer in layers.values():
        assert layer.scaling == 2.0
        torch.nn.init.zeros_(layer.lora_B.weight)
    kept = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert not kept.unexpected_keys and all(".lora_" in name for name in kept.missing_keys)
    inputs = batch("titt", "tttttttttt")
    torch.testing.assert_close(adapted(**inputs).loss, plain(**inputs).loss)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    language = {name for name in trained if name.startswith("language_model.")}
    assert language and all(".lora_" in name for name in language)
    assert {"query_tokens", "vision_model.post_layernorm.weight"} < trained
    assert all(p.requires_grad for n, p in plain.named_parameters() if "language_model" in n)


def test_released_keys_go_both_ways() -> None:
    """A released checkpoint would not load, or lose a tensor."""
    for rank in (0, 2):
        model = small(lora_rank=rank)
        with torch.no_grad():  # the released encoder has no bias of keys, which changes nothing
            for block in model.vision_model.encoder.layers:
                block.self_attn.qkv.bias.chunk(3)[1].zero_()
        released = model.to_released()
        names = set(released)
        assert {"query_tokens", "internlm_proj.weight", "ln_vision.bias"} <= names
        assert {"flag_image_start", "flag_image_end"} <= names
        assert "Qformer.bert.encoder.layer.0.crossattention.self.key.weight" in names
        assert "internlm_model.model.layers.1.self_attn.o_proj.bias" in names
        lora = "internlm_model.model.layers.0.mlp.up_proj.lora_A.weight"
        assert (lora in names) == bool(rank)
        assert released["flag_image_start"].shape == (1, 1, 24)
        assert not [n for n in names if n.startswith(("language_", "qformer.", "vision_model."))]
        released["internlm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        read = XComposer.from_released(released, model.config)
        for name, value in model.state_dict().items():
            assert torch.equal(read.state_dict()[name], value), name
        inputs = batch("tit")
        assert torch.equal(read(**inputs).loss, model(**inputs).loss)
        for change, message in (
            ({"flag_image_end": None}, "missing: flag_image_end"),
            ({"extra": torch.ones(1)}, "extra"),
            ({"internlm_proj.bias": torch.ones(3)}, "language_projection.bias"),
        ):
            wrong = {n: v for n, v in {**released, **change}.items() if v is not None}
            with pytest.raises(ValueError, match=message):
                XComposer.from_released(wrong, model.config)


def test_folder_comes_back(tmp_path: Any) -> None:
    """A trained model would be lost, or come back without its adapters."""
    model = small(lora_rank=2, freeze_language_model=True)
    model.save_pretrained(tmp_path)
    read = XComposer.from_pretrained(tmp_path)
    inputs = batch("tit")
    assert torch.equal(read(**inputs).loss, model(**inputs).loss)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (read, model)]
    assert trained[0] == trained[1]


def test_published_sizes() -> None:
    """The builder would make another architecture than the released one."""
    with torch.device("meta"):
        model = xcomposer_7b(lora_rank=256)
    assert model.image_positions == 66 and model.query_tokens.shape == (1, 64, 768)
    assert model.language_projection.weight.shape == (4096, 768)
    attention = model.language_model.model.layers[31].self_attn
    assert attention.o_proj.bias.shape == (4096,) and attention.q_proj.lora_A.weight.shape[0] == 256
    assert model.language_model.lm_head.weight.shape == (103170, 4096)
    assert internlm_7b().attention_bias and model.config.text_config.attention_bias
    assert isinstance(model.language_model, LlamaForCausalLM)
