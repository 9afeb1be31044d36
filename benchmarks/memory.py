"""Peak memory of one call above its inputs.

CPU: the growth of the process's high-water mark of resident memory (Linux), in a fresh process that
has already run the call at a small size, so code, thread pools and the libraries' lasting buffers
are in place. It sees every allocator: torch's, malloc in C++, MKL's and oneDNN's scratch. What
torch.profiler reports sees torch's allocator only, so a kernel's own buffers would be free.
CUDA: the caching allocator's peak; no kernel here allocates past it.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.case import Case, Loss, load, step

# What every child would import again: the caller's main module and torch's lazy parts among it.
PRELOADED = ["pytest", "torch._dynamo", "mmkern.ops", "benchmarks.harness"]


def peak_bytes(module: str, variant: str, case: Case, threads: int) -> int | None:
    """Peak bytes above inputs, gradients included, of a CPU step in a process of its own.

    None where the system keeps no high-water mark that can be reset (anything but Linux).
    """
    if not sys.platform.startswith("linux"):
        return None
    # The server imports but never computes: no thread pool is lost when it forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(send, module, variant, case, threads))
    child.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        child.join()
        raise RuntimeError(
            f"peak_bytes: {variant} at {case} ended with exit code {child.exitcode}"
        ) from None
    child.join()
    return int(result)


def _measure(send: Connection, module: str, variant: str, case: Case, threads: int) -> None:
    torch.set_num_threads(threads)
    suite = load(module)
    chosen = suite.variants[variant]
    loss = chosen.make()
    step(loss, suite.inputs(case if chosen.compiles else suite.small(case)), case.mode)
    send.send(growth(loss, suite.inputs(case), case.mode))


def growth(loss: Loss, inputs: Sequence[Any], mode: str) -> int:
    """Growth of this process's peak resident memory over a step, in bytes (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed heap that a step could reuse unseen
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    before = _status("VmRSS")
    outputs = step(loss, inputs, mode)
    peak = _status("VmHWM")
    del outputs
    return max(0, peak - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def cuda_peak_bytes(loss: Loss, inputs: Sequence[Any], mode: str) -> int:
    """Peak bytes above what is allocated now, gradients included, of a CUDA step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = step(loss, inputs, mode)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del outputs
    return peak - before
