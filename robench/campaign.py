"""A campaign: makes the records of a plan in one process, in order of what settles most claims per minute, within a time budget.

Every record is written as soon as it is made. What a killed or stopped campaign had trained and attacked is in the cache, so that the
next one goes on from there and ends with the same records.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from robench import accuracies, attacks, claim, costs, data, duration, record, remaining, schedule, settlement, targets, zoo
from robench.claim import Accuracy, Claim
from robench.costs import Subject
from robench.data import Dataset
from robench.errors import OutOfTimeError
from robench.files import cache_folder
from robench.plan import Plan, attack_name, defense_name, threat_name
from robench.record import Record
from robench.schedule import Measurement, Work
from robench.workbench import Workbench


@dataclass(frozen=True)
class Goal:
    """A claim to be settled on one independently trained copy of its defenses, and the measurements that settle it."""

    claim: Claim
    seed: int
    needs: tuple[Measurement, ...]

    def __str__(self) -> str:
        return f"{self.claim.name} (seed {self.seed})" if self.seed else self.claim.name


def asked_for(plan: Plan) -> list[Measurement]:
    """Return the measurements that a plan's tables name."""
    return [
        Measurement(name, threat, attack, table.n or plan.examples, seed)
        for table in plan.measure
        for seed in range(plan.seeds)
        for name in table.names
        for threat in table.threats
        for attack in table.attacks
    ]


def goals(plan: Plan, bench: Workbench) -> list[Goal]:
    """Return the claims of a plan's data set and scale with all that the workbench says they need; none unless the plan asks for them."""
    if not plan.claims:
        return []
    terms: dict[tuple[str, int], list[Accuracy]] = {}
    named = {one.name: one for one in claim.discover() if _trials(one, plan)}
    for one in named.values():
        for seed in range(plan.seeds):
            terms[one.name, seed] = [accuracy for _, accuracy in one.trial(plan.dataset, plan.scale).quantity.terms]

    def needs(accuracy: Accuracy, seed: int) -> list[Measurement]:
        rows = [(defense_name(name), threat_name(threat), attack_name(attack)) for name, threat, attack in bench.needed(accuracy)]
        return [Measurement(name, threat, attack, plan.examples, seed) for name, threat, attack in rows]

    robust = [m for (_, seed), some in terms.items() for a in some if a.threat is not None for m in needs(a, seed)]
    pool = [*robust, *asked_for(plan)]

    def needs_of_clean(accuracy: Accuracy, seed: int) -> list[Measurement]:
        # Any record tells the clean accuracy: one that is there, or one that is to be made anyway.
        if bench.settled_by_records(accuracy, seed):
            return []
        own = [m for m in pool if (m.defense, m.seed) == (defense_name(accuracy.defense), seed) and m.n >= plan.examples]
        return own[:1] or needs(accuracy, seed)

    found = []
    for (name, seed), some in terms.items():
        all_needs = [m for a in some for m in (needs_of_clean(a, seed) if a.threat is None else needs(a, seed))]
        found.append(Goal(named[name], seed, tuple(dict.fromkeys(all_needs))))
    return found


def _trials(one: Claim, plan: Plan) -> bool:
    return any(trial.dataset == plan.dataset and plan.scale in trial.scales for trial in one.trials)


