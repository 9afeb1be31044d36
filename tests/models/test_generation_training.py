"""Training, saving and building BLIP-2 (second stage) and InstructBLIP."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, PhiConfig
from transformers.modeling_layers import GradientCheckpointingLayer as Recomputing

from mmkern.models import blip2_generation, instructblip
from mmkern.models.blip2_base import Blip2Base, ClipVisionConfig
from mmkern.train.stage import Stage
from tests.models.small_generation import (
    IMAGE,
    KINDS,
    VOCABULARY,
    batch,
    pair,
    parts,
    prompt,
    shake,
    small,
)

SYSTEMS = [(kind, instruct) for instruct in (False, True) for kind in KINDS]


@pytest.mark.parametrize(("kind", "instruct"), SYSTEMS)
def test_folders_go_both_ways(kind: str, instruct: bool, tmp_path: Path) -> None:
    """Published checkpoints would not load, or a trained model not run in transformers."""
    ours, theirs = pair(kind, instruct)
    inputs = batch(kind, instruct)
    expected = theirs(**inputs).loss
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    read = type(ours).from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(read(**inputs).loss, expected, rtol=0, atol=1e-5)
    again = type(ours).from_pretrained(tmp_path / "ours")
    assert torch.equal(again(**inputs).loss, ours(**inputs).loss)
    back = type(theirs).from_pretrained(tmp_path / "ours")
    assert torch.equal(back(**inputs).loss, expected)
    for model in (read, again, back):
        assert model.config.image_token_index == IMAGE
        for name, value in theirs.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    options = {"max_new_tokens": 4, "num_beams": 2}
    given = prompt(inputs)
    assert torch.equal(read.generate(**given, **options), theirs.generate(**given, **options))


def test_separate_head_of_a_t5_survives(tmp_path: Path) -> None:
    """Flan-T5's head is not its embedding: tied by mistake, it would say other words."""
    model = small("t5", text={"tie_word_embeddings": False})
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(VOCABULARY, 24, generator=generator)
    model.language_model.lm_head.weight = torch.nn.Parameter(own)
    inputs = batch("t5")
    expected = model(**inputs)
    torch.testing.assert_close(model(**inputs, return_logits=True).loss, expected.loss)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.language_model.lm_head.weight, own)
    assert torch.equal(again(**inputs).loss, expected.loss)


@pytest.mark.parametrize("instruct", [False, True])
def test_incomplete_file_is_refused(instruct: bool, tmp_path: Path) -> None:
    """A truncated download would be filled up with random weights."""
    model = small("opt", instruct)
    state = model.state_dict()
    gone = state.pop("qformer.encoder.layer.0.output_query.dense.bias")
    model.save_pretrained(tmp_path, state_dict={**state, "extra.weight": gone})
    with pytest.raises(
        ValueError, match=r"missing: qformer.*output_query.dense.bias; unexpected: extra.weight"
    ):
        type(model).from_pretrained(tmp_path)


