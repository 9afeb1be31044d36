"""Checkpoint directories: complete or not there, rotated, read strictly, space seen in advance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from mmkern.train import checkpoint
from mmkern.train.checkpoint import CheckpointError


def written(run: Path, step: int, model: nn.Module | None = None) -> Path:
    """A complete checkpoint."""
    aside = checkpoint.aside(run) / f"checkpoint-{step}"
    aside.mkdir(parents=True)
    save_model(model or nn.Linear(2, 2), str(aside / checkpoint.WEIGHTS))
    final = run / f"checkpoint-{step}"
    checkpoint.publish(aside, final)
    return final


def steps(run: Path) -> list[str]:
    """Names of the complete checkpoints."""
    return [path.name for path in checkpoint.complete_checkpoints(run)]


def test_order_is_by_step_not_by_name(tmp_path: Path) -> None:
    """Resuming from checkpoint-900 while checkpoint-1000 is there would lose a day."""
    for step in (1000, 900, 50):
        written(tmp_path, step)
    (tmp_path / "checkpoint-notes").mkdir()
    assert steps(tmp_path) == ["checkpoint-50", "checkpoint-900", "checkpoint-1000"]


@pytest.mark.parametrize("damage", ["truncated", "missing file", "no seal", "torn seal", "empty"])
def test_damaged_is_never_complete(damage: str, tmp_path: Path) -> None:
    """The newest checkpoint is the one that a crash tears; picking it ends the run for good."""
    written(tmp_path, 1)
    torn = written(tmp_path, 2)
    weights, seal = torn / checkpoint.WEIGHTS, torn / checkpoint.SEAL
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing file":
        weights.unlink()
    elif damage == "no seal":
        seal.unlink()
    elif damage == "torn seal":
        seal.write_text(seal.read_text()[:10])
    else:
        seal.write_text("[]")
    assert steps(tmp_path) == ["checkpoint-1"]


def test_rotation_keeps_whole_ones_and_what_is_protected(tmp_path: Path) -> None:
    """Counting a broken checkpoint among those kept would delete the last good one."""
    for step in (1, 2, 3, 4):
        written(tmp_path, step)
    (tmp_path / "checkpoint-4" / checkpoint.SEAL).unlink()
    checkpoint.rotate(tmp_path, 1, protect=tmp_path / "checkpoint-1")
    assert steps(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert (tmp_path / "checkpoint-4").exists(), "not ours to delete"
    checkpoint.rotate(tmp_path, None)
    assert len(steps(tmp_path)) == 2
    assert list(tmp_path.glob(".*")), "what a killed process leaves aside"
    checkpoint.discard_unfinished(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_same_step_again_replaces(tmp_path: Path) -> None:
    """A run that went back to an earlier step writes the later ones anew."""
    first = written(tmp_path, 5)
    before = (first / checkpoint.WEIGHTS).read_bytes()
    written(tmp_path, 5)
    assert (first / checkpoint.WEIGHTS).read_bytes() != before
    assert steps(tmp_path) == ["checkpoint-5"]


def test_loading_is_strict(tmp_path: Path) -> None:
    """transformers only warns: a renamed layer would go on from random weights."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    path = written(tmp_path, 1, model)
    fresh = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    checkpoint.load_strict(fresh, path)
    assert torch.equal(fresh[1].weight, model[1].weight)
    with pytest.raises(CheckpointError, match=r"2 missing \(2\.weight, 2\.bias\), 0 unexpected"):
        checkpoint.load_strict(nn.Sequential(*fresh, nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match=r"0 missing, 2 unexpected \(1\.bias, 1\.weight\)"):
        checkpoint.load_strict(nn.Sequential(nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match="size mismatch"):
        checkpoint.load_strict(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 2)), path)
    (path / checkpoint.WEIGHTS).write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        checkpoint.load_strict(fresh, path)


class Tied(nn.Module):
    """Two names for one table, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_round_trip(tmp_path: Path) -> None:
    """Saving one name of a tied weight must not make strict loading fail, nor untie it."""
    model, fresh = Tied(), Tied()
    checkpoint.load_strict(fresh, written(tmp_path, 1, model))
    assert torch.equal(fresh.head.weight, model.embedding.weight)
    assert fresh.head.weight is fresh.embedding.weight


def test_sharded_weights(tmp_path: Path) -> None:
    """Large models are saved in several files with an index."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    path = written(tmp_path, 1, model)
    shutil.move(path / checkpoint.WEIGHTS, path / "model-00001.safetensors")
    index = {"weight_map": dict.fromkeys(model.state_dict(), "model-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    fresh = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    checkpoint.load_strict(fresh, path)
    assert torch.equal(fresh[0].weight, model[0].weight)


def test_space_is_checked_in_advance(tmp_path: Path) -> None:
    """An output directory that cannot be used must be told before training starts."""
    checkpoint.require_space(tmp_path / "new" / "run", 10)
    with pytest.raises(CheckpointError, match=r"needs about .* MiB .* are free"):
        checkpoint.require_space(tmp_path, 2**60)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to"):
        checkpoint.require_space(tmp_path / "file" / "run")
    model = nn.Linear(10, 10)
    assert checkpoint.checkpoint_bytes(model) == 3 * 110 * 4
    assert checkpoint.checkpoint_bytes(model.requires_grad_(False)) == 110 * 4
