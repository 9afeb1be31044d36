"""Options, the session's calibration, and the `bench` fixture of `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rows
from benchmarks.calibration import calibrate
from benchmarks.case import Plan
from benchmarks.harness import Bench, Session, summary
from benchmarks.rows import Provenance

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmkern")
    add = group.addoption
    add("--short", action="store_true", help="two small sizes, no compiling: under two minutes")
    add("--sizes", default="", help="comma-separated N in place of the list")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    add("--seconds", type=float, default=0.0, help="time for the rounds of a case; 0: 10, short 1")
    add("--longest", type=float, default=40.0, help="leave out peers with matrix products beyond")
    add("--against", default="", help="variant that ratios are printed against; else the op's peer")
    add("--record", action="store_true", help="append a row a variant to the device's file")
    add("--results", default=str(rows.RESULTS), help="directory of the files of rows")


def _plan(config: pytest.Config) -> Plan:
    sizes = tuple(int(n) for n in config.getoption("--sizes").split(",") if n)
    return Plan(config.getoption("--device"), config.getoption("--short"), sizes)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.SUITE.cases(_plan(metafunc.config))
        metafunc.parametrize("case", list(cases), ids=str)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    config = request.config
    plan = _plan(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.getoption("--threads") or threads)
    seconds = config.getoption("--seconds") or (1.0 if plan.short else 10.0)
    where = Provenance.of(plan.device)
    path = Path(config.getoption("--results"), f"{where.slug}.jsonl")
    results = path if config.getoption("--record") else None
    calibration = calibrate(plan.device, min(seconds, 2.0) / 4, 2 if plan.short else None)
    config.stash[_SESSION] = Session(
        plan, calibration, where, seconds, config.getoption("--longest"), results
    )
    yield config.stash[_SESSION]
    torch.set_num_threads(threads)


@pytest.fixture
def bench(session: Session, benchmark: Any) -> Bench:
    """Measure a suite's variants at a case, and record the rows where --record is given."""
    return lambda suite, case: session.run(suite, case, benchmark)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = config.stash.get(_SESSION, None)
    if session is not None:
        terminalreporter.section("mmkern: time, memory and error of all variants")
        for line in summary(session, config.getoption("--against")):
            terminalreporter.write_line(line)
