"""Render result rows into the documents.

    python -m benchmarks.report                         # rewrite what is between the markers
    python -m benchmarks.report --check                 # exit 1 if anything there is stale
    python -m benchmarks.report --record-demo runs/X    # append a demo run's metrics to the rows

A marker is a line ``<!-- bench:NAME -->``; what follows, to ``<!-- /bench -->``, is generated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import figures, rows, systems, tables
from benchmarks.rows import Provenance, Row

BLOCK = re.compile(r"^<!-- bench:([\w-]+) -->\n(.*?)^<!-- /bench -->$", re.DOTALL | re.MULTILINE)
OPENING = re.compile(r"^<!-- bench:", re.MULTILINE)
# What a demo run's metrics.json must have; the tables take more where it is there.
METRICS = [
    "top1",
    "top5",
    "chance_top1",
    "pixel_top1",
    "vendors",
    "names",
    "pairs",
    "backend",
    "train_seconds",
]


class Report:
    """The blocks that documents can name, over the rows of one checkout."""

    def __init__(self, root: Path = rows.ROOT) -> None:
        self.root = root
        results = root / "benchmarks" / "results"
        self.rows = rows.recorded(results)
        demo = results / rows.DEMO
        runs = rows.read_json(demo) if demo.exists() else []
        others = results / rows.SYSTEMS
        trained = rows.read_json(others) if others.exists() else []
        here = Path(__file__).parent
        ops = sorted(path.stem for path in (here / "ops").glob("[!_]*.py"))
        models = sorted(path.stem for path in (here / "models").glob("[!_]*.py"))
        self.blocks: dict[str, Callable[[Path], str]] = {
            "headline": lambda document: tables.headline(ops, self.rows),
            "demo": lambda document: tables.demo(runs),
            "demo-prompts": lambda document: tables.demo_prompts(runs),
        }
        for name in systems.TABLES:
            self.blocks[name] = lambda document, name=name: systems.table(name, trained)  # type: ignore[misc]
        for op in [*ops, *models]:
            for table in (tables.time, tables.memory, tables.error):
                self.blocks[f"{op}-{table.__name__}"] = partial(self._table, table, op)
            self.blocks[f"{op}-figure"] = partial(self._figures, op)
        self.stale_figures: dict[Path, tuple[str, figures.Points]] = {}

    def _table(self, table: Callable[[str, list[Row]], str], op: str, document: Path) -> str:
        return table(op, self.rows)

    def _figures(self, op: str, document: Path) -> str:
        links = []
        for name, place in self._places(op).items():
            path = self.root / "docs" / "figures" / f"{name}.svg"
            points = figures.series(op, place)
            first = place[0]
            title = f"{op}, forward and backward, D = 512; {first.device}, {first.threads} threads"
            if not figures.is_current(path, points):
                self.stale_figures[path] = (title, points)
            links.append(f"![{title}]({os.path.relpath(path, document.parent)})")
        return "\n\n".join(links) or tables.NO_ROWS

    def _places(self, op: str) -> dict[str, list[Row]]:
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.op == op:
                device = re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, row.place)).lower())
                groups.setdefault(f"{op}-{device}", []).append(row)
        return groups

    def render(self, document: Path) -> tuple[str, str]:
        """The document as it is and as it should be.

        Raises:
            ValueError: a marker without an end, or a name that no block has.
        """
        before = document.read_text()
        if len(BLOCK.findall(before)) != len(OPENING.findall(before)):
            raise ValueError(f"{document}: a bench marker is not closed by <!-- /bench -->")

        def fill(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in self.blocks:
                known = ", ".join(sorted(self.blocks))
                raise ValueError(f"{document}: no block is called {name!r}; there are {known}")
            return f"<!-- bench:{name} -->\n{self.blocks[name](document)}\n<!-- /bench -->"

        return before, BLOCK.sub(fill, before)

    def update(self, write: bool) -> list[Path]:
        """Documents and figures that are stale; with `write`, they are brought up to date."""
        documents = [self.root / "README.md", *sorted(self.root.glob("docs/**/*.md"))]
        stale = []
        for document in documents:
            if not document.exists():
                continue
            before, after = self.render(document)
            if before != after:
                stale.append(document)
                if write:
                    document.write_text(after)
        for path, (title, points) in self.stale_figures.items():
            stale.append(path)
            if write:
                figures.draw(path, title, points)
        return stale


def record_demo(run: Path, results: Path) -> Path:
    """Append a run's metrics.json with where it ran; returns the file of rows.

    Runs of CLIP and of the other systems have a file each.

    Raises:
        ValueError: metrics.json lacks a key of METRICS, or a rate is not between 0 and 1.
    """
    metrics = json.loads((run / "metrics.json").read_text())
    other = systems.system(metrics)
    wanted = ["steps", "train_seconds", "eval_seconds", "backend"] if other else METRICS
    missing = [key for key in wanted if key not in metrics]
    if missing:
        raise ValueError(f"{run}/metrics.json has no {', '.join(missing)}")
    for key, value in metrics.items():
        if re.search(r"top\d+$", key) and not 0 <= value <= 1:
            raise ValueError(f"{run}/metrics.json: {key} must be a fraction, got {value}")
    where = dataclasses.asdict(Provenance.of("cpu" if metrics["backend"] != "triton" else "cuda"))
    path = results / (rows.SYSTEMS if other else rows.DEMO)
    rows.append_json(path, {**metrics, **where, "date": rows.now()})
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--record-demo", metavar="RUN", type=Path, help="a run's directory")
    options = parser.parse_args(arguments)
    if options.record_demo is not None:
        print(f"appended to {record_demo(options.record_demo, rows.RESULTS)}")
        return 0
    stale = Report().update(write=not options.check)
    for path in stale:
        print(f"{'stale' if options.check else 'updated'}: {path.relative_to(rows.ROOT)}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
