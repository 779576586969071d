"""How claims run as tests: options, markers, one test for each claim and data set, and the table at the end."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import pytest
import torch
from rich.console import Console

from robench import record, verdicts, zoo
from robench.claim import Accuracy, Claim, Trial
from robench.errors import UserError
from robench.files import write_atomic
from robench.record import Record
from robench.settlement import Find, Settlement, UnsettledError, copies, matching, settle
from robench.workbench import Workbench, default_scale
from robench.zoo import Scale

RECORDS = Path(__file__).resolve().parent.parent / "leaderboard" / "records"
SETTLED = pytest.StashKey[list[Settlement]]()


@dataclass(frozen=True)
class Case:
    """A claim on one of its data sets."""

    claim: Claim
    trial: Trial

    def __str__(self) -> str:
        return f"{self.claim.name}-{self.trial.dataset}-{self.trial.scales[0]}"


def _count(text: str) -> int:
    """Read a number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add robench's options."""
    group = parser.getgroup("robench")
    group.addoption("--gpu", action="store_true", help="run the claims at gpu scale, on a CUDA device")
    group.addoption("--scale", choices=get_args(Scale), help="run the claims at this scale")
    group.addoption("--seeds", type=_count, help="independently trained copies of each defense (default: as many as are recorded, else 1)")
    group.addoption("--n", type=_count, help="test examples (default: the scale's)")
    group.addoption("--records", type=Path, default=RECORDS, help="folder of records that are taken as measured")
    group.addoption("--fresh", action="store_true", help="measure everything anew, whatever records there are")
    group.addoption("--json", type=Path, help="write the table of verdicts to this file")
    group.addoption("--cache-dir", type=Path, help="folder of trained weights and unfinished work")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers: data sets, papers, gpu."""
    for name in ("digits", "cifar10", "cifar100"):
        config.addinivalue_line("markers", f"{name}: claims on {name}")
    for slug in sorted({entry.paper.slug for entry in zoo.entries().values()}):
        config.addinivalue_line("markers", f"{slug}: claims of that paper")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.stash[SETTLED] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each claim on each data set, marked with the data set and the paper."""
    if "case" in metafunc.fixturenames:
        cases = [
            pytest.param(case, id=str(case), marks=[getattr(pytest.mark, trial.dataset), getattr(pytest.mark, claim.paper.slug)])
            for claim in metafunc.module.CLAIMS
            for trial in claim.trials
            for case in [Case(claim, trial)]
        ]
        metafunc.parametrize("case", cases)


@pytest.fixture(scope="session")
def known(request: pytest.FixtureRequest) -> list[Record]:
    """Return the records that are taken as measured."""
    option = request.config.getoption
    return [] if option("--fresh") or not option("--records").is_dir() else record.load_folder(option("--records"))


@pytest.fixture(scope="session")
def workbench(request: pytest.FixtureRequest, known: list[Record]) -> Callable[[str, Scale], Workbench]:
    """Return a function that gives the workbench of a data set and scale, one for the whole run."""
    option = request.config.getoption
    benches: dict[tuple[str, Scale], Workbench] = {}

    def give(dataset: str, scale: Scale) -> Workbench:
        if (dataset, scale) not in benches:
            device = "cuda" if scale in ("gpu", "paper") else "cpu"
            benches[dataset, scale] = Workbench(
                dataset, scale, records=list(known), device=device, cache=option("--cache-dir"), examples=option("--n")
            )
        return benches[dataset, scale]

    return give


@pytest.fixture
def settle_case(
    request: pytest.FixtureRequest, known: list[Record], workbench: Callable[[str, Scale], Workbench]
) -> Callable[[Case], None]:
    """Return the function that settles a claim and compares the outcome with the one the project stands by."""
    option = request.config.getoption

    def run(case: Case) -> None:
        dataset = case.trial.dataset
        scale = cast(Scale, "gpu" if option("--gpu") else option("--scale") or default_scale(dataset))
        if scale not in case.trial.scales:
            pytest.skip(f"{case.claim.name} is not claimed on {dataset} at scale {scale}, but at {', '.join(case.trial.scales)}")
        bench = workbench(dataset, scale)
        recorded = _recorded(bench, known)
        try:
            settlement = settle(case.claim, dataset, scale, _ready(bench, recorded), option("--seeds") or copies(case.trial, recorded))
        except _MissingError as missing:
            pytest.skip(str(missing))
        except UnsettledError as error:
            pytest.fail(f"{case.claim.name} on {dataset}: {error.args[0]}; --fresh measures all of it anew", pytrace=False)
        request.config.stash[SETTLED].append(settlement)
        _compare(settlement)

    return run


class _MissingError(Exception):
    """What a measurement needs and is not there."""


def _recorded(bench: Workbench, known: list[Record]) -> Find:
    """Return what gives the records of an accuracy where what is `known` is enough, and nothing where it is not.

    It is taken as it is: without all attacks that it should be held against, the claim is open until a campaign runs them.
    """
    shelf = replace(bench, records=known)

    def find(accuracy: Accuracy, seed: int) -> list[Record]:
        recorded = shelf.recorded(accuracy, seed)
        return matching(bench.records, accuracy, bench.dataset_name, bench.scale, seed) if recorded else []

    return find


def _ready(bench: Workbench, recorded: Find) -> Find:
    """Return the workbench's `find`, which says what is missing instead of measuring where it cannot."""

    def find(accuracy: Accuracy, seed: int) -> Sequence[Record]:
        if found := recorded(accuracy, seed):
            return found
        if bench.device == "cuda" and not torch.cuda.is_available():
            raise _MissingError(
                f"no record of {accuracy.defense} on {bench.dataset_name} at scale {bench.scale}, and no CUDA device to measure it: "
                "run on a machine with one, or put records into the folder of --records"
            )
        try:
            # Only this may be missing; a mistake in a claim must fail.
            _ = bench.dataset
        except UserError as error:
            raise _MissingError(str(error)) from error
        return bench.find(accuracy, seed)

    return find


def _compare(settlement: Settlement) -> None:
    standing = settlement.standing
    outcome = f"{settlement.verdict}, {settlement.status}: {settlement.estimate}; under the strongest attack {settlement.strongest}"
    if not settlement.as_stood_by:
        stood = f"{' or '.join(standing.verdicts)}, {' or '.join(standing.status)}"
        pytest.fail(f"{settlement.claim.name} on {settlement.dataset} came to {outcome}; the project stands by {stood}", pytrace=False)
    if standing.because:
        # A strict expected failure: anything else than this very outcome has failed above.
        pytest.xfail(f"{outcome}. {standing.because}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of verdicts."""
    settled = config.stash[SETTLED]
    if path := config.getoption("--json"):
        write_atomic(path, verdicts.as_json(settled))
    if not settled:
        return
    console = Console(width=160, force_terminal=False)
    with console.capture() as capture:
        console.print(verdicts.as_table(settled))
    terminalreporter.write_line("")
    terminalreporter.write(capture.get())
