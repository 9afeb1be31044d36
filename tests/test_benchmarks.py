"""The benchmark suite runs, its rows hold together, and the documents follow the rows."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import case as cases
from benchmarks import report, rows
from benchmarks.calibration import Calibration
from benchmarks.case import Case, Plan
from benchmarks.harness import Session
from benchmarks.memory import growth
from benchmarks.timing import interleave, quantiles

OPS = ("info_nce", "sigmoid_contrastive")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[rows.Row]:
    """Rows of a run of the whole suite at a tiny size."""
    results = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "fwd+bwd", "--short", "--sizes", "48", "--seconds", "0.01"]
    command += ["--threads", "1", "--device", "cpu", "--record", "--results", str(results)]
    done = subprocess.run(command, cwd=rows.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "× peer" in done.stdout and "OPS" in done.stdout  # our table and pytest-benchmark's
    (path,) = results.glob("*.jsonl")
    return rows.read(path)


def checkout(root: Path, text: str, results: list[rows.Row] | None = None) -> Path:
    """A README with rows beside it; returns the README."""
    for row in results or []:
        rows.append(root / "benchmarks" / "results" / "device.jsonl", row)
    readme = root / "README.md"
    readme.write_text(text)
    return readme


@pytest.mark.parametrize("op", OPS)
def test_every_variant_leaves_a_whole_row(recorded: list[rows.Row], op: str) -> None:
    """Else a benchmark is broken, or prints a number that nobody can trace to a run."""
    of_op = [row for row in recorded if row.op == op]
    assert {row.variant for row in of_op} >= {"mmkern", "reference", "dense", "chunked"}
    assert {row.dtype for row in of_op} == {"float32", "bfloat16"}
    for row in of_op:
        assert row.shape == {"N": 48, "D": 512} and row.mode == "fwd+bwd"
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms and row.rounds >= 3
        assert row.gradient_bytes >= 2 * 48 * 512 * 2
        assert row.threads == 1 and row.device and row.isa and row.commit and row.date
        assert {"torch", "mmkern", "python"} <= row.versions.keys()
        # info_nce recomputes the products, except small fp32 ones, which it keeps.
        recomputed = op == "info_nce" and row.dtype != "float32"
        work = (8 if recomputed else 6) * 48**2 * 512
        assert row.tflops == pytest.approx(work / row.p50_ms / 1e9, rel=1e-2)
        assert row.error is not None and row.error == max(row.errors.values())
        assert row.error < (1e-5 if row.dtype == "float32" else 5e-2)
        assert row.backend if row.variant == "mmkern" else row.backend == ""
        assert 0 < row.sol < math.inf


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="no open_clip_torch")
def test_open_clip_is_really_called(recorded: list[rows.Row]) -> None:
    """Else the peer that people compare with silently vanishes from the tables."""
    assert {row.op for row in recorded if row.variant == "open_clip"} == set(OPS)


def test_a_row_with_other_fields_is_refused(recorded: list[rows.Row], tmp_path: Path) -> None:
    """Else an old or hand-edited results file is read as something that it is not."""
    path = tmp_path / "x.jsonl"
    rows.append(path, recorded[0])
    value = dataclasses.asdict(recorded[0])
    del value["commit"]
    rows.append_json(path, value)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: .*commit"):
        rows.read(path)


def test_long_form_covers_the_promised_sizes() -> None:
    """Else the acceptance case or the largest batch is no longer measured."""
    suite = cases.load("benchmarks.ops.info_nce")
    found = list(suite.cases(Plan("cpu", short=False)))
    for dtype in ("float32", "bfloat16"):
        assert Case({"N": 8192, "D": 512}, dtype, "fwd+bwd") in found
        assert {c["N"] for c in found if c.dtype == dtype} >= {512, 1024, 2048, 4096, 8192, 16384}
    assert [c.only for c in found if c["N"] == 65_536] == [("mmkern",)]
    assert any(c.distribution == "trained" for c in found)


def test_work_is_counted_by_the_registered_formula() -> None:
    """Else sol and TFLOP/s are shares of the wrong amount of work."""
    for op, factor in zip(OPS, (8, 6), strict=True):
        suite = cases.load(f"benchmarks.ops.{op}")
        for mode, expected in (("fwd", 2), ("fwd+bwd", factor)):
            assert (
                cases.flops(suite, Case({"N": 4096, "D": 512}, "bfloat16", mode))
                == expected * 4096**2 * 512
            )


def test_trained_features_have_the_stated_cosines() -> None:
    """Else errors are measured on inputs that no trained model gives."""
    image, text = cases.features(
        Case({"N": 512, "D": 512}, "float32", "fwd", distribution="trained")
    )
    cosines = image @ text.T
    assert cosines.diagonal().mean().item() == pytest.approx(0.39, abs=0.02)
    others = cosines.sum() - cosines.trace()
    assert others.item() / (512 * 511) == pytest.approx(0.16, abs=0.02)


@pytest.mark.parametrize("op", OPS)
def test_dense_and_chunked_agree_with_ours(op: str) -> None:
    """Else the variants compute different things and their times mean nothing."""
    suite = cases.load(f"benchmarks.ops.{op}")
    inputs = suite.inputs(Case({"N": 1100, "D": 8}, "float32", "fwd+bwd"))  # two chunks
    ours = cases.step(suite.variants["mmkern"].make(), inputs, "fwd+bwd")
    for name in ("dense", "chunked", "reference"):
        other = cases.step(suite.variants[name].make(), inputs, "fwd+bwd")
        for a, b in zip(ours, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_reference_variant_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the row called reference times the kernels that it is compared with."""
    module = importlib.import_module("mmkern.ops.info_nce.reference")
    called: list[str] = []
    for name in ("info_nce_fwd", "info_nce_bwd"):

        def spy(name: str, original: Any, *args: Any) -> Any:
            called.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, partial(spy, name, getattr(module, name)))
    suite = cases.load("benchmarks.ops.info_nce")
    loss = suite.variants["reference"].make()
    cases.step(loss, suite.inputs(Case({"N": 8, "D": 4}, "float32", "fwd+bwd")), "fwd+bwd")
    assert called == ["info_nce_fwd", "info_nce_bwd"]


