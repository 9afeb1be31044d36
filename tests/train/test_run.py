"""Runs of recipes: a run directory, its continuation, and mistakes seen before anything loads."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import PreTrainedModel

from mmkern.models.clip import clip_vit_b_32
from mmkern.train import checkpoint, run
from mmkern.train.checkpoint import CheckpointError
from mmkern.train.recipe import Recipe, RecipeError, load_recipe, recipe_names
from tests.train.tiny import bits, same_bits

COLOURS = ("red", "green", "blue", "black", "white", "yellow")


def picture(index: int) -> Image.Image:
    """One colour, with some noise."""
    noise = random.Random(index)
    image = Image.new("RGB", (20, 16), COLOURS[index % len(COLOURS)])
    image.putpixel((noise.randrange(20), noise.randrange(16)), (noise.randrange(256), 7, 7))
    return image


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 drawn pictures: a table, the same in three shards, and a small vocabulary."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "merges.txt").write_text("header\ns q\nr e\n")
    table = ["image,text"]
    for index in range(24):
        picture(index).save(folder / f"{index}.png")
        table.append(f"{index}.png,a {COLOURS[index % 6]} square number {index}")
    (folder / "pairs.csv").write_text("\n".join(table) + "\n")
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(shard * 8, shard * 8 + 8):
                text = f"a {COLOURS[index % 6]} square number {index}"
                for suffix, content in (("png", None), ("txt", text.encode())):
                    buffer = io.BytesIO()
                    if content is None:
                        picture(index).save(buffer, "png")
                        content = buffer.getvalue()
                    entry = tarfile.TarInfo(f"{index:03}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def values(pairs: Path, output: Path, **train: Any) -> dict[str, Any]:
    """A recipe of six steps, a little over two epochs."""
    return {
        "model": {
            "builder": "clip_vit_b_32",
            "overrides": {
                "embed_dim": 16, "image_size": 16, "vision_layers": 1, "vision_width": 64,
                "vision_patch_size": 8, "text_width": 64, "text_layers": 1, "context_length": 24,
                "vocab_size": 516,
            },
        },
        "data": {
            "source": "csv", "path": str(pairs / "pairs.csv"),
            "vocabulary": str(pairs / "merges.txt"),
        },
        "train": {
            "batch_size": 10, "max_steps": 5, "lr": 1e-3, "warmup_steps": 0.2, "save_every": 1,
            "keep": 10, "log_every": 1, **train,
        },
        "output_dir": str(output),
    }  # fmt: skip


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Of the last complete checkpoint."""
    return bits(run.load_run(output)[1])


def test_run_directory(pairs: Path, tmp_path: Path) -> None:
    """What a run leaves must tell what it was, how it went, and hold the model."""
    recipe = Recipe.from_dict(values(pairs, tmp_path / "run"))
    metrics = run.train(recipe)
    assert load_recipe(tmp_path / "run" / run.RECIPE_FILE) == recipe
    assert metrics == json.loads((tmp_path / "run" / run.METRICS_FILE).read_text())
    assert metrics["steps"] == 5 and metrics["pairs"] == 24 and metrics["train_seconds"] > 0
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    loaded, model = run.load_run(tmp_path / "run")
    assert loaded == recipe and isinstance(model, PreTrainedModel)
    again = type(model).from_pretrained(tmp_path / "run" / "checkpoint-5")
    assert same_bits(bits(model), bits(again))
    before = dict(metrics)
    assert run.train(recipe)["train_seconds"] == before["train_seconds"], "nothing was left to do"


@pytest.mark.parametrize("source", ["csv", "shards"])
@pytest.mark.parametrize("workers", [0, 2])
def test_run_goes_on_bit_equal(source: str, workers: int, pairs: Path, tmp_path: Path) -> None:
    """With real augmentation, tokenizer and model, by index and by stream, with workers too."""
    described = values(pairs, tmp_path / "run", workers=workers, batch_size=4, max_steps=8)
    if source == "shards":
        described["data"] |= {
            "source": "shards",
            "path": f"{pairs}/{{0..2}}.tar",
            "options": {"shuffle_buffer": 4, "epoch_samples": 24},
        }
    run.train(Recipe.from_dict(described))
    whole = weights(tmp_path / "run")
    for step in (5, 6, 7, 8):  # as if killed after step 4, in the middle of an epoch
        checkpoint._delete(tmp_path / "run" / f"checkpoint-{step}")
    metrics = run.train(Recipe.from_dict(described))
    assert metrics["resumed"] and metrics["steps"] == 8
    assert same_bits(weights(tmp_path / "run"), whole)