def test_old_buffers_do_not_matter(tmp_path: Path) -> None:
    """Files that older versions of transformers wrote would be refused."""
    model = small("llama", instruct=True)
    buffers = {
        "qformer.embeddings.position_ids": torch.arange(16)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3),
    }
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), **buffers})
    again = type(model).from_pretrained(tmp_path)
    inputs = batch("llama", instruct=True)
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize(("kind", "instruct"), SYSTEMS)
def test_half_precision_keeps_what_is_trained(kind: str, instruct: bool, tmp_path: Path) -> None:
    """A language model in bf16 would drag the Q-Former along, whose small steps are then lost."""
    whole = small(kind, instruct)
    whole.save_pretrained(tmp_path)
    model = type(whole).from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.language_model.requires_grad_(False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    inputs = batch(kind, instruct)
    expected = whole(**inputs).loss
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=5e-2, atol=5e-2)
    assert model.generate(**prompt(inputs), max_new_tokens=2).dtype == torch.int64


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
@pytest.mark.parametrize(("kind", "instruct"), SYSTEMS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, instruct: bool) -> None:
    """Training with less memory would train another model."""
    plain, model = small(kind, instruct).train(), small(kind, instruct).train()
    model.gradient_checkpointing_enable()
    calls: list[int] = []
    for layer in model.qformer.encoder.layer:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = batch(kind, instruct)
    losses = [m(**inputs).loss for m in (model, plain)]
    for loss in losses:
        loss.backward()
    assert len(calls) == 2 * len(model.qformer.encoder.layer)
    torch.testing.assert_close(*losses)
    for (name, value), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if value.requires_grad:
            torch.testing.assert_close(value.grad, other.grad, msg=name)


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_language_model_recomputes_too(kind: str) -> None:
    """A stage puts what is frozen into eval mode, where transformers keeps all activations: a
    frozen language model of billions would not fit where a trained one does."""
    plain, model = small(kind), small(kind)
    model.gradient_checkpointing_enable()
    Stage(freeze=("vision_model.e*", "language_model.*")).apply(model)
    calls: list[bool] = []
    layers = [m for m in model.language_model.modules() if isinstance(m, Recomputing)]
    for layer in layers:
        first = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
        first.register_forward_pre_hook(lambda *_: calls.append(True))
    inputs = batch(kind)
    for _ in range(2):
        calls.clear()
        model.train()
        loss = model(**inputs).loss
        loss.backward()
        assert len(calls) == 2 * len(layers) > 0
    assert not any(m.training for m in model.language_model.modules() if m not in layers)
    torch.testing.assert_close(loss, plain(**inputs).loss)
    # OPT's layers would drop in their own forward: no dropout comes before memory.
    if kind == "opt":
        layers[0].dropout = 0.1
        model.train()
        model(**inputs)
        assert not layers[0].training


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.seen |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_head_costs_no_gradient_and_no_logits(kind: str) -> None:
    """A step would compute the gradient of a matrix of the vocabulary's size, and drop it."""
    model = small(kind).train()
    model.language_model.requires_grad_(False)
    inputs = batch(kind)
    model(**inputs).loss.backward()  # the first batch looks at a row of logits
    with Shapes() as shapes:
        loss = model(**inputs).loss
        loss.backward()
    width = model.get_input_embeddings().weight.shape[1]
    assert (VOCABULARY, width) not in shapes.seen and (width, VOCABULARY) not in shapes.seen
    count, length = inputs["labels"].shape
    assert (count, length, VOCABULARY) not in shapes.seen
    assert all(p.grad is None for p in model.language_model.parameters())


def test_opt_of_two_widths() -> None:
    """OPT-350m's embeddings are narrower than its layers: the projection would not fit."""
    model = small("opt", text={"word_embed_proj_dim": 16})
    inputs = batch("opt")
    expected = model(**inputs, return_logits=True).loss
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert model.generate(**prompt(inputs), max_new_tokens=2).shape == (3, 14)


def _with_language_model(config: Any) -> Any:
    sizes = {**parts("llama", False), "text_config": config}
    config = blip2_generation.Blip2Config(**sizes)
    return shake(blip2_generation.Blip2ForConditionalGeneration(config)).eval()


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
}


def test_bias_of_a_head_counts() -> None:
    """Phi's loss would be that of another model."""
    model = _with_language_model(PhiConfig(**COMMON, partial_rotary_factor=1.0))
    assert model.get_output_embeddings().bias is not None
    inputs = batch("llama")
    expected = model(**inputs, return_logits=True).loss
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_soft_capping_is_not_overlooked() -> None:
    """Gemma 2 caps its logits: the loss of uncapped ones would train it off its path."""
    config = Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=2.0)
    model = _with_language_model(config)
    inputs = batch("llama")
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"Gemma2ForCausalLM.*return_logits=True"):
            model(**inputs)
    bare = AutoModelForCausalLM.from_config(config)
    bare.load_state_dict(model.language_model.state_dict())
    features = model.image_features(inputs["pixel_values"])
    embeds = model.embed(inputs["input_ids"], features)
    mask, labels = inputs["attention_mask"], inputs["labels"]
    expected = bare.eval()(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(model(**inputs, return_logits=True).loss, expected)


@pytest.mark.parametrize("instruct", [False, True])
def test_clip_tower_serves_as_image_encoder(instruct: bool, tmp_path: Path) -> None:
    """Whoever has a CLIP and no ViT-g could not train BLIP-2 on it."""
    sizes = {"hidden_size": 24, "image_size": 28, "patch_size": 14, "num_hidden_layers": 2}
    vision = ClipVisionConfig(**sizes, num_attention_heads=2)
    model = small("llama", instruct, vision_config=vision)
    inputs = batch("llama", instruct)
    loss = model(**inputs).loss
    loss.backward()
    assert model.vision_model.conv1.weight.grad is None
    assert model.vision_model.post_layernorm.weight.grad is not None
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).loss, loss)


