"""A killed run, resumed, ends with the bits of one that was never interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkern.train import checkpoint
from mmkern.train.checkpoint import CheckpointError
from mmkern.train.stage import Stage, info_nce
from mmkern.train.trainer import Trainer
from tests.train.runs import trainer
from tests.train.tiny import bits, same_bits

# Where the process is killed, and the step of the last checkpoint that must then be whole.
KILLS = {"in a step": 6, "in a save": 3, "before the rename": 3, "in a rotation": 9}
CACHED = Stage(objective=info_nce, gradient_cache_chunk=3)


def main(directory: str) -> None:
    """In a process of its own, which imports once: a child for each way to be killed."""
    children = {}
    for where in KILLS:
        children[where] = os.fork()
        if not children[where]:
            train_and_die(where, f"{directory}/{where}")
    for where, child in children.items():
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (where, status)


def train_and_die(where: str, directory: str) -> None:
    """Train, and die at `where` without a chance to clean up."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    run = trainer(directory)
    if where == "in a step":
        step = run.training_step

        def training_step(*args, **kwargs):  # type: ignore[no-untyped-def]
            if run.state.global_step == 7:
                die()
            return step(*args, **kwargs)

        run.training_step = training_step
    elif where == "in a save":  # weights are there, optimizer half written
        save = torch.save

        def half_save(value, path):  # type: ignore[no-untyped-def]
            if run.state.global_step == 6 and str(path).endswith("optimizer.pt"):
                Path(path).write_bytes(b"half")
                die()
            save(value, path)

        torch.save = half_save
    elif where == "before the rename":
        seal = checkpoint.seal

        def seal_and_die(written: Path) -> None:
            seal(written)
            if run.state.global_step == 6:
                die()

        checkpoint.seal = seal_and_die
    else:
        rmtree = shutil.rmtree

        def half_delete(path, **options):  # type: ignore[no-untyped-def]
            if "checkpoint-3" in str(path) and Path(path).exists():
                (Path(path) / checkpoint.WEIGHTS).unlink()
                die()
            rmtree(path, **options)

        checkpoint.shutil.rmtree = half_delete
    run.train()
    os._exit(0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights after 12 steps."""
    run = trainer(tmp_path_factory.mktemp("whole"))
    run.train()
    return bits(run.model)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the killed runs."""
    directory = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.train.test_resume", str(directory)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("where", KILLS)
def test_killed_run_resumes_bit_equal(
    where: str, killed: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """A pre-empted job must lose time only, never change its result or pick a broken checkpoint."""
    whole = checkpoint.complete_checkpoints(killed / where)
    assert whole[-1].name == f"checkpoint-{KILLS[where]}"
    run = trainer(killed / where)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 12
    assert same_bits(bits(run.model), uninterrupted)
    left = sorted(path.name for path in (killed / where).iterdir())
    assert left == ["checkpoint-12", "checkpoint-9"], "rotation keeps two, nothing lies aside"


@pytest.fixture(scope="module", params=[None, CACHED], ids=["plain", "gradient cache"])
def saved_often(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Stage | None, Path, dict[str, torch.Tensor]]:
    """A stage, a run of it with a checkpoint at every step, and its final weights."""
    directory = tmp_path_factory.mktemp("saved")
    run = trainer(directory, stage=request.param, save_steps=1, save_total_limit=None)
    run.train()
    return request.param, directory, bits(run.model)


@pytest.mark.parametrize("at", [3, 5, 8], ids=["mid-epoch", "epoch end", "second epoch"])
def test_resume_at_any_step(
    at: int,
    saved_often: tuple[Stage | None, Path, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    """Order, augmentation and dropout must go on where they were, also at an epoch's boundary."""
    stage, directory, expected = saved_often
    shutil.copytree(directory / f"checkpoint-{at}", tmp_path / f"checkpoint-{at}")
    run = trainer(tmp_path, stage=stage, save_strategy="no")
    run.train(resume_from_checkpoint=True)
    assert same_bits(bits(run.model), expected)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    """transformers trains one step too many there: the weights would drift at every restart."""
    run = trainer(tmp_path)
    run.train()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12
    assert same_bits(bits(again.model), bits(run.model))


def test_worker_processes_do_not_change_the_run(tmp_path: Path) -> None:
    """With workers the epoch must reach them, and the model's randomness must not shift."""
    run = trainer(tmp_path / "0", save_strategy="no", max_steps=6)
    run.train()
    workers = trainer(tmp_path / "1", save_strategy="no", max_steps=6, dataloader_num_workers=1)
    workers.train()
    assert same_bits(bits(run.model), bits(workers.model))


def test_resume_refuses_what_is_not_whole(tmp_path: Path) -> None:
    """transformers goes on without an optimizer state when its file is missing."""
    trainer(tmp_path, max_steps=3).train()
    saved = tmp_path / "checkpoint-3"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    shutil.copytree(saved, tmp_path / "torn" / "checkpoint-3")
    weights = tmp_path / "torn" / "checkpoint-3" / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        trainer(tmp_path / "torn").train(resume_from_checkpoint=str(weights.parent))
    (saved / "optimizer.pt").unlink()
    checkpoint.seal(saved)
    with pytest.raises(CheckpointError, match=r"has no optimizer\.pt"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_failed_save_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must not leave half a checkpoint, nor take the whole ones along."""
    run = trainer(tmp_path)
    original = Trainer._save_rng_state

    def full(self: Trainer, output_dir: str) -> None:
        if self.state.global_step == 6:
            raise OSError(28, "No space left on device")
        original(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written.*No space left"):
        run.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


if __name__ == "__main__":
    main(*sys.argv[1:])
