"""nn.ClipLoss and nn.SigLipLoss against the classes of an installed open_clip."""

from __future__ import annotations

import importlib.util
import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmkern.nn import ClipLoss, SigLipLoss
from tests.testing import run_ranks, unit_features

FLAGS = [(False, False), (False, True), (True, True)]


def open_clip_losses() -> ModuleType:
    """open_clip/loss.py by path: importing the package needs torchvision."""
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        pytest.skip("open_clip_torch is not installed")
    path = f"{found.submodule_search_locations[0]}/loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Encoder(nn.Module):
    """Stands for open_clip's model: returns what its losses are called with."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(8, 6).double(), nn.Linear(8, 6).double()
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)) if bias else None

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        normalise = nn.functional.normalize
        outputs = {
            "image_features": normalise(self.image(image), dim=-1),
            "text_features": normalise(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias * 1
        return outputs


def gradients(loss: nn.Module, rank: int, world: int, bias: bool) -> list[Tensor]:
    """Gradients after one step of open_clip's train loop, which sums what the loss returns."""
    model: nn.Module = Encoder(bias)
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    image, text = (unit_features(8, 8, torch.float64, seed=s).chunk(world)[rank] for s in (0, 1))
    losses = loss(**model(image, text), output_dict=True)
    assert list(losses) == ["contrastive_loss"]  # later releases sum the keys that end in _loss
    sum(losses.values()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("name", "bias"), [("ClipLoss", False), ("ClipLoss", True), ("SigLipLoss", True)]
)
def test_one_process(name: str, bias: bool):
    """Swapping the class in open_clip's loop must leave every gradient as it was."""
    theirs = gradients(getattr(open_clip_losses(), name)(), 0, 1, bias)
    ours = gradients({"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}[name](), 0, 1, bias)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def both(rank: int, world: int) -> dict[str, Any]:
    theirs, results = open_clip_losses(), {}
    place = {"rank": rank, "world_size": world}
    for local, grad in FLAGS:
        flags = {"local_loss": local, "gather_with_grad": grad, **place}
        results[f"ClipLoss {local} {grad}"] = (
            gradients(ClipLoss(**flags, exact=False), rank, world, bias=False),
            gradients(theirs.ClipLoss(**flags), rank, world, bias=False),
            gradients(ClipLoss(**flags), rank, world, bias=False),
        )
    # open_clip's gradient with these flags is another direction; ours stays the true one.
    default = gradients(ClipLoss(local_loss=True, **place), rank, world, bias=False)
    results["ClipLoss True False"] = (default, default, default)
    results["SigLipLoss"] = (
        gradients(SigLipLoss(**place), rank, world, bias=True),
        gradients(theirs.SigLipLoss(**place, dist_impl="gather"), rank, world, bias=True),
        None,
    )
    try:
        ClipLoss(rank=1 - rank, world_size=world)(torch.ones(1, 1), torch.ones(1, 1), 1.0)
    except ValueError as error:
        results["swapped ranks"] = str(error)
    dist.barrier()
    return results


def test_two_ranks():
    """The table of gradient factors, against open_clip's own losses under DDP."""
    open_clip_losses()
    exact = gradients(ClipLoss(), 0, 1, bias=False)
    for rank, results in enumerate(run_ranks(2, both)):
        message = results.pop("swapped ranks")
        assert message == (f"ClipLoss: built for rank {1 - rank} of 2, running on rank {rank} of 2")
        for ours, theirs, default in results.values():
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            for a, b in zip(default or [], exact, strict=False):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_signatures(name: str):
    """open_clip calls both by keyword: a renamed or reordered argument breaks its train loop."""
    theirs, ours = getattr(open_clip_losses(), name), {"ClipLoss": ClipLoss}.get(name, SigLipLoss)
    for method in ("__init__", "forward"):
        expected = list(inspect.signature(getattr(theirs, method)).parameters)
        got = list(inspect.signature(getattr(ours, method)).parameters)
        assert got[: len(expected)] == expected


def test_bad_arguments():
    """What cannot be honoured is refused at construction, not computed differently."""
    with pytest.raises(NotImplementedError, match="use_horovod"):
        ClipLoss(use_horovod=True)
    with pytest.raises(NotImplementedError, match="not a multiple of the true one"):
        ClipLoss(local_loss=True, exact=False)
    with pytest.raises(ValueError, match="dist_impl must be one of"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="no process group is initialised"):
        ClipLoss(world_size=2)(torch.ones(1, 1), torch.ones(1, 1), 1.0)
