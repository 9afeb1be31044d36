"""Checkpoints that are whole or not there.

A checkpoint is written into a directory aside, synced to disk, sealed with a list of its files and
their sizes, and renamed to ``checkpoint-<step>``. A process that is killed at any moment leaves
either the old checkpoints or the old ones and a new one; what it leaves aside is removed by the
next start.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SEAL = "complete.json"
WEIGHTS = "model.safetensors"
STATE = "trainer_state.json"
_INDEX = "model.safetensors.index.json"
_ASIDE = ".unfinished-"
_NAME = re.compile(r"^checkpoint-(\d+)$")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, is not whole, or does not fit the model."""


def seal(directory: Path) -> None:
    """Sync every file of a directory to disk, then write the list that marks it complete."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != SEAL)
    for path in files:
        _sync(path)
    sizes = {str(p.relative_to(directory)): p.stat().st_size for p in files}
    (directory / SEAL).write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    _sync(directory / SEAL)
    _sync(directory)


def is_complete(directory: str | Path) -> bool:
    """Whether a directory is sealed and every file of the list has its size."""
    directory = Path(directory)
    try:
        sizes = json.loads((directory / SEAL).read_text(encoding="utf-8"))["files"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def complete_checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    found = []
    for path in Path(run).glob("checkpoint-*"):
        if (match := _NAME.match(path.name)) and is_complete(path):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def aside(run: str | Path) -> Path:
    """Where a run's next checkpoint is written before it has its name."""
    return Path(run) / f"{_ASIDE}checkpoint"


def publish(written: Path, final: Path) -> None:
    """Seal `written` and give it its name by a rename. What had that name before is deleted."""
    seal(written)
    if final.exists():
        _delete(final)
    written.rename(final)
    _sync(final.parent)


def discard_unfinished(run: str | Path) -> None:
    """Remove what interrupted saves left aside."""
    for path in Path(run).glob(f"{_ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(run: str | Path, keep: int | None, protect: str | Path | None = None) -> None:
    """Delete the oldest complete checkpoints beyond `keep`; never `protect`, never the last."""
    if keep is None or keep < 1:
        return
    protected = None if protect is None else Path(protect).resolve()
    for path in complete_checkpoints(run)[:-keep]:
        if path.resolve() != protected:
            _delete(path)


def load_strict(model: nn.Module, directory: str | Path) -> None:
    """Load a checkpoint's weights into a model; every tensor on both sides must be used.

    Tensors that share memory with a loaded one (tied weights) need no entry of their own.

    Raises:
        CheckpointError: no or unreadable weights; missing or unexpected names; other shapes.
    """
    directory = Path(directory)
    state = _read(directory)
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes
        raise CheckpointError(f"{directory} does not fit the model: {error}") from error
    own = model.state_dict(keep_vars=True)
    loaded = {_memory(own[name]) for name in state if name in own}
    missing = [name for name in result.missing_keys if _memory(own[name]) not in loaded]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{directory} does not fit the model: {_names('missing', missing)}, "
            f"{_names('unexpected', result.unexpected_keys)}"
        )


def require_space(directory: str | Path, needed: int = 0) -> None:
    """Make a directory, and raise now if it cannot be written or the disk is too full.

    Raises:
        CheckpointError: naming the directory, and the bytes needed and free.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error.strerror}") from error
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{directory} needs about {needed / 2**20:,.0f} MiB for checkpoints, "
            f"{free / 2**20:,.0f} MiB are free"
        )


def checkpoint_bytes(model: nn.Module, states: int = 2) -> int:
    """About the size of one checkpoint: weights, and `states` numbers for each trained one."""
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trained = (p for p in model.parameters() if p.requires_grad)
    return sum(_bytes(t) for t in everything.values()) + states * sum(map(_bytes, trained))


@contextmanager
def clean_failure(directory: Path, what: str) -> Iterator[None]:
    """Turn a failed write into one clear error, and remove what it left (a full disk needs that).

    Raises:
        CheckpointError: on OSError, and on what torch and safetensors raise for a failed write.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise CheckpointError(f"{what} could not be written: {error}") from error


def _read(directory: Path) -> dict[str, Tensor]:
    index = directory / _INDEX
    files = [directory / WEIGHTS]
    try:
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [directory / name for name in sorted(set(names))]
        state: dict[str, Tensor] = {}
        for file in files:
            state.update(load_file(file))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: weights cannot be read: {error}") from error
    return state


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _names(kind: str, names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {kind}" + (f" ({shown})" if names else "")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _delete(checkpoint: Path) -> None:
    """Take the name away first: an interrupted deletion must not leave half a checkpoint."""
    doomed = checkpoint.with_name(f"{_ASIDE}deleted-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
