"""What is measured: a case (sizes, dtype, inputs), and an operator's variants."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

OURS = "mmkern"
MODES = ("fwd", "fwd+bwd")
WIDTH = 512
Loss = Callable[..., Tensor]


class UnavailableError(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One measurement: N pairs of width D.

    Attributes:
        distribution: "random" (unit vectors, scale 1/0.07) or "trained" (cosines of about 0.39
            for pairs and 0.16 for others, scale 100).
        only: names of the variants to run; empty means all.
    """

    n: int
    dtype: str
    mode: str
    d: int = WIDTH
    distribution: str = "random"
    device: str = "cpu"
    only: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.mode}-{self.dtype}-{self.distribution}-{self.n}x{self.d}"


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    device: str
    short: bool
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One implementation. `make` imports what it needs and returns the loss function.

    Attributes:
        quadratic: keeps N² numbers, so it is left out where they do not fit.
        compiles: its first call compiles for the shape at hand; left out of the short form.
    """

    make: Callable[[], Loss]
    quadratic: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False


@dataclass(frozen=True)
class Suite:
    """An operator's benchmark. Other processes find it by name, as `module.SUITE`."""

    op: str
    module: str
    variants: dict[str, Variant]
    inputs: Callable[[Case], tuple[Tensor, ...]]
    names: tuple[str, ...]  # of the inputs
    exact: Loss  # run in fp64
    largest: int  # the size that only ours runs at

    def cases(self, plan: Plan) -> Iterator[Case]:
        return contrastive_cases(plan, self.largest)


def load(module: str) -> Suite:
    suite: Suite = importlib.import_module(module).SUITE
    return suite


def contrastive_cases(plan: Plan, largest: int) -> Iterator[Case]:
    """The grid of the contrastive losses; sizes given on the command line replace it."""
    dtypes = ("float32", "bfloat16")
    device = plan.device
    if plan.sizes or plan.short:
        for n in plan.sizes or (512, 1024):
            for dtype in dtypes:
                for mode in MODES if plan.sizes else ("fwd+bwd",):
                    yield Case(n, dtype, mode, device=device)
        return
    for dtype in dtypes:
        if device == "cuda":
            grid: Sequence[tuple[int, int]] = [
                *((2**k, d) for d in (512, 1024) for k in range(12, 17)),
                (33_000, 768),
            ]
        else:
            grid = [(2**k, WIDTH) for k in range(9, 15)]
        for n, d in grid:
            yield Case(n, dtype, "fwd+bwd", d, device=device)
        for n in (1024, 8192):
            yield Case(n, dtype, "fwd", device=device)
        # Scaled logits far apart: other rounding, and peers that skip small gradients gain.
        yield Case(4096, dtype, "fwd+bwd", distribution="trained", device=device)
    if largest:
        sizes = (262_144, 1_048_576) if device == "cuda" else (largest,)
        for n in sizes:
            yield Case(n, "bfloat16", "fwd+bwd", device=device, only=(OURS,))


def features(case: Case) -> tuple[Tensor, Tensor]:
    """Unit-norm image and text features [N, D] that want gradients; the same for every dtype."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, case.d, generator=generator), dim=1)

    image, text = unit(case.n), unit(case.n)
    if case.distribution == "trained":
        shared = 0.16**0.5 * unit(1) + 0.23**0.5 * unit(case.n)
        image = F.normalize(shared + 0.61**0.5 * image, dim=1)
        text = F.normalize(shared + 0.61**0.5 * text, dim=1)
    elif case.distribution != "random":
        raise ValueError(f"features: unknown distribution {case.distribution!r}")
    dtype = getattr(torch, case.dtype)
    image, text = (x.to(case.device, dtype).requires_grad_() for x in (image, text))
    return image, text


def scalar(value: float, case: Case) -> Tensor:
    """A learned scalar: fp32 whatever the features are."""
    return torch.tensor(value, device=case.device, requires_grad=True)


def step(loss: Loss, inputs: Sequence[Tensor], mode: str) -> list[Tensor]:
    """The loss and, in "fwd+bwd", the gradients of all inputs."""
    if mode == "fwd":
        with torch.no_grad():
            return [loss(*inputs)]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def flops(suite: Suite, case: Case) -> int:
    """By the formulas that the operator registers, so there is one source for them."""
    ours = suite.variants[OURS].make()
    small = suite.inputs(replace(case, n=2, device="cpu"))
    shapes = [(case.n, *x.shape[1:]) if x.dim() else () for x in small]
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        fakes = [
            torch.empty(shape, dtype=x.dtype, device=case.device, requires_grad=True)
            for shape, x in zip(shapes, small, strict=True)
        ]
        step(ours, fakes, case.mode)
    return int(counter.get_total_flops())


def compulsory_bytes(case: Case) -> int:
    """Features read once and, with a backward, their gradients written once."""
    size = 2 * case.n * case.d * getattr(torch, case.dtype).itemsize
    return size * (2 if case.mode == "fwd+bwd" else 1)


def exact_outputs(suite: Suite, case: Case, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """What a step should give: fp64 on the same (rounded) inputs. None where it takes minutes."""
    if case.n > (65_536 if case.device == "cuda" else 16_384):
        return None
    wide = [x.detach().double().requires_grad_() for x in inputs]
    return step(suite.exact, wide, case.mode)


def errors(
    outputs: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str]
) -> dict[str, float]:
    """‖x - exact‖ / ‖exact‖ of the loss and of each gradient."""
    result = {}
    labels = ["loss", *(f"d_{name}" for name in names)]
    for name, x, truth in zip(labels, outputs, exact, strict=False):
        norm = truth.norm().item()
        result[name] = (x.double() - truth).norm().item() / (norm if norm else 1.0)
    return result


def release() -> None:
    """Give freed memory back before the next case."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
