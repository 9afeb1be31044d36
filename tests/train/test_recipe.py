"""Recipes: what they accept, and that every mistake is named before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmkern.train.recipe import Recipe, RecipeError, load_recipe

MINIMAL = """
model: {builder: clip_vit_b_32}
data: {source: csv, path: pairs.csv}
train: {batch_size: 64, epochs: 2, lr: 5e-4}
output_dir: runs/x
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe file."""
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    return file


def test_defaults_and_round_trip(path: Path, tmp_path: Path) -> None:
    """The resolved recipe in a run directory must be the run's recipe, word for word."""
    recipe = load_recipe(path)
    assert recipe.train.lr == 5e-4, "YAML reads 5e-4 as text"
    assert recipe.train.betas == (0.9, 0.98) and recipe.train.precision == "fp32"
    recipe.save(tmp_path / "resolved.yaml")
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text())["train"]["weight_decay"] == 0.2


def test_overrides(path: Path) -> None:
    """Every key can be changed on the command line, with YAML values."""
    recipe = load_recipe(
        path,
        [
            "train.lr=1e-3",
            "train.betas=[0.9, 0.95]",
            "train.gradient_cache_chunk=32",
            "train.rates={visual.*: 0.1}",
            "model.overrides.vision_layers=[1, 1, 1, 1]",
            "evaluation.options.vendors=[Twtr]",
            "data.augment=null",
            "output_dir=runs/a=b",
            "data.path={000..041}.tar",
        ],
    )
    assert (recipe.train.lr, recipe.train.betas) == (1e-3, (0.9, 0.95))
    assert recipe.train.gradient_cache_chunk == 32 and recipe.train.rates == {"visual.*": 0.1}
    assert recipe.model.overrides == {"vision_layers": [1, 1, 1, 1]}
    assert recipe.data.augment is None and (recipe.output_dir, recipe.data.path) == (
        "runs/a=b",
        "{000..041}.tar",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=3", "unknown key 'train.batchsize', did you mean 'train.batch_size'"),
        ("lr=3", "unknown key 'lr', did you mean 'train.lr'"),
        ("trian.lr=1", "unknown key 'trian', did you mean 'train'"),
        ("train.lr=fast", "train.lr must be float, got 'fast'"),
        ("train.lr=true", "train.lr must be float, got True"),
        ("train.lr=.nan", "train.lr must be float, got nan"),
        ("train.lr=-1", "train.lr must be positive, got -1"),
        ("train.batch_size=1.5", "train.batch_size must be int, got 1.5"),
        ("train.batch_size=1", "train.batch_size must be at least 2"),
        ("train.max_steps=5", "exactly one of train.epochs and train.max_steps, got 2.0 and 5"),
        ("train.precision=bf61", "got 'bf61', did you mean 'bf16'"),
        ("train.betas=[0.9]", "train.betas must be a list of 2"),
        ("train.betas=[0.9, 1.0]", r"train.betas must be in \[0, 1\)"),
        ("train.freeze=visual", "train.freeze must be a list, got 'visual'"),
        ("train.warmup_steps=1.5", "train.warmup_steps must be whole, or a share below 1"),
        ("train=3", "train must be a mapping, got 3"),
        ("train.lr.x=3", "train.lr must be float"),
        ("data.path=null", "data.path must be set for source csv"),
        ("data.templates=[a photo]", "data.templates must be texts with one {} each"),
        ("model.builder=3", "model.builder must be str, got 3"),
        ("model=null", "model must be a mapping, got None"),
        ("train.lr", "override must be key=value"),
        ("train.lr=[1", r"train.lr must be float, got '\[1'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(override: str, message: str, path: Path) -> None:
    """A key that is ignored or a value that is guessed gives a run that nobody asked for."""
    if override.startswith("train.lr.x"):
        path.write_text(MINIMAL.replace(", lr: 5e-4", ""))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [override])


@pytest.mark.parametrize("missing", ["model", "data", "train", "output_dir"])
def test_missing_section(missing: str) -> None:
    """A recipe without a model or data has no sensible default."""
    values = yaml.safe_load(MINIMAL)
    del values[missing]
    with pytest.raises(RecipeError, match=f"{missing} is missing"):
        Recipe.from_dict(values)


def test_unknown_recipe_and_files(tmp_path: Path) -> None:
    """A mistyped name must list the names; a missing file must say that it is missing."""
    with pytest.raises(RecipeError, match=r"no recipe named 'clip-emojy'.*must end in \.yaml"):
        load_recipe("clip-emojy")
    with pytest.raises(RecipeError, match=r"cannot be read \(No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="expected a mapping, got list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "torn.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "torn.yaml")