@dataclass
class Campaign:
    """A plan at work.

    Attributes:
        plan: what to measure.
        bench: where it is measured: the plan's data set, scale and examples, the known records, device and cache.
        folder: where each record is written.
        budget: seconds after which nothing is begun, and what is going on stops at its next epoch or chunk; None sets no end.
        echo: is told a line of what begins, what it came to, and which claims that settles.
        clock: gives seconds.
    """

    plan: Plan
    bench: Workbench
    folder: Path
    budget: float | None = None
    echo: Callable[[str], None] = lambda _line: None
    clock: Callable[[], float] = time.monotonic
    _failed: dict[Measurement, str] = field(default_factory=dict)
    _stages: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    _trained: set[str] = field(default_factory=set)
    _subjects: dict[str, Subject] = field(default_factory=dict)

    def run(self) -> int:
        """Measure until the plan is done or the budget is spent, and return the exit code: 1 if a measurement failed, else 0."""
        started = self.clock()
        self.bench.stop = lambda: self.budget is not None and self.clock() - started >= self.budget
        aims = goals(self.plan, self.bench)
        self._forget_mixed(aims)
        wanted = schedule.merged([*(m for goal in aims for m in goal.needs), *asked_for(self.plan)])
        missing = [m for m in wanted if not self._recorded(m)]
        settled = [goal for goal in aims if self._complete(goal)]
        claims = f", {len(settled)} of {len(aims)} claims settled" if aims else ""
        if not missing:
            self.echo(f"nothing to do: all {len(wanted)} measurements of the plan are recorded{claims}")
            return 0
        self.echo(f"{len(wanted) - len(missing)} of {len(wanted)} measurements recorded{claims}")
        while missing := [m for m in wanted if m not in self._failed and not self._recorded(m)]:
            work = self._work(missing)
            open_needs = {str(goal): [m for m in goal.needs if not self._recorded(m)] for goal in aims}
            ordered = schedule.order(work, open_needs)
            if self.bench.stop() or (ordered and not self._make(ordered[0], f"{len(wanted) - len(missing) + 1}/{len(wanted)}", work)):
                self.echo(
                    f"the budget is spent: {len(missing)} of {len(wanted)} measurements are left, "
                    f"about {duration.written(60 * schedule.minutes(work, work))}; the same command goes on from here"
                )
                break
            self._forget_mixed(aims)
            for goal in [goal for goal in aims if goal not in settled and self._complete(goal)]:
                settled.append(goal)
                self.echo(f"settled {len(settled)} of {len(aims)}: {self._verdict(goal)}")
        for m, reason in self._failed.items():
            self.echo(f"failed: {m}: {reason}")
        spent = duration.written(self.clock() - started)
        made = sum(self._recorded(m) for m in wanted)
        self.echo(
            f"{made} of {len(wanted)} measurements recorded{f', {len(settled)} of {len(aims)} claims settled' if aims else ''}; {spent}"
        )
        return 1 if self._failed else 0

    def _make(self, m: Measurement, number: str, work: Mapping[Measurement, Work]) -> bool:
        """Make one record and write it; return whether there was time for it. A failure is kept for the end."""
        expected, left = (duration.written(60 * schedule.minutes(some, work)) for some in ([m], work))
        self.echo(f"[{number}] {m}; about {expected} of {left} left")
        begun = self.clock()
        alike = [other for other in work if (other.defense, other.seed) == (m.defense, m.seed)]
        try:
            self.bench.target(m.defense, m.seed)
            self._trained.update(self._stages[m.defense, m.seed])
            # What fails from here on may concern this attack alone.
            alike = [m]
            made = self.bench.measured(m.defense, m.threat, m.attack, m.seed, m.n)
        except OutOfTimeError:
            return False
        except Exception as error:  # a plugin's code may fail in any way
            self._fail(alike, error)
            return True
        record.save(made, self.folder)
        self.echo(f"[{number}] robust accuracy ≤ {accuracies.robust_estimate(made)}; {duration.written(self.clock() - begun)}")
        return True

    def _forget_mixed(self, aims: Sequence[Goal]) -> None:
        """Have measured again what cannot settle a claim, since it is of other weights than the rest."""
        for goal in aims:
            groups: dict[str, list[tuple[str, str, str, int]]] = {}
            for m in goal.needs:
                groups.setdefault("" if goal.claim.one_network else m.defense, []).append((m.defense, m.threat, m.attack, m.seed))
            for needs in groups.values():
                self.bench.forget_mixed(needs)

    def _recorded(self, m: Measurement) -> bool:
        return self.bench.has(m.defense, m.threat, m.attack, m.seed, m.n)

    def _complete(self, goal: Goal) -> bool:
        return all(self._recorded(m) for m in goal.needs)

    def _verdict(self, goal: Goal) -> str:
        def find(accuracy: Accuracy, _seed: int) -> list[Record]:
            return settlement.matching(self.bench.records, accuracy, self.plan.dataset, self.plan.scale, goal.seed)

        try:
            came_to = settlement.settle(goal.claim, self.plan.dataset, self.plan.scale, find)
        except settlement.UnsettledError as error:
            return f"{goal}: not to be told: {error.args[0]}"
        return f"{goal}: {came_to.verdict}, {came_to.status}{'' if came_to.as_stood_by else ' (unexpected)'}"

    def _fail(self, measurements: Sequence[Measurement], error: Exception) -> None:
        reason = " ".join((str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}").split())
        self._failed.update(dict.fromkeys(measurements, reason))
        self.echo(f"failed: {reason}")

    def _work(self, missing: Sequence[Measurement]) -> dict[Measurement, Work]:
        """Return what each missing measurement should take; without those whose defense cannot even be built, which fail."""
        known = [r for r in self.bench.records if r.dataset.name == self.plan.dataset]
        found: dict[Measurement, Work] = {}
        for m in missing:
            if m in self._failed:
                continue
            try:
                subject, stages = self._subject(m.defense), self._stages_left(m.defense, m.seed)
            except Exception as error:  # as above
                self._fail([other for other in missing if other.defense == m.defense], error)
                continue
            own = costs.measuring(subject, attacks.parse(m.attack), m.n, known, self.bench.device, self.plan.scale)
            rate = costs.seconds_per_pass(m.defense, known, self.bench.device, self.plan.scale)
            found[m] = Work(own / 60, {key: passes * rate / 60 for key, passes in stages.items() if key not in self._trained})
        return found

    def _subject(self, name: str) -> Subject:
        if name not in self._subjects:
            defense = zoo.parse(name).build(targets.setting_for(self.bench.dataset, self.plan.scale, seed=0)).defense
            self._subjects[name] = Subject(name, len(defense.members()), defense.random)
        return self._subjects[name]

    def _stages_left(self, name: str, seed: int) -> dict[str, float]:
        """Return the passes of each stage that the defense lacked when it was first asked about, by the stage's key."""
        if (name, seed) not in self._stages:
            setting, cache = targets.setting_for(self.bench.dataset, self.plan.scale, seed), cache_folder(self.bench.cache)
            left = remaining.remaining(zoo.parse(name), setting, self._train_split, cache=cache, device=self.bench.device)
            self._stages[name, seed] = {stage.key: stage.passes for stage in left}
        return self._stages[name, seed]

    @cached_property
    def _train_split(self) -> Dataset:
        return data.load(self.plan.dataset, "train")