def test_gradient_cache_on_the_real_model(pairs: Path, tmp_path: Path) -> None:
    """The recipe's chunk must not change what CLIP learns."""
    trained = []
    for chunk in (None, 3):
        output = tmp_path / str(chunk)
        # Adam's usual eps makes steps of rounding errors, where a gradient is 0.
        described = values(pairs, output, gradient_cache_chunk=chunk, eps=1e-3)
        run.train(Recipe.from_dict(described))
        trained.append(weights(output))
    start = bits(clip_vit_b_32(**values(pairs, tmp_path)["model"]["overrides"]))
    for name, value in trained[0].items():
        assert torch.allclose(value, trained[1][name], atol=2e-5), name
    assert not torch.allclose(trained[0]["visual.proj"], start["visual.proj"], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.builder=clip_vit_b_31", "no model builder 'clip_vit_b_31', did you mean 'clip_vit"),
        ("model.builder=flip", "no model builder 'flip'"),
        ("model.overrides.width=3", "unknown key 'model.overrides.width', did you mean"),
        ("data.options.image_colum=x", "did you mean 'image_column'"),
        ("data.augment.scales=[0.5, 1.0]", "did you mean 'scale'"),
        ("train.precision=fp16", "needs a CUDA device"),
        ("data.source=shards", "epoch_samples must be set for shards"),
    ],
)
def test_mistakes_cost_nothing(
    change: str, message: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake must be told before minutes of loading, and must not leave a run behind."""
    if torch.cuda.is_available() and "fp16" in change:
        pytest.skip("fp16 works here")
    for loader in ("build_model", "build_data", "training_arguments"):
        monkeypatch.delattr(run, loader)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values(pairs, tmp_path / "run")))
    with pytest.raises(RecipeError, match=message):
        run.train(load_recipe(file, [change]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"batch_size": 100}}, "a batch of 100 needs as many samples, got 24"),
        ({"model": {"overrides": {"vision_heads": 7}}}, "recipe: model: .*vision_heads"),
        ({"model": {"overrides": {"vocab_size": 9}}}, "tokenizer has 516 tokens, .* is 9"),
        ({"data": {"options": {"on_error": "ignore"}}}, "recipe: data: .*on_error"),
    ],
)
def test_values_that_do_not_fit(
    change: dict[str, Any], message: str, pairs: Path, tmp_path: Path
) -> None:
    """What only the model or the data can judge must still name the recipe's section."""
    described = values(pairs, tmp_path / "run")
    for section, inner in change.items():
        for key, value in inner.items():
            old = described[section].get(key)
            described[section][key] = {**old, **value} if isinstance(old, dict) else value
    with pytest.raises(ValueError, match=message):
        run.train(Recipe.from_dict(described))


def test_another_recipes_run_is_not_continued(pairs: Path, tmp_path: Path) -> None:
    """Checkpoints of another learning rate would go on silently under the new name."""
    run.train(Recipe.from_dict(values(pairs, tmp_path / "run", max_steps=1)))
    with pytest.raises(RecipeError, match=r"another recipe: train\.lr \(0\.001 there, 0\.1 here"):
        run.train(Recipe.from_dict(values(pairs, tmp_path / "run", max_steps=1, lr=0.1)))
    run.train(Recipe.from_dict(values(pairs, tmp_path / "run", max_steps=1, log_every=7)))


def test_metrics_of_a_run_killed_after_its_last_checkpoint(pairs: Path, tmp_path: Path) -> None:
    """A run that only misses its numbers would be called finished, and never get them."""
    recipe = Recipe.from_dict(values(pairs, tmp_path / "run", max_steps=2, log_every=10))
    metrics = run.train(recipe)
    assert run.finished(tmp_path / "run") == metrics
    (tmp_path / "run" / run.METRICS_FILE).write_text('{"top1": 0.5}')  # `mmkern eval` came first
    assert run.finished(tmp_path / "run") is None
    again = run.train(recipe)
    assert again["top1"] == 0.5
    assert [again[key] for key in ("steps", "loss")] == [metrics[key] for key in ("steps", "loss")]


def test_unusable_output(pairs: Path, tmp_path: Path) -> None:
    """An output path that cannot be a directory must be told at once."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to"):
        run.train(Recipe.from_dict(values(pairs, tmp_path / "file" / "run")))
    with pytest.raises(CheckpointError, match="is not a run"):
        run.load_run(tmp_path)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_fit_the_code(name: str, tmp_path: Path) -> None:
    """A shipped recipe with an option that nothing takes fails for its first user."""
    where = [f"output_dir={tmp_path}"]
    run.check(load_recipe(name, where if "emoji" in name else [*where, "data.path={0..9}.tar"]))


@pytest.mark.slow
def test_torchrun_trains_the_same_model(pairs: Path, tmp_path: Path) -> None:
    """The paper's recipes promise to run unchanged on any number of processes."""
    root = Path(__file__).parents[2]
    (tmp_path / "train.py").write_text(
        "import sys\nfrom mmkern.train import recipe, run\n"
        "run.train(recipe.load_recipe(sys.argv[1]))\n"
    )
    for processes in (1, 2):
        file = tmp_path / f"{processes}.yaml"
        # Keys' biases have gradients of pure rounding, which Adam's usual eps makes steps of.
        described = values(pairs, tmp_path / str(processes), eps=1e-3)
        file.write_text(yaml.safe_dump(described))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        subprocess.run(
            [sys.executable, *launch, str(tmp_path / "train.py"), str(file)],
            cwd=root, check=True, env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-5), name
