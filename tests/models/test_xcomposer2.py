"""InternLM-XComposer2: image tokens, losses, generation, released checkpoints, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmkern.layout import VisualSpans
from mmkern.models import xcomposer2
from mmkern.models.internlm2 import InternLM2Config, InternLM2ForCausalLM
from mmkern.models.xcomposer2 import XComposer2Config, XComposer2ForConditionalGeneration
from mmkern.models.xcomposer2_checkpoints import from_released
from mmkern.train.parameter_groups import GroupRules, parameter_groups
from mmkern.train.recipe import load_recipe
from mmkern.train.stage import Stage
from tests.models.small_xcomposer2 import IMAGE, SIZES, TILE, batch, clip, pixels, row, small
from tests.testing import run_ranks

TOWER = "vit.vision_tower.vision_model."
FROZEN = load_recipe("xcomposer2-stage1-7b", ["data.path=x"]).train.freeze


def test_tokens_of_an_image_are_the_papers() -> None:
    """The worst cases of HD-9, HD-25 and HD-55: a wrong count shifts every text behind an image."""
    config = XComposer2Config(vision_config={"image_size": 336}, hd_num=55)
    for tiles, tokens in ((9, 1561), (25, 4057), (55, 8737)):
        assert config.image_tokens(336 * tiles, 336) == tokens
        shapes = [(h, w) for h in range(1, tiles + 1) for w in range(1, tiles // h + 1)]
        assert max(config.image_tokens(336 * h, 336 * w) for h, w in shapes) == tokens
    assert XComposer2Config().image_tokens(490, 490) == 1225
    assert XComposer2Config(vision_config={"image_size": 224}).image_tokens(224, 224) == 256
    with pytest.raises(ValueError, match="1 to 55 tiles of 336 x 336 pixels, got 336 x 18816"):
        config.image_tokens(336, 336 * 56)
    with pytest.raises(ValueError, match="must be 490 x 490 pixels, got 224 x 224"):
        XComposer2Config().image_tokens(224, 224)


def reference_tiles(model: Any, image: Tensor) -> Tensor:
    """Tokens of one image, by loops over the places they stand in."""
    size, side = 8, 2
    newline, between = model.plora_sub_GN.flatten(), model.plora_glb_GN.flatten()

    def joined(tile: Tensor) -> list[list[Tensor]]:
        grid = model.vit(tile[None])[0].view(4, 4, -1)
        return [
            [torch.cat([grid[2 * y + i, 2 * x + j] for i in (0, 1) for j in (0, 1)])
             for x in range(side)]
            for y in range(side)
        ]  # fmt: skip

    whole = joined(F.interpolate(image[None], (size, size), mode="bicubic")[0])
    out = [token for line in whole for token in (*line, newline)]
    out.append(between)
    high, wide = image.shape[1] // size, image.shape[2] // size
    for h in range(high):
        tiles = [
            joined(image[:, h * size : (h + 1) * size, w * size : (w + 1) * size])
            for w in range(wide)
        ]
        for y in range(side):
            out += [token for tile in tiles for token in tile[y]]
            out.append(newline)
    return model.vision_proj(torch.stack(out))


def test_tiles_stand_where_they_belong() -> None:
    """Tokens of tiles in a wrong order would say that left is right, and train none the less."""
    model = small(hd_num=6)
    images = [pixels(1, 16, 24)[0], pixels(1, 8, 8, seed=1)[0], pixels(1, 24, 8, seed=2)[0]]
    expected = [reference_tiles(model, image) for image in images]
    assert [len(tokens) for tokens in expected] == model._counts(images)
    torch.testing.assert_close(model.image_features(images), torch.cat(expected))


def test_tower_gives_clips_patches_before_any_norm() -> None:
    """select_layer -1, the class token dropped, no norm behind the blocks: LLaVA's differ."""
    ours, source = small(), clip()
    ours.vit.load_clip(source)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=2, hidden_act="quick_gelu",
    )  # fmt: skip
    theirs = CLIPVisionModel(config).eval()
    state = {
        name.removeprefix("vision_model."): value
        for name, value in source.to_state_dict("transformers").items()
        if name.startswith("vision_model.")
    }
    prefix = "vision_model." if "vision_model.pre_layrnorm.weight" in theirs.state_dict() else ""
    theirs.load_state_dict({f"{prefix}{name}": value for name, value in state.items()})
    expected = theirs(pixels(2), output_hidden_states=True).hidden_states[-1][:, 1:]
    torch.testing.assert_close(ours.vit(pixels(2)), expected, rtol=0, atol=1e-5)
    assert not any("post_layernorm" in name or "ln_post" in name for name in ours.state_dict())


