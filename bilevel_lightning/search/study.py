"""Workers on one study: exactly so many trials, none of them lost with a process."""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from typing_extensions import override

from bilevel_lightning.errors import BilevelError

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: RandomSampler(seed=seed),
    # trials that other workers are at count as bad, so that nobody does them twice
    "tpe": lambda seed: TPESampler(seed=seed, constant_liar=True),
}
PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "none": NopPruner,
    "median": MedianPruner,
    "halving": SuccessiveHalvingPruner,
}
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "mysqldb": "mysqlclient"}
"""Where a driver's package has another name."""
ATTEMPTS = 3  # a trial whose process ends each time is given up


class Unusable(BilevelError):  # noqa: N818 (it says what happened)
    """What no other value of the searched settings would mend: the search ends."""


class ByNumber(BaseSampler):
    """Samples each trial with a sampler of its own, whose seed is the search's and the trial's number.

    Workers with one seed would else draw the same values, and a search that goes on would draw its first ones again.

    Args:
        make: gives a sampler for a seed.
        seed: of the search.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self.make, self.seed = make, seed
        self.sampler = make(seed)

    @override
    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.sampler = self.make(int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0]))
        self.sampler.before_trial(study, trial)

    @override
    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return self.sampler.infer_relative_search_space(study, trial)

    @override
    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self.sampler.sample_relative(study, trial, search_space)

    @override
    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self.sampler.sample_independent(study, trial, param_name, param_distribution)

    @override
    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self.sampler.after_trial(study, trial, state, values)


def storage(url: str) -> BaseStorage:
    """Opens a data base, or with ``journal:PATH`` a journal file.

    Raises:
        BilevelError: if it cannot be opened.
    """
    try:
        if url.startswith("journal:"):
            return JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
        if not url.startswith("sqlite:"):
            return RDBStorage(url)
        return _sqlite(url)
    except ImportError as error:
        driver = make_url(url).get_dialect().driver  # of postgresql:// psycopg or psycopg2, by SQLAlchemy's version
        package = DRIVERS.get(driver, driver)
        raise BilevelError(
            f"--storage {shown(url)} needs the data base driver {driver}: pip install {package}, or name one that is "
            "installed, as in postgresql+psycopg2://..."
        ) from error
    except Exception as error:
        raise BilevelError(f"--storage {shown(url)} cannot be opened: {' '.join(str(error).split())}") from error


def shown(url: str) -> str:
    """Returns a URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:...@", url)


def _sqlite(url: str, attempts: int = 20) -> RDBStorage:
    """Opens a file, which another worker may be about to create."""
    try:
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    except Exception:
        if attempts == 1:
            raise
    time.sleep(0.25)
    return _sqlite(url, attempts - 1)


def open_study(
    name: str,
    url: str,
    direction: Literal["minimize", "maximize"],
    description: Mapping[str, Any],
    sampler: str,
    pruner: str,
    seed: int,
) -> optuna.Study:
    """Begins a study, or joins it.

    Args:
        name: of the study.
        url: of the storage.
        direction: ``minimize`` or ``maximize``.
        description: what all trials of the study must have in common, as plain values by dotted names.
        sampler: key of `SAMPLERS`.
        pruner: key of `PRUNERS`.
        seed: of the sampler.

    Raises:
        BilevelError: if the study was begun with something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name=name,
        storage=storage(url),
        direction=direction,
        sampler=ByNumber(SAMPLERS[sampler], seed),
        pruner=PRUNERS[pruner](),
        load_if_exists=True,
    )
    text = {key: json.dumps(value, sort_keys=True) for key, value in description.items()}
    before = study.user_attrs.get("description")
    if before is None:
        study.set_user_attr("description", text)
        return study
    for key in [*text, *before]:
        if before.get(key) != text.get(key):
            raise BilevelError(
                f"--study {name} was begun with {key}={before.get(key)}, and here it is {text.get(key)}: go on with "
                "the same, or name another --study."
            )
    return study


def lost(trials: Sequence[FrozenTrial]) -> set[int]:
    """Returns the numbers of the trials that were lost with their process and are done again."""
    return {trial.user_attrs["attempts"][-1] for trial in trials if trial.user_attrs.get("attempts")}


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials that count: not those done again, nor those that came when all were taken."""
    trials = study.get_trials(deepcopy=False)
    without = lost(trials)
    return [t for t in trials if t.number not in without and "surplus" not in t.user_attrs]