def test_a_wrong_result_is_not_timed() -> None:
    """Else a kernel that is fast and wrong gets a row."""
    suite = cases.load("benchmarks.ops.info_nce")
    broken = suite.variants["dense"].make()
    ours = cases.Variant(lambda: lambda *inputs: 1.01 * broken(*inputs))
    wrong = dataclasses.replace(suite, variants={**suite.variants, "mmkern": ours})
    rates = Calibration({"float32": 1e12, "bfloat16": 1e12}, 1e11)
    session = Session(Plan("cpu", short=True), rates, rows.Provenance.of("cpu"), 0.01, 40.0, None)
    with pytest.raises(ValueError, match="wrong result"):
        session.run(wrong, Case({"N": 16, "D": 8}, "float32", "fwd+bwd"), None)
    assert not session.rows


def test_variants_take_turns_and_slow_ones_go_once() -> None:
    """Else one variant gets the quiet minute, or one slow peer takes the hour."""
    order: list[str] = []

    def pedantic(target: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()

    calls: dict[str, Callable[[], object]] = {
        name: partial(order.append, name) for name in ("ours", "a", "slow", "b")
    }
    first = {"ours": 1.0, "a": 1.0, "slow": 1e3, "b": 2.0}
    samples = interleave(calls, first, ours="ours", device="cpu", seconds=16.0, pedantic=pedantic)
    assert order == ["a", "b", "ours"] * 4
    assert samples["slow"] == [1e3] and len(samples["ours"]) == 4
    assert quantiles([3.0, 1.0, 2.0]) == pytest.approx((1.4, 2.0, 2.6))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("allocate", [lambda: torch.ones(16 << 20), lambda: bytearray(64 << 20)])
def test_memory_of_a_known_allocation(allocate: Any) -> None:
    """Else published peaks are wrong: 64 MiB, from torch's allocator or past it, must show."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        kept = allocate()
        return x.sum() * float(kept[-1])

    found = growth(loss, (torch.ones(4),), "fwd")
    assert found == pytest.approx(64 << 20, abs=3 << 20)


TEXT = """# Title
<!-- bench:info_nce-time -->
<!-- /bench -->
Between.
<!-- bench:info_nce-figure -->
<!-- /bench -->
"""


def test_report_fills_once_and_check_sees_a_stale_table(
    recorded: list[rows.Row], tmp_path: Path
) -> None:
    """Else documents show figures that the committed rows do not, and CI does not notice."""
    readme = checkout(tmp_path, TEXT, recorded)
    stale = report.Report(tmp_path).update(write=False)
    assert readme in stale and readme.read_text() == TEXT
    report.Report(tmp_path).update(write=True)
    text = readme.read_text()
    assert text.startswith("# Title\n") and "\nBetween.\n" in text
    ours = next(row for row in recorded if (row.op, row.variant) == ("info_nce", "mmkern"))
    assert f"{ours.p50_ms:.3g}" in text and ours.commit in text
    (figure,) = re.findall(r"\]\((docs/figures/info_nce.*\.svg)\)", text)
    assert (tmp_path / figure).read_text().startswith("<?xml")
    assert report.Report(tmp_path).update(write=False) == []

    readme.write_text(text.replace(f"{ours.p50_ms:.3g}", "0.001"))
    assert report.Report(tmp_path).update(write=False) == [readme]
    report.Report(tmp_path).update(write=True)
    assert readme.read_text() == text

    faster = dataclasses.replace(ours, p50_ms=0.0123, date="2999-01-01T00:00:00+00:00")
    checkout(tmp_path, text, [faster])  # the later row of a case counts
    assert report.Report(tmp_path).update(write=False) == [readme, tmp_path / figure]
    report.Report(tmp_path).update(write=True)
    assert "0.0123" in readme.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:info_nce-tmie -->\n<!-- /bench -->\n", "no block is called 'info_nce-tmie'"),
        ("<!-- bench:headline -->\nnever closed\n", "not closed"),
    ],
)
def test_report_refuses_bad_markers(text: str, message: str, tmp_path: Path) -> None:
    """Else a typing error leaves a table that is never filled."""
    checkout(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        report.Report(tmp_path).update(write=False)


METRICS = {
    "top1": 0.1234, "top5": 0.3, "chance_top1": 0.0005, "chance_top5": 0.0027, "pixel_top1": 0.021,
    "windows_top1": 0.04, "windows_top5": 0.1, "windows_chance_top1": 0.0005,
    "vendors": {"": "Twitter", "windows_": "Windows"}, "names": 1870,
    "prompts": {
        "Twitter": {"name alone": {"top1": 0.11, "top5": 0.29}},
        "Windows": {"name alone": {"top1": 0.03, "top5": 0.09}},
    },
    "train_seconds": 251.0, "pairs": 15000, "backend": "cpp",
}  # fmt: skip


def test_demo_run_becomes_a_table(tmp_path: Path) -> None:
    """Else the demo's results in the README are typed by hand."""
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    report.record_demo(tmp_path, tmp_path / "benchmarks" / "results")
    readme = checkout(
        tmp_path,
        "<!-- bench:demo -->\n<!-- /bench -->\n\n<!-- bench:demo-prompts -->\n<!-- /bench -->\n",
    )
    report.Report(tmp_path).update(write=True)
    text = readme.read_text()
    assert "| CLIP, zero-shot | 12.34 % | 30.00 % | 4.00 % | 10.00 % |" in text
    assert "| nearest training pixels | 2.10 % | – | – | – |" in text
    assert "| name alone | 11.00 % | 29.00 % | 3.00 % | 9.00 % |" in text
    assert "15,000 pairs in 251 s" in text


@pytest.mark.parametrize(
    ("change", "message"), [({"top1": 12.3}, "fraction"), ({"pairs": None}, "has no pairs")]
)
def test_demo_run_with_bad_metrics_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Else percents are published as fractions, or a half-written run as a result."""
    metrics = {key: value for key, value in {**METRICS, **change}.items() if value is not None}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=message):
        report.record_demo(tmp_path, tmp_path / "results")


def test_runs_of_other_systems_become_tables(tmp_path: Path) -> None:
    """Else BLIP-2's results are typed by hand, or its baselines left out."""
    scores = {"exact": 0.1, "shuffled_exact": 0.01, "majority": 0.02, "ranked": 0.4,
              "shuffled_ranked": 0.06, "chance": 0.05, "questions": 600}  # fmt: skip
    both = {f"{way}_r{k}": 0.125 for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    common = {"steps": 240, "train_seconds": 420.0, "eval_seconds": 60.0, "backend": "cpp"}
    retrieval = dict.fromkeys(("contrast", "reranked", "shuffled", "majority", "chance"), both)
    for metrics in (
        {"rerank": 16, "retrieval": {"Twitter": retrieval}},
        {"captions": {"Twitter": scores}},
        {"questions": {"Twitter": {"colour": scores}}, "held_out": ["colour"]},
    ):
        (tmp_path / "metrics.json").write_text(json.dumps({**common, **metrics}))
        report.record_demo(tmp_path, tmp_path / "benchmarks" / "results")
    names = ("blip2-stage1", "blip2-stage2", "instructblip")
    readme = checkout(tmp_path, "".join(f"<!-- bench:{n} -->\n<!-- /bench -->\n\n" for n in names))
    report.Report(tmp_path).update(write=True)
    text = readme.read_text()
    assert "| Twitter: best 16 ranked again | 12.50 % |" in text
    answers = "| 10.00 % | 1.00 % | 2.00 % | 40.00 % | 6.00 % | 5.00 % | 600 |"
    assert f"| Twitter, captions {answers}" in text
    assert f"| Twitter, colour, never trained {answers}" in text
    assert "240 steps in 420 s" in text


def test_documents_are_current() -> None:
    """Else a document shows other numbers than the committed rows; run benchmarks.report."""
    assert report.Report().update(write=False) == []
