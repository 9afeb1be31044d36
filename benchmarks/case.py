"""What is measured: a case (sizes, dtype, inputs), and an operator's variants."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

OURS = "mmkern"
MODES = ("fwd", "fwd+bwd")
WIDTH = 512
FP64_FLOPS = {"cpu": 1.2e12, "cuda": 4e13}  # beyond, a case is not compared with fp64
Loss = Callable[..., Tensor]  # or any function with one output


class UnavailableError(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        shape: sizes by name, such as N pairs of width D; ``case["N"]`` reads one.
        distribution: what the inputs hold. Contrastive losses: "random" (unit vectors, scale
            1/0.07) or "trained" (cosines of about 0.39 for pairs and 0.16 for others, scale 100).
        only: names of the variants to run; empty means all.
    """

    shape: dict[str, int]
    dtype: str
    mode: str
    distribution: str = "random"
    device: str = "cpu"
    only: tuple[str, ...] = ()

    def __getitem__(self, size: str) -> int:
        return self.shape[size]

    def __str__(self) -> str:
        size = "x".join(str(value) for value in self.shape.values())
        return f"{self.mode}-{self.dtype}-{self.distribution}-{size}"


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
        kept: bytes that it holds at its peak, all copies; beyond half the memory it is left out.
        compiles: its first call compiles for the shape at hand; left out of the short form.
        floor: does less than the operator, as a lower bound of its time; has no error.
    """

    make: Callable[[], Loss]
    kept: Callable[[Case], float] = lambda case: 0.0
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False
    floor: bool = False


@dataclass(frozen=True)
class Suite:
    """An operator's benchmark. Other processes find it by name, as `module.SUITE`.

    Attributes:
        cases: the grid of a plan.
        inputs: of a case. Those that require a gradient get one; others are passed on (None too).
        names: of the inputs that require a gradient.
        exact: run in fp64.
        small: a case of the same kind that is quick, to warm a process up.
        flops: work of a case; by default what the operator's registered formulas count.
        read_bytes: the least that a case moves; by default inputs once and gradients once.
        kernel: the registered operator whose backend rows name; by default ``<op>_fwd``.
        drawn: whether a case draws at random (dropout), so that fp64 has nothing to compare with.
    """

    op: str
    module: str
    cases: Callable[[Plan], Iterator[Case]]
    variants: dict[str, Variant]
    inputs: Callable[[Case], tuple[Any, ...]]
    names: tuple[str, ...]
    exact: Loss
    small: Callable[[Case], Case]
    flops: Callable[[Case], int] | None = None
    read_bytes: Callable[[Case], int] | None = None
    kernel: str = ""
    drawn: Callable[[Case], bool] = lambda case: False


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
                    yield Case({"N": n, "D": WIDTH}, dtype, mode, device=device)
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
            yield Case({"N": n, "D": d}, dtype, "fwd+bwd", device=device)
        for n in (1024, 8192):
            yield Case({"N": n, "D": WIDTH}, dtype, "fwd", device=device)
        # Scaled logits far apart: other rounding, and peers that skip small gradients gain.
        shape = {"N": 4096, "D": WIDTH}
        yield Case(shape, dtype, "fwd+bwd", distribution="trained", device=device)
    if largest:
        sizes = (262_144, 1_048_576) if device == "cuda" else (largest,)
        for n in sizes:
            shape = {"N": n, "D": WIDTH}
            yield Case(shape, "bfloat16", "fwd+bwd", device=device, only=(OURS,))


def few_rows(case: Case) -> Case:
    """The same with at most 256 pairs."""
    return replace(case, shape={**case.shape, "N": min(case["N"], 256)})


def dense_bytes(case: Case) -> float:
    """What a contrastive loss that keeps its N² logits takes, all copies."""
    return 20.0 * case["N"] ** 2


def features(case: Case) -> tuple[Tensor, Tensor]:
    """Unit-norm image and text features [N, D] that want gradients; the same for every dtype."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, case["D"], generator=generator), dim=1)

    image, text = unit(case["N"]), unit(case["N"])
    if case.distribution == "trained":
        shared = 0.16**0.5 * unit(1) + 0.23**0.5 * unit(case["N"])
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


def step(loss: Loss, inputs: Sequence[Any], mode: str) -> list[Tensor]:
    """The result and, in "fwd+bwd", gradients of the inputs that require one (upstream: ones)."""
    if mode == "fwd":
        with torch.no_grad():
            return [loss(*inputs)]
    value = loss(*inputs)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, wanted, torch.ones_like(value))]


def flops(suite: Suite, case: Case) -> int:
    """By the formulas that the operator registers, so there is one source for them."""
    if suite.flops is not None:
        return suite.flops(case)
    ours = suite.variants[OURS].make()
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        step(ours, suite.inputs(case), case.mode)
    return int(counter.get_total_flops())


def compulsory_bytes(suite: Suite, case: Case) -> int:
    """Inputs read once and, with a backward, their gradients written once."""
    if suite.read_bytes is not None:
        return suite.read_bytes(case)
    with FakeTensorMode():
        tensors = [x for x in suite.inputs(case) if isinstance(x, Tensor)]
    read = sum(x.nbytes for x in tensors)
    return read + (case.mode == "fwd+bwd") * sum(x.nbytes for x in tensors if x.requires_grad)


def exact_outputs(suite: Suite, case: Case, inputs: Sequence[Any]) -> list[Tensor] | None:
    """What a step should give: fp64 on the same (rounded) inputs. None where it takes minutes, or
    where the case is drawn at random."""
    if suite.drawn(case) or flops(suite, case) > FP64_FLOPS[case.device]:
        return None
    return step(suite.exact, [_wide(x) for x in inputs], case.mode)


def _wide(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


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