def origin(trial: Trial | FrozenTrial) -> int:
    """Returns the number of the trial that this one does again, or its own."""
    attempts: list[int] = trial.user_attrs.get("attempts") or [trial.number]
    return attempts[0]


class Alive:
    """Signs of life of a trial, in its user attribute ``alive``, while the context lasts.

    Args:
        trial: the trial.
        every: seconds between two signs.
    """

    def __init__(self, trial: Trial, every: float) -> None:
        self.trial, self.every = trial, every
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # others took it for lost
            while not self.over.wait(self.every):
                self.trial.set_user_attr("alive", time.time())

    def __enter__(self) -> None:
        self.trial.set_user_attr("alive", time.time())
        self.trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


def again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Marks a running trial as failed and queues its values once more, unless another worker has done so."""
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return
    attempts = [*trial.user_attrs.get("attempts", []), trial.number]
    if len(attempts) < ATTEMPTS:
        study.enqueue_trial(trial.params, user_attrs={"attempts": attempts})


def recover(study: optuna.Study, grace: float) -> None:
    """Does `again` what has given no sign of life for ``grace`` seconds."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        if time.time() - trial.user_attrs.get("alive", begun) > grace:
            again(study, trial)


def attempt(study: optuna.Study, trial: Trial, run: Callable[[Trial], float], grace: float) -> FrozenTrial:
    """Runs one trial and stores how it ended; what goes wrong in it is stored as its ``reason``.

    Raises:
        Unusable: if no trial could succeed.
        KeyboardInterrupt: if a person ends the search; the trial is queued once more.
    """
    state, value, reason = TrialState.FAIL, None, ""
    with Alive(trial, grace / 6):
        try:
            value = run(trial)
            state = TrialState.COMPLETE
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except (KeyboardInterrupt, SystemExit, Unusable) as error:
            again(study, study.get_trials(deepcopy=False)[trial.number])
            raise error if isinstance(error, Unusable) else KeyboardInterrupt from error
        except Exception as error:
            kind = "" if isinstance(error, BilevelError) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())
        if reason:
            trial.set_user_attr("reason", reason[:2000])
    return study.tell(trial, value, state, skip_if_finished=True)


def work(
    study: optuna.Study,
    total: int,
    run: Callable[[Trial], float],
    grace: float = 60,
    say: Callable[[FrozenTrial], None] = lambda trial: None,
    wait: Callable[[int], None] = lambda running: None,
) -> None:
    """Runs trials until the study has ``total`` of them, over all its workers, and none of them is running.

    A trial without a sign of life is marked as failed and done again, with the same values, up to two times.

    Args:
        study: the study.
        total: number of trials of the study.
        run: runs a trial and returns its value.
        grace: seconds without a sign of life after which a trial counts as lost. Clocks of several machines may
            differ by less than this. Default 60.
        say: called with each trial that ended.
        wait: called with the number of running trials when nothing else is left to do.

    Raises:
        Unusable: if no trial could succeed.
        KeyboardInterrupt: if a person ends it.
    """
    waiting = False
    while True:
        recover(study, grace)
        states = [trial.state for trial in counted(study)]
        if TrialState.WAITING in states or len(states) < total:
            trial = study.ask()
            if sum(other.number < trial.number for other in counted(study)) >= total:  # two workers asked at once
                trial.set_user_attr("surplus", True)
                study.tell(trial, state=TrialState.FAIL)
                continue
            waiting = False
            try:
                say(attempt(study, trial, run, grace))
            except optuna.exceptions.UpdateFinishedTrialError:
                continue  # it was taken for lost, and is done again
        elif TrialState.RUNNING in states:
            if not waiting:
                wait(states.count(TrialState.RUNNING))
            waiting = True
            time.sleep(min(1.0, grace / 6))
        else:
            return


def folder(root: str | Path, name: str) -> Path:
    """Returns where a study's trials and results are written.

    Raises:
        BilevelError: if the name would lead elsewhere.
    """
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BilevelError(f"--study {name!r} must be a name, for a folder below {root}/search.")
    return Path(root) / "search" / name