def test_positions_grow_as_transformers_grows_them() -> None:
    """336 to 490 pixels by another kernel gives other positions than the released model saw."""
    model, source = (
        small(vision_config={**small().config.vision_config.to_dict(), "image_size": 12}),
        clip(),
    )
    model.vit.load_clip(source)
    positions = source.state_dict()["visual.positional_embedding"]
    square = positions[1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    grown = F.interpolate(square, (6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([positions[:1], grown.permute(0, 2, 3, 1).reshape(36, 16)])
    torch.testing.assert_close(model.vit.positional_embedding.detach(), expected)


def test_images_are_embedded_in_their_places() -> None:
    """Two images and texts of unequal length: each must land in its own sample."""
    model = small()
    images = pixels(3)
    rows = [row([5, 6, 7]), [1, 8, *[IMAGE] * 16, 9, *[IMAGE] * 16, 4], [1, 3, 3]]
    given = batch(rows, images)
    features = [model.image_features(images[i : i + 1]) for i in range(3)]
    table = model.model.tok_embeddings
    expected = [
        torch.cat([table(torch.tensor([1])), features[0], table(torch.tensor([5, 6, 7]))]),
        torch.cat(
            [table(torch.tensor([1, 8])), features[1], table(torch.tensor([9])), features[2],
             table(torch.tensor([4]))]
        ),
        table(torch.tensor([1, 3, 3])),
    ]  # fmt: skip
    logits = model(**given, return_logits=True).logits
    for i, embeddings in enumerate(expected):
        visual = torch.tensor([rows[i]]) == IMAGE
        alone = InternLM2ForCausalLM.forward(model, inputs_embeds=embeddings[None], spans=visual)
        torch.testing.assert_close(logits[i, : len(rows[i])], alone.logits[0], rtol=0, atol=1e-5)
    built = VisualSpans.from_mask(given["input_ids"] == IMAGE)
    assert torch.equal(model(**given, spans=built, return_logits=True).logits, logits)


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        ([row([5]), row([5], 15)], 2, "sample 1 has 15 image tokens .* images become 16"),
        ([row([5], 32), row([5], 0)], 1, "sample 0 has 32 image tokens .* images become 16"),
        ([row([5]), row([5], 0)], 2, "1 of 2 images have no place .* sample, 1, is full"),
        ([row([5])], 0, "sample 0 has 16 image tokens .* images become 0"),
        ([[1, 99, 3]], 0, r"must lie in \[0, 40\) or be the image token 40, got 1 to 99"),
    ],
)
def test_images_without_places_are_refused(
    rows: list[list[int]], images: int, message: str
) -> None:
    """A picture would answer another sample's question."""
    with pytest.raises(ValueError, match=message):
        small()(**batch(rows, pixels(images) if images else None))


def test_other_bad_input_is_refused() -> None:
    """A wrong batch must say what is wrong with it, before anything is computed."""
    model, given = small(), batch([row([5, 6])], pixels())
    labels = given["labels"].clone()
    labels[0, 3:5] = 7
    with pytest.raises(ValueError, match="sample 0 has labels at 2 image tokens, expected -100"):
        model(**{**given, "labels": labels})
    with pytest.raises(ValueError, match="must be 8 x 8 pixels, got 8 x 10"):
        model(**{**given, "pixel_values": pixels(1, 8, 10)})
    with pytest.raises(ValueError, match=r"pixel_values\[0\] must be floating point \[3, H, W\]"):
        model(**{**given, "pixel_values": pixels().int()})
    with pytest.raises(ValueError, match="spans must be the places of the image token 40"):
        model(**given, spans=VisualSpans.from_lengths([0], [16], (1, 19)))
    for fields, message in (
        ({"language_weight": 0.0}, "not both 0"),
        ({"hd_num": 4, "vision_config": {"image_size": 10, "patch_size": 2}}, "5 patches a side"),
    ):
        with pytest.raises(ValueError, match=message):
            XComposer2Config(**fields)


def test_text_has_the_language_models_loss() -> None:
    """An XComposer2 must say of plain text what its language model says, to the bit."""
    model = small()
    sizes = {name: value for name, value in SIZES.items() if name != "vision_config"}
    config = InternLM2Config(**{**sizes, "plora_rank": 0})
    bare = InternLM2ForCausalLM(config).eval()
    own = bare.state_dict()
    bare.load_state_dict({name: model.state_dict()[name] for name in own})
    given = batch([[1, 5, 6, 7, 8], [1, 9, 3]])
    assert torch.equal(model(**given).loss, bare(**given).loss)
    with torch.no_grad():
        assert torch.equal(model(**given).loss, bare(**given).loss)


def test_stage_1_leaves_the_language_model_alone() -> None:
    """Frozen weights would move, or a part that should learn would not."""
    model = small(hd_num=4)
    Stage(freeze=FROZEN).apply(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {n for n in model.state_dict() if n.startswith(("vit.", "vision_proj.", "plora_"))}
    expected |= {n for n in model.state_dict() if "Plora_" in n}
    assert trained == expected
    model.train()
    loss = model(**batch([row([5, 6], TILE)], [pixels()[0]])).loss
    loss.backward()
    for name in expected:
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.abs().sum() > 0, name


def test_text_alone_gives_zero_gradients_not_missing_ones() -> None:
    """Under DDP a rank whose batch has no image would wait for ever."""
    for fields in ({}, {"hd_num": 4}, {"contrastive_weight": 1.0},
                   {"contrastive_weight": 1.0, "language_weight": 0.0}):  # fmt: skip
        model = small(**fields)
        Stage(freeze=FROZEN).apply(model)
        loss = model(**batch([[1, 5, 6, 7]])).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and not parameter.grad.any(), name


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two batches as one."""
    width = max(part["input_ids"].shape[1] for part in (first, second))
    fill = {"input_ids": 2, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat(
            [F.pad(b[name], (0, width - b[name].shape[1]), value=value) for b in (first, second)]
        )
        for name, value in fill.items()
    } | {"pixel_values": first["pixel_values"]}


def halves() -> tuple[dict[str, Any], dict[str, Any]]:
    """What two ranks train on: images and text, and text alone."""
    return batch([row([5, 6, 7]), [1, 4, 4]], pixels()), batch([[1, 8, 9], [1, 3, 5, 7, 6]])


def rank_gradients(rank: int, world: int) -> dict[str, Tensor]:
    """Of one rank's half, averaged by DDP."""
    model = small()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    items = sum(int((half["labels"][:, 1:] != -100).sum()) for half in halves())
    loss = wrapped(**halves()[rank], num_items_in_batch=items).loss * world
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_a_rank_without_images_neither_hangs_nor_biases() -> None:
    """Two GPUs, one with plain text, must step as one GPU with both halves."""
    ranks = run_ranks(2, rank_gradients)
    model = small()
    model(**joined(*halves())).loss.backward()
    for name, parameter in model.named_parameters():
        for found in ranks:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
        assert parameter.grad.abs().sum() > 0 or name.startswith("vit.positional"), name


def test_contrastive_loss_is_beside_the_released_one() -> None:
    """The option would change what was released, or train nothing of what stage 1 trains."""
    plain, both = small(), small(contrastive_weight=0.5)
    given = batch([row([5, 6]), row([7])], pixels(2))
    found = both(**given)
    language = plain(**given).loss
    assert not any("contrast" in name for name in plain.state_dict())
    torch.testing.assert_close(found.loss_language, language, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, language + 0.5 * found.loss_contrastive)
    alone = small(contrastive_weight=1.0, language_weight=0.0)
    Stage(freeze=FROZEN).apply(alone)
    output = alone(**given)
    assert output.loss_language is None and torch.equal(output.loss, output.loss_contrastive)
    output.loss.backward()
    # The last layer's rows of an image are what is pooled, so every adapter learns.
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name
    with pytest.raises(ValueError, match="one image a sample, sample 1 has 0"):
        both(**batch([row([5, 6]), [1, 7]], pixels()))


def test_contrastive_loss_by_hand() -> None:
    """Images would be matched with states that already read their caption."""
    model = small(contrastive_weight=1.0)
    given = batch([row([5, 6, 7]), row([8, 9])], pixels(2))
    hidden, texts = [], []
    for i, words in enumerate(([5, 6, 7], [8, 9])):
        features = model.image_features(given["pixel_values"][i : i + 1])
        table = model.model.tok_embeddings
        start = torch.cat([table(torch.tensor([1])), features])[None]
        visual = torch.tensor([[False] + [True] * 16])
        states = model.model(start, spans=VisualSpans.from_mask(visual))
        hidden.append(states[0, 1:].mean(0))
        texts.append(model.model(table(torch.tensor([[1, *words]])))[0, 1:].mean(0))
    head = model.contrast
    image = F.normalize(head.image(torch.stack(hidden)), dim=-1)
    text = F.normalize(head.text(torch.stack(texts)), dim=-1)
    scores = head.logit_scale.exp() * image @ text.T
    target = torch.arange(2)
    expected = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
    torch.testing.assert_close(model(**given).loss_contrastive, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_reads_the_image(options: dict[str, Any]) -> None:
    """Answers would come from the text alone, or from another sample's picture."""
    model, wanted = small(), {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    rows = [row([5, 6]), row([7])]
    together = torch.tensor([rows[0], [2, *rows[1]]])
    mask = (torch.tensor([[1] * 19, [0] + [1] * 18])).long()
    given = {"input_ids": together, "attention_mask": mask, "pixel_values": pixels(2)}
    found = model.generate(**given, **wanted, **options)
    assert torch.equal(found[:, :19], together)
    for i, ids in enumerate(rows):
        alone = model.generate(
            input_ids=torch.tensor([ids]), pixel_values=pixels(2)[i : i + 1], **wanted, **options
        )
        assert torch.equal(found[i, 19:], alone[0, len(ids) :])
    # By forwards without a cache.
    if not options:
        ids = rows[0]
        for _ in range(5):
            logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels(2)[:1]).logits
            ids = [*ids, int(logits[0, -1].argmax())]
        assert found[0].tolist() == ids


def released(model: XComposer2ForConditionalGeneration) -> dict[str, Tensor]:
    """As upstream saves them: with what serves the class token, and a buffer."""
    state = model.to_released()
    for kind in ("weight", "bias"):
        state[f"{TOWER}post_layernorm.{kind}"] = torch.zeros(16)
    state[f"{TOWER}embeddings.position_ids"] = torch.arange(17)[None]
    return state


@pytest.mark.parametrize("tiles", [0, 4])
def test_released_keys_go_both_ways(tiles: int, tmp_path: Path) -> None:
    """A released checkpoint, with its mixed ranks, would not load, or not be written back."""
    ranks = {"plora_rank_pattern": {"attention.wqkv": 2},
             "plora_alpha_pattern": {"attention.wqkv": 4}}  # fmt: skip
    model = small(hd_num=tiles, **ranks)
    state = released(model)
    assert {n for n in state if n.startswith("plora_")} == (
        {"plora_glb_GN", "plora_sub_GN"} if tiles else set()
    )
    assert state["model.layers.0.attention.wqkv.Plora_A.weight"].shape == (2, 32)
    assert state[f"{TOWER}encoder.layers.1.self_attn.k_proj.weight"].shape == (16, 16)
    assert state[f"{TOWER}embeddings.position_embedding.weight"].shape == (17, 16)
    assert {"vision_proj.0.weight", "vision_proj.2.bias", "output.weight"} <= state.keys()
    again = type(model).from_released(state, model.config)
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: state[n] for n in part}, tmp_path / f"model-{number}.safetensors")
    read = type(model).from_released(tmp_path, model.config)
    given = batch(
        [row([5, 6], model._counts([pixels()[0]])[0])], [pixels()[0]] if tiles else pixels()
    )
    assert torch.equal(read(**given).loss, model(**given).loss)
    gone = {n: v for n, v in state.items() if "layers.1.self_attn.k_proj.bias" not in n}
    with pytest.raises(ValueError, match=f"missing: {TOWER}encoder.layers.1.self_attn.k_proj.bias"):
        from_released(gone)
    with pytest.raises(ValueError, match=r"missing: model.*.wo.Plora_A.weight"):
        name = "model.layers.0.attention.wo.Plora_A.weight"
        type(model).from_released({n: v for n, v in state.items() if n != name}, model.config)


def test_folders_go_round(tmp_path: Path) -> None:
    """What was trained would not come back, or a truncated file be filled up at random."""
    model = small(hd_num=4, contrastive_weight=0.5)
    model.save_pretrained(tmp_path)
    again = XComposer2ForConditionalGeneration.from_pretrained(tmp_path)
    given = batch([row([5, 6], TILE)], [pixels()[0]])
    assert torch.equal(again(**given).loss, model(**given).loss)
    state = model.state_dict()
    del state["vision_proj.0.bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing: vision_proj.0.bias"):
        XComposer2ForConditionalGeneration.from_pretrained(tmp_path)


def test_layer_decay_is_the_image_encoders() -> None:
    """Rates of the papers: 0.9 by the ViT's depth, the language model at a fifth, adapters too."""
    settings = load_recipe("xcomposer2-sft-7b").train
    rules = GroupRules(
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        layer_decay_in=settings.layer_decay_in,
        rates=settings.rates,
    )
    groups = parameter_groups(small(), 1.0, rules)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert rates.keys() == dict(small().named_parameters()).keys()
    for name, rate in {
        "vit.conv1.weight": 0.9**3,
        "vit.positional_embedding": 0.9**3,
        "vit.transformer.resblocks.0.attn.in_proj_weight": 0.9**2,
        "vit.transformer.resblocks.1.mlp.c_fc.weight": 0.9,
        "vision_proj.0.weight": 1.0,
        "model.tok_embeddings.weight": 0.2,
        "model.layers.0.attention.wqkv.weight": 0.2,
        "model.layers.1.feed_forward.w2.Plora_A.weight": 0.2,
        "output.weight": 0.2,
    }.items():
        assert rates[name] == pytest.approx(rate), name
    assert decays["vit.positional_embedding"] == decays["model.norm.weight"] == 0


def test_frozen_language_model_in_16_bits_keeps_its_adapters() -> None:
    """Steps of an adapter in bf16 are lost to rounding."""
    model = small()
    model.cast_language_model(torch.bfloat16)
    for name, parameter in model.named_parameters():
        inside = name.startswith(("model.", "output.")) and "Plora_" not in name
        assert parameter.dtype == (torch.bfloat16 if inside else torch.float32), name
    expected = small()(**batch([row([5, 6])], pixels())).loss
    found = model(**batch([row([5, 6])], pixels())).loss
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    assert model.output.weight.dtype == torch.bfloat16


def test_published_sizes() -> None:
    """A released checkpoint would not fit the model that is named after it."""
    with torch.device("meta"):
        models = [xcomposer2.xcomposer2_vl_7b(), xcomposer2.xcomposer2_4khd_7b()]
    large, tiled = (model.state_dict() for model in models)
    assert large["vit.positional_embedding"].shape == (1226, 1024)
    assert large["vision_proj.0.weight"].shape == (4096, 1024)
    assert tiled["vision_proj.0.weight"].shape == (4096, 4096)
    assert tiled["plora_sub_GN"].shape == (1, 1, 1, 4096)
    assert tiled["model.layers.0.attention.wqkv.Plora_A.weight"].shape == (8, 4096)
    wqkv: Any = models[1].model.layers[0].attention.wqkv
    assert (wqkv.scaling, models[1].model.layers[0].attention.wo.scaling) == (2.0, 1.0)
