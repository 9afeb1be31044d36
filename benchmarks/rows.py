"""A result row: what was measured, with what, where. One JSON object a line, only ever appended."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mmkern

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = "demo.jsonl"
SYSTEMS = "systems.jsonl"  # runs of the other systems
PACKAGES = ("torch", "triton", "open_clip_torch", "inf-cl", "cut-cross-entropy")
FLAGS = ("avx512_bf16", "amx_bf16", "amx_fp16")  # beyond what torch's capability names


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    Attributes:
        backend: what ran for mmkern ("cpp", "triton", "reference"); "" for other variants.
        p20_ms, p50_ms, p80_ms: percentiles of `rounds` interleaved calls.
        peak_bytes: peak memory above the inputs, gradients included; null where not measured.
        gradient_bytes: what of it the returned gradients take.
        error: the largest of `errors`, which are ‖x - fp64‖/‖fp64‖ of loss and gradients; null
            where fp64 takes minutes.
        sol: limit / p50, where limit = max(flops / gemm, bytes / copy) with this device's own
            rates. The work is the operator's, so a peer that does more is charged for it.
        tflops: flops / p50, on the same count.
        gemm_tflops, copy_gbps: the calibrated rates behind sol.
    """

    op: str
    variant: str
    backend: str
    mode: str
    dtype: str
    shape: dict[str, int]
    distribution: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    peak_bytes: int | None
    gradient_bytes: int
    error: float | None
    errors: dict[str, float]
    sol: float
    tflops: float
    gemm_tflops: float
    copy_gbps: float
    device: str
    isa: str
    threads: int
    versions: dict[str, str]
    commit: str
    dirty: bool
    date: str

    @property
    def place(self) -> tuple[str, str, int]:
        return self.device, self.isa, self.threads

    @property
    def key(self) -> tuple[object, ...]:
        """Rows with one key are repetitions; the last one counts."""
        shape = tuple(sorted(self.shape.items()))
        case = (self.op, self.variant, self.mode, self.dtype, shape, self.distribution)
        return (*case, *self.place)


@dataclass(frozen=True)
class Provenance:
    """Where and with what rows are made; asked once a session."""

    device: str
    isa: str
    threads: int
    versions: dict[str, str]
    commit: str
    dirty: bool

    @staticmethod
    def of(device: str) -> Provenance:
        name, isa = _cuda() if device == "cuda" else _cpu()
        commit, dirty = _git()
        return Provenance(name, isa, torch.get_num_threads(), _versions(), commit, dirty)

    @property
    def slug(self) -> str:
        name = self.device if self.isa.startswith("sm_") else f"{self.device} {self.isa}"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cuda() -> tuple[str, str]:
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"sm_{major}{minor}"


def _cpu() -> tuple[str, str]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine()
    # Virtual machines hide the model's number: "AMD EPYC" is four generations.
    for what in ("cpu family", "model"):
        if number := re.search(rf"^{what}\s*:\s*(\d+)$", text, re.MULTILINE):
            name += f" {what.split()[-1]} {number.group(1)}"
    known = re.search(r"^flags\s*:(.+)$", text, re.MULTILINE)
    flags = known.group(1).split() if known else []
    capability = torch.backends.cpu.get_cpu_capability()
    return name, " ".join([capability, *(flag for flag in FLAGS if flag in flags)])


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "mmkern": mmkern.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git() -> tuple[str, bool]:
    """Commit, and whether tracked files other than results differ from it."""

    def run(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = run("rev-parse", "--short=12", "HEAD")
        changed = run(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True  # not a checkout: nothing vouches for the sources
    return commit, bool(changed)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def append(path: Path, row: Row) -> None:
    append_json(path, dataclasses.asdict(row))


def append_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")


def read_json(path: Path) -> list[dict[str, Any]]:
    values = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from None
    return values


def read(path: Path) -> list[Row]:
    """All rows of a file; ValueError names the line whose fields are not Row's."""
    names = {field.name for field in dataclasses.fields(Row)}
    rows = []
    for number, value in enumerate(read_json(path), 1):
        if value.keys() != names:
            odd = ", ".join(sorted(value.keys() ^ names))
            raise ValueError(f"{path}:{number}: fields missing or unknown: {odd}")
        rows.append(Row(**value))
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key, in the order of the file."""
    return list({row.key: row for row in rows}.values())


def recorded(directory: Path = RESULTS) -> list[Row]:
    """The rows that count, of all devices."""
    runs = (DEMO, SYSTEMS)
    paths = sorted(path for path in directory.glob("*.jsonl") if path.name not in runs)
    return latest(row for path in paths for row in read(path))