# What is trained, in millions (facts that LAVIS logs): all but the frozen parts.
BUILDERS = [
    (blip2_generation.blip2_opt_2_7b, 107_133_696),
    (blip2_generation.blip2_opt_6_7b, 108_314_880),
    (blip2_generation.blip2_flan_t5_xl, 106_739_968),
    (blip2_generation.blip2_flan_t5_xxl, 108_314_880),
    (instructblip.instructblip_flan_t5_xl, 187_262_464),
    (instructblip.instructblip_flan_t5_xxl, 188_837_376),
    (instructblip.instructblip_vicuna_7b, 188_837_376),
    (instructblip.instructblip_vicuna_13b, 189_624_832),
]


@pytest.mark.parametrize(("builder", "trained"), BUILDERS)
def test_builders_have_the_published_sizes(builder: Any, trained: int) -> None:
    """Published weights would not fit."""
    with torch.device("meta"):
        model = builder()
    assert isinstance(model, Blip2Base)
    model.language_model.requires_grad_(False)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == trained
    # transformers' class with the same configuration has the same parameters.
    name = type(model).__name__
    with torch.device("meta"):
        theirs = getattr(transformers, name)(model.config)
    shapes = {n: tuple(p.shape) for n, p in theirs.named_parameters()}
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == shapes


@pytest.mark.parametrize(("kind", "instruct"), SYSTEMS)
def test_lavis_files_go_both_ways(kind: str, instruct: bool, tmp_path: Path) -> None:
    """The authors' checkpoints would not load, or load into the wrong places."""
    model = small(kind, instruct, vision_norm_eps=1e-5)
    inputs = batch(kind, instruct)
    expected = model(**inputs).loss
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data.chunk(3)[1].zero_()  # LAVIS has none
    torch.testing.assert_close(model(**inputs).loss, expected)
    state = model.to_lavis()
    word = {"opt": "opt", "t5": "t5", "llama": "llm"}[kind]
    assert f"{word}_proj.weight" in state and "ln_vision.weight" in state
    whole = type(model).from_lavis(state, model.config)
    assert torch.equal(whole(**inputs).loss, model(**inputs).loss)
    # What LAVIS saves: what it trained. The frozen parts come from elsewhere.
    frozen = {k: v for k, v in state.items() if k.startswith("visual_encoder.")}
    trained = {
        k: v for k, v in state.items() if k not in frozen and not k.startswith(f"{word}_model.")
    }
    torch.save({"model": trained}, tmp_path / "checkpoint.pth")
    vision = {k.removeprefix("visual_encoder."): v for k, v in frozen.items()}
    again = type(model).from_lavis(
        tmp_path / "checkpoint.pth",
        model.config,
        language_model=model.language_model,
        vision=vision,
    )
    assert again.language_model is model.language_model
    assert torch.equal(again(**inputs).loss, model(**inputs).loss)
    assert torch.equal(
        again.generate(**prompt(inputs), max_new_tokens=3),
        model.generate(**prompt(inputs), max_new_tokens=3),
    )
    with pytest.raises(ValueError, match=r"missing: .*language_model\..*vision_model\."):
        type(model).from_lavis(trained, model.config)


def test_stages_start_from_each_other() -> None:
    """Stage 2 would start from a random Q-Former, InstructBLIP from random text networks."""
    first = small("opt")
    second = shake(small("t5"), seed=5)
    kept = second.start_from(first)
    assert kept == []  # the language models have one width
    inputs = batch("opt")
    expected = first.image_features(inputs["pixel_values"])
    assert torch.equal(second.image_features(inputs["pixel_values"]), expected)
    third = small("t5", instruct=True)
    with pytest.raises(ValueError, match=r"start_from.*missing: qformer.embeddings.position"):
        third.start_from(second)
    kept = third.start_from(second, strict=False)
    assert all(".output." in k or ".intermediate." in k or "embeddings." in k for k in kept)
    assert torch.equal(third.query_tokens, first.query_tokens)
    norm = third.qformer.embeddings.layernorm.weight
    assert torch.equal(norm, first.qformer.layernorm.weight)
    # Back: what there is no place for is left behind, another width keeps the projection.
    wide = small("llama", text={"hidden_size": 32})
    assert wide.start_from(third.state_dict()) == [
        "language_projection.weight",
        "language_projection.bias",
    ]


def test_given_language_model_is_used_as_it_is() -> None:
    """The real language model would be replaced by random weights, or trained."""
    language_model = small("llama").language_model
    config = blip2_generation.Blip2Config(**{**parts("opt", False), "text_config": None})
    model = blip2_generation.Blip2ForConditionalGeneration(config, language_model)
    assert model.language_model is language_model
    assert model.config.text_config is language_model.config
    assert not any(p.requires_grad for p in language_model.parameters())
    assert model(**batch("llama")).loss.isfinite()
