"""Which parameters decay and how fast each learns, on hand-made names and on a real CLIP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmkern.models.clip import clip_vit_b_32
from mmkern.train.parameter_groups import GroupRules, parameter_groups

SMALL = {
    "embed_dim": 16, "image_size": 32, "vision_layers": 3, "vision_width": 64,
    "vision_patch_size": 16, "text_width": 64, "text_layers": 2, "context_length": 8,
    "vocab_size": 50,
}  # fmt: skip


def settings(model: nn.Module, rules: GroupRules) -> dict[str, tuple[float, float]]:
    """Name -> (rate, decay), at a rate of 1."""
    found = {}
    for group in parameter_groups(model, 1.0, rules):
        assert len(group["params"]) == len(group["names"])
        found.update(dict.fromkeys(group["names"], (group["lr"], group["weight_decay"])))
    return found


def test_decay_by_rank_and_role() -> None:
    """Decaying gains, biases, positions or the temperature costs accuracy without any error."""
    model = clip_vit_b_32(**SMALL)
    found = settings(model, GroupRules(weight_decay=0.2))
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name.endswith(("positional_embedding", "class_embedding"))
        assert found[name] == (1.0, 0.0 if plain else 0.2), name
    assert {n for n, (_, decay) in found.items() if not decay} >= {
        "logit_scale", "visual.ln_post.weight", "visual.class_embedding", "positional_embedding",
        "visual.positional_embedding", "transformer.resblocks.0.attn.in_proj_bias",
    }  # fmt: skip
    assert found["token_embedding.weight"][1] == found["text_projection"][1] == 0.2


def test_layer_decay_goes_by_each_towers_depth() -> None:
    """A wrong depth would hold back one tower of the two."""
    found = settings(clip_vit_b_32(**SMALL), GroupRules(layer_decay=0.5))
    expected = {
        "visual.conv1.weight": 0.5**4,
        "visual.class_embedding": 0.5**4,
        "visual.ln_pre.weight": 0.5**4,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 0.5**3,
        "visual.transformer.resblocks.2.mlp.c_fc.weight": 0.5,
        "visual.ln_post.weight": 1.0,
        "visual.proj": 1.0,
        "token_embedding.weight": 0.5**3,
        "transformer.resblocks.0.ln_1.weight": 0.5**2,
        "transformer.resblocks.1.ln_1.weight": 0.5,
        "text_projection": 1.0,
        "logit_scale": 1.0,
    }
    for name, rate in expected.items():
        assert found[name][0] == pytest.approx(rate), name


def test_rates_multiply_and_frozen_parameters_are_left_out() -> None:
    """A projector's own rate must apply, and a frozen tower must not reach the optimizer."""
    model = clip_vit_b_32(**SMALL)
    model.visual.requires_grad_(False)
    found = settings(model, GroupRules(rates={"text_projection": 10, "*proj*": 0.1}))
    assert found["text_projection"][0] == pytest.approx(1.0)
    assert found["transformer.resblocks.0.mlp.c_proj.weight"][0] == pytest.approx(0.1)
    assert not any(name.startswith("visual") for name in found)


def test_groups_cover_each_parameter_once() -> None:
    """A tied weight that is given twice makes the optimizer step twice as far."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    groups = parameter_groups(model, 1.0, GroupRules(weight_decay=0.1))
    assert [g["names"] for g in groups] == [["0.weight"]]
    torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (GroupRules(rates={"vizual.*": 2.0}), r"matches rates\['vizual\.\*'\]"),
        (GroupRules(layer_decay=0.9), "needs numbered blocks"),
    ],
)
def test_errors(rules: GroupRules, message: str) -> None:
    """A pattern with a typing error must not silently train at the default rate."""
    with pytest.raises(ValueError, match=message):
        parameter_groups(nn.Linear(2, 2), 1.0, rules)
    with pytest.raises(ValueError, match="no parameter that requires"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 1.0, GroupRules())
