import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from scipy.stats import kstest

from bilevel_lightning.cli import search, shipped_configs
from bilevel_lightning.cli.search import Search, parser
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.search import Space, Unusable, open_study, shipped_spaces, study, work

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SPACE = {
    "objective": {"metric": "val/accuracy", "direction": "maximize"},
    "report": ["report/learnt_weights", "val/upper_loss"],
    "settings": {
        "model.upper_optimizer.lr": {"log_uniform": ["1e-3", 1]},
        "model.dynamics.lr": {"log_uniform": [0.01, 1]},
    },
}
RUN = ["--config", "hyper_cleaning/digits_trhg", "--config", str(TINY), "--trainer.accelerator=cpu", "--space=s.yaml"]
RUN += ["--trainer.callbacks+=SuspiciousImages", "--trainer.callbacks.images=1"]  # drawing takes the time


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Studies are written below the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(yaml.safe_dump(SPACE))


def space(**parts):
    """Writes a space with other parts."""
    Path("s.yaml").write_text(yaml.safe_dump({**SPACE, **parts}))


def results(name="digits_trhg_s"):
    with (Path("runs/search") / name / "results.csv").open() as file:
        return list(csv.DictReader(file))


def failure(capsys, *args):
    with pytest.raises(SystemExit) as end:
        search([*args])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("bilevel-search: error: ")
    return line


# Spaces.


@pytest.mark.parametrize("name", shipped_spaces())
def test_shipped_spaces_fit_their_configs(name):
    text = (study.Path(__file__).parents[2] / "configs" / "search" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert yaml.safe_load(text)["config"] in shipped_configs()
    given, rest = parser().parse_known_args(["--space", name])
    this = Search(given, rest)
    assert this.description["the space's direction"] in ("minimize", "maximize")


ETA, X = {"model.dynamics.lr": ("log_uniform", (1e-4, 10))}, {"model.upper_optimizer.lr": ("log_uniform", (1e3, 1e9))}
RHO, TIME = {"model.linear_lr": ("log_uniform", (1e-4, 10))}, ("int_log_uniform", (10, 10_000))
FALLS = {"model.dynamics.lr.initial": ETA["model.dynamics.lr"], "model.dynamics.lr.halving": ("log_uniform", (10, 1e4))}
T, K = {"model.lower_steps": TIME}, {"model.linear_steps": TIME}
SIZE = {"data.lower_batch_size": ("int_log_uniform", (90, 45_000))}
PUBLISHED = {  # the released script's eight: ranges; warm starts of y and v; T, K and J where they are fixed
    "bsgm": ({**X, **FALLS, **T}, (False, False), {}),  # bioptgammawsno
    "bsgm_constant": ({**X, **ETA, **T}, (False, False), {}),  # bioptwsno
    "bsgm_warm": ({**X, **ETA, **T}, (True, True), {}),  # bioptwsyes
    "stocbio": ({**X, **ETA, **RHO, **T, **K}, (True, False), {}),  # stochbio
    "stocbio_batch": ({**X, **ETA, **RHO, **T, **K, **SIZE}, (True, False), {"J": 1}),  # stochbiobs90
    "alset": ({**X, **ETA, **RHO, **K}, (True, False), {"T": 1, "J": 1}),  # alset
    "single_loop": ({**X, **ETA, **RHO}, (True, True), {"T": 1, "K": 1, "J": 1}),  # alsetwslinv2
    "deterministic": ({**X, **ETA}, (True, True), {"T": 1, "K": 1, "J": 1}),  # bioptdetwsv2
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_searches_have_their_ranges_and_rows(name):
    ranges, warm, fixed = PUBLISHED[name]
    given, rest = parser().parse_known_args(["--space", f"poisoning_{name}"])
    this = Search(given, rest)
    assert {n: (r.kind, r.values) for n, r in this.space.settings.items()} == ranges
    assert (this.space.metric, this.space.direction) == ("report/poisoned_images/val_accuracy", "minimize")
    found = {n.removeprefix("model.init_args."): value for n, value in this.description.items()}  # with the low ends
    assert found["model.class_path"].endswith("BSGM")
    assert found["linear_start"] == "rhs"
    assert (found["warm_start"], found["warm_start_linear"]) == warm
    searched = {"T": 10, "K": 10 if "model.linear_steps" in ranges else None, "J": None}  # None: as many as before
    names = {"T": "lower_steps", "K": "linear_steps", "J": "cross_samples"}
    assert {n: found[names[n]] for n in names} == {**searched, **fixed}
    assert found["linear_lr"] == (1e-4 if RHO.keys() <= ranges.keys() else None)  # None: the lower step size
    assert found["data.init_args.lower_batch_size"] == (None if name == "deterministic" else 90)
    callbacks = {c["class_path"].split(".")[-1]: c["init_args"] for c in found["trainer.callbacks"]}
    assert callbacks["SampleBudget"]["samples"] == 2e6


def test_there_are_no_other_published_searches():
    assert {n for n in shipped_spaces() if n.startswith("poisoning_")} == {f"poisoning_{n}" for n in PUBLISHED}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"settings": {"a.lr": {"log_uniform": [0, 1]}}}, "a.lr: log_uniform needs positive ends, got [0, 1]."),
        ({"settings": {"a.lr": {"uniform": [2, 1]}}}, "a.lr: uniform needs a lower and then a higher finite end"),
        (
            {"settings": {"a.lr": {"uniform": [1, float("inf")]}}},
            "a.lr: uniform needs a lower and then a higher finite",
        ),
        ({"settings": {"a.T": {"int_log_uniform": [1, 2.5]}}}, "a.T: int_log_uniform needs two whole numbers"),
        ({"settings": {"a.lr": {"uniform": [1]}}}, "a.lr: uniform needs two numbers, got [1]."),
        ({"settings": {"a.lr": {"uniform": 1}}}, "a.lr: uniform needs a list, got 1."),
        ({"settings": {"a.lr": {"normal": [0, 1]}}}, "a.lr must have one of uniform, log_uniform"),
        ({"settings": {"a.lr": 0.1}}, "a.lr must have one of uniform, log_uniform"),
        ({"settings": {"a.lr": {"choice": []}}}, "a.lr: choice needs a list"),
        ({"settings": {}}, "settings must name at least one setting"),
        (
            {"settings": {"a.lr": {"uniform": [0, 1]}, "b": {"tied": "c"}}},
            "b is tied to c, which has no range of its own.",
        ),
        ({"ranges": {}}, "there is no ranges."),
        ({"objective": {"metric": "val/accuracy"}}, "objective must have metric"),
        ({"objective": {"metric": "val/accuracy", "direction": "up"}}, "must be minimize or maximize, got up."),
        ({"objective": {"metric": "test/accuracy", "direction": "maximize"}}, "test/accuracy is measured on test data"),
        ({"objective": {"metric": "report/x", "direction": "maximize"}}, "report/x is measured on test data"),
    ],
)
def test_wrong_spaces(parts, message):
    space(**parts)
    with pytest.raises(BilevelError) as error:
        Space.load("s.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("--space s.yaml: ")


def draws(number, settings, seed=0, sampler="random"):
    """Returns the values of many trials."""
    found = Space.read("s", {**SPACE, "settings": settings})
    memory = optuna.create_study(sampler=study.ByNumber(study.SAMPLERS[sampler], seed))
    return [found.suggest(memory.ask()) for _ in range(number)]


def test_values_have_the_distribution_of_the_space():
    settings = {
        "lr": {"log_uniform": [1e-4, 10]},
        "T": {"int_log_uniform": [10, 10_000]},
        "m": {"uniform": [0, 0.5]},
        "v": {"tied": "lr"},
        "kind": {"choice": ["a", {"class_path": "B"}, None]},
    }
    found = draws(300, settings)
    assert kstest([d["lr"] for d in found], lambda v: (study.np.log10(v) + 4) / 5).pvalue > 0.01
    assert kstest([d["T"] for d in found], lambda v: study.np.log10(v / 10) / 3).pvalue > 0.01
    assert kstest([d["m"] for d in found], lambda v: v / 0.5).pvalue > 0.01
    assert all(d["v"] == d["lr"] and isinstance(d["T"], int) and 10 <= d["T"] <= 10_000 for d in found)
    assert {d["kind"] for d in found} == {"a", '{"class_path": "B"}', None}
    assert abs(study.np.corrcoef([d["lr"] for d in found[:-1]], [d["lr"] for d in found[1:]])[0, 1]) < 0.15
    assert found[:5] == draws(5, settings)  # by number and seed alone
    assert found[0] != draws(1, settings, seed=1)[0]


# Workers.


def begin(url, **settings):
    common = {"name": "s", "direction": "minimize", "description": {}, "sampler": "random", "pruner": "none", "seed": 0}
    return open_study(url=url, **{**common, **settings})


POSTGRES = os.environ.get("BILEVEL_POSTGRES_URL")  # a data base for tests, where there is one


@pytest.fixture(params=["sqlite:///s.db", "journal:s.log", *([POSTGRES] if POSTGRES else [])])
def url(request):
    if request.param == POSTGRES and "s" in optuna.get_all_study_names(POSTGRES):
        optuna.delete_study(study_name="s", storage=POSTGRES)
    return request.param


def parabola(trial):
    return (trial.suggest_float("x", -1, 1) - 0.3) ** 2


def test_trials_are_those_of_the_study_and_failures_are_recorded(url):
    def run(trial):
        value = parabola(trial)
        if trial.number == 1:
            raise BilevelError("y is inf in norm: the run has\ndiverged.")
        if trial.number == 2:
            raise ZeroDivisionError("a bug")
        if trial.number == 3:
            trial.report(value, 7)
            raise optuna.TrialPruned
        return value

    said = []
    work(begin(url), 6, run, say=lambda trial: said.append(trial.number))
    work(begin(url), 6, run)  # joins when all is done
    trials = begin(url).trials
    assert said == [0, 1, 2, 3, 4, 5] == [t.number for t in trials]
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "FAIL", "PRUNED", "COMPLETE", "COMPLETE"]
    assert trials[1].user_attrs["reason"] == "y is inf in norm: the run has diverged."
    assert trials[2].user_attrs["reason"] == "ZeroDivisionError: a bug"
    work(begin(url), 8, run)
    assert len(begin(url).trials) == 8


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for sleeping and for what a test adds."""
    clock = SimpleNamespace(now=time.time() + 1)
    later = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(study, "time", SimpleNamespace(time=lambda: clock.now, sleep=later))
    return clock


def test_what_was_lost_with_its_process_is_done_again_with_the_same_values(url, clock):
    dead = begin(url).ask()
    dead.suggest_float("x", -1, 1)  # and never a word again
    waits, begun = [], clock.now
    work(begin(url), 3, parabola, grace=60, wait=waits.append)
    assert 58 < clock.now - begun < 62
    assert waits == [1]
    trials = begin(url).trials
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert trials[3].params == trials[0].params
    assert study.origin(trials[3]) == 0
    assert study.lost(trials) == {0}
    assert [t.number for t in study.counted(begin(url))] == [1, 2, 3]


def test_a_trial_that_ends_its_process_each_time_is_given_up(url):
    for _ in range(study.ATTEMPTS):
        this = begin(url)
        this.ask().suggest_float("x", -1, 1)
        (running,) = this.get_trials(states=(TrialState.RUNNING,))
        study.again(this, running)
        study.again(begin(url), running)  # another worker that saw it too
    trials = begin(url).trials
    assert [t.state.name for t in trials] == ["FAIL"] * 3
    assert len({t.params["x"] for t in trials}) == 1
    assert [t.number for t in study.counted(begin(url))] == [2]


def test_living_trials_are_left_alone(url, clock):
    trial = begin(url).ask()
    with study.Alive(trial, 0.02):
        clock.now += 100
        while begin(url).trials[0].user_attrs["alive"] < clock.now:
            time.sleep(0.02)
        study.recover(begin(url), 60)
        assert begin(url).trials[0].state == TrialState.RUNNING
    clock.now += 59
    study.recover(begin(url), 60)
    assert begin(url).trials[0].state == TrialState.RUNNING
    clock.now += 2
    study.recover(begin(url), 60)
    assert begin(url).trials[0].state == TrialState.FAIL


def test_a_trial_taken_for_lost_does_not_end_its_worker(url):
    def slow(trial):
        if trial.number == 0:
            study.again(begin(url), begin(url).trials[0])
        return parabola(trial)

    work(begin(url), 2, slow)
    trials = begin(url).trials
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.origin(trials[1]) == 0


def test_workers_that_ask_at_once_do_not_exceed_the_total(url, monkeypatch):
    mine, other = begin(url), begin(url)
    ask = mine.ask

    def late():
        if len(mine.trials) == 1:
            other.tell(other.ask(), 0.0)  # between the count and the question
        return ask()

    monkeypatch.setattr(mine, "ask", late)
    work(mine, 2, parabola)
    assert len(study.counted(mine)) == 2
    assert [t.state.name for t in mine.trials] == ["COMPLETE", "COMPLETE", "FAIL"]


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (SystemExit, KeyboardInterrupt)])
def test_a_person_may_interrupt(url, error, raised):
    def run(trial):
        parabola(trial)
        if trial.number == 1:
            raise error
        return 0.0

    with pytest.raises(raised):
        work(begin(url), 3, run)
    work(begin(url), 3, run)
    trials = begin(url).trials
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[2].params == trials[1].params


def test_mistakes_that_every_trial_would_repeat_end_the_search(url):
    def run(trial):
        raise Unusable("no such metric")

    with pytest.raises(Unusable):
        work(begin(url), 3, run)
    assert [t.state.name for t in begin(url).trials] == ["FAIL", "WAITING"]


def test_a_study_is_not_continued_with_other_settings(url):
    begin(url, description={"model.lower_steps": 5, "a": [1]})
    begin(url, description={"a": [1], "model.lower_steps": 5})
    with pytest.raises(BilevelError, match=r"--study s was begun with model.lower_steps=5, and here it is 7"):
        begin(url, description={"model.lower_steps": 7, "a": [1]})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nothing://x", "--storage nothing://x cannot be opened: .*"),
        ("journal:/nowhere/x.log", "--storage journal:/nowhere/x.log cannot be opened: .*"),
        (
            "mysql://u:p@h/d",
            "--storage mysql://u:...@h/d needs the data base driver mysqldb: pip install mysqlclient, or",
        ),
        (
            "postgresql+asyncpg://u:p@h/d",
            "--storage postgresql.asyncpg://u:...@h/d needs the data base driver asyncpg: pip install asyncpg, or",
        ),
    ],
)
def test_storages_that_cannot_be_opened(wrong, message):
    with pytest.raises(BilevelError, match=message):
        begin(wrong)


# The command.


def test_a_search_from_the_command_line(capsys):
    search([*RUN, "--trials=2", "--seed=4"])
    out = capsys.readouterr().out
    assert "2 trials: 2 complete, 0 pruned, 0 failed" in out
    rows = results()
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert {row["trial"] for row in rows} == {"0", "1"}
    values = [float(row["val/accuracy"]) for row in rows]
    assert values == sorted(values, reverse=True)
    for row in rows:
        folder = Path(row["folder"])
        assert folder == Path(f"runs/search/digits_trhg_s/version_{row['trial']}")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        init = config["model"]["init_args"]
        assert init["dynamics"]["init_args"]["lr"] == pytest.approx(float(row["model.dynamics.lr"]), rel=1e-12)
        assert config["seed_everything"] == 0
        with (folder / "metrics.csv").open() as file:
            logged = list(csv.DictReader(file))
        for name in ("val/accuracy", "report/learnt_weights", "val/upper_loss"):
            assert float(row[name]) == float([line[name] for line in logged if line[name]][-1])
        assert int(row["samples"]) == float([line["oracle/samples"] for line in logged if line["oracle/samples"]][-1])
        assert row["iterations"] == "2"
        assert "clean samples only (oracle)" in (folder / "output.txt").read_text()
    for name in ("history", "slices"):
        assert (folder.parent / f"{name}.png").stat().st_size > 5000
    assert (folder.parent / "importances.png").exists() == (len(set(values)) > 1)
    assert not [*folder.parent.glob(".*")]
    assert len(capsys.readouterr().out) == 0

    search([*RUN, "--trials=2", "--seed=4"])  # nothing is left to do
    assert results() == rows
    assert capsys.readouterr().out.count("complete") == 3
    message = failure(capsys, *RUN, "--trainer.max_steps=3")
    assert "--study digits_trhg_s was begun with trainer.max_steps=2, and here it is 3" in message
    space(settings={"model.dynamics.lr": {"log_uniform": [0.02, 1]}})
    assert "was begun with the space's settings.model.dynamics.lr.log_uniform=[0.01, 1.0]" in failure(capsys, *RUN)


def test_diverged_and_crashed_trials_and_own_seeds(capsys):
    space(settings={"model.dynamics.lr": {"choice": [0.1, 3e38, 1e39]}})  # the last one is no float32
    search([*RUN, "--trials=5", "--own_seeds", "--sampler=random", "--storage=journal:j.log", "--study=a/b"])
    rows = results("a/b")
    found = {row["model.dynamics.lr"]: row for row in rows}
    good, diverged, crashed = found["0.1"], found["3e+38"], found["1e+39"]
    assert len(rows) == 5
    assert good["state"] == "complete"
    assert diverged["state"] == crashed["state"] == "fail"
    assert "diverged" in diverged["reason"]
    assert crashed["reason"].startswith("RuntimeError: ")
    assert "Traceback" in (Path(crashed["folder"]) / "output.txt").read_text()
    assert not diverged["rank"] + diverged["val/accuracy"] + crashed["val/accuracy"]
    assert "diverged" in capsys.readouterr().out
    for row in rows:
        config = yaml.safe_load((Path(row["folder"]) / "config.yaml").read_text())
        assert config["seed_everything"] == int(row["trial"])


def test_pruned_trials_end_at_a_validation(monkeypatch):
    monkeypatch.setitem(study.PRUNERS, "median", lambda: optuna.pruners.ThresholdPruner(lower=2.0))
    search([*RUN, "--trials=1"])
    (row,) = results()
    assert (row["state"], row["iterations"], row["rank"]) == ("pruned", "1", "")
    assert 0 <= float(row["val/accuracy"]) <= 1
    assert row["val/upper_loss"]


def test_mistakes_end_in_one_message(capsys):
    assert "--space is missing: a file or a shipped space: cleaning, " in failure(capsys)
    assert "--space nothing is neither a file nor a shipped space" in failure(capsys, "--space=nothing")
    assert "--config is missing, and the space s.yaml names none." in failure(capsys, "--space=s.yaml")
    assert "--trials and --grace must be at least 1" in failure(capsys, *RUN, "--trials=0")
    assert "--study '../x' must be a name" in failure(capsys, *RUN, "--study=../x")
    assert "argument --sampler: invalid choice: 'best'" in failure(capsys, *RUN, "--sampler=best")
    assert "has no setting lower_stepz" in failure(capsys, *RUN, "--model.lower_stepz=3")
    message = "--model.dynamics.lr is searched by the space s.yaml"
    assert message in failure(capsys, *RUN, "--model.init_args.dynamics.init_args.lr=0.1")
    assert "set trainer.devices=1" in failure(capsys, *RUN, "--trainer.devices=2", "--trainer.strategy=ddp_spawn")
    space(settings={"model.dynamics.lrr": {"uniform": [0, 1]}})
    assert "has no setting lrr" in failure(capsys, *RUN)
    space(settings={"model.lower_steps": {"uniform": [1.5, 2]}})
    assert "lower_steps" in failure(capsys, *RUN)
    space(objective={"metric": "val/acuracy", "direction": "maximize"})
    message = failure(capsys, *RUN, "--study=m")
    assert "objective.metric val/acuracy is not logged by this run; logged are " in message
    assert "val/accuracy" in message
    space(objective={"metric": "loss", "direction": "minimize"})
    assert "objective.metric loss is not logged by this run" in failure(capsys, *RUN, "--study=n")


def test_two_workers_killed_in_the_middle_and_resumed():
    command = [sys.executable, "-c", "from bilevel_lightning.cli import search; search()"]
    args = [*RUN, "--grace=5", "--sampler=random", "--pruner=none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(study.__file__).parents[2])}
    url = "sqlite:///runs/search/digits_trhg_s/study.db"
    workers = [subprocess.Popen([*command, *args, "--trials=1000"], env=environment) for _ in range(2)]

    def trials():
        return optuna.load_study(study_name=None, storage=url).trials

    try:
        until = time.time() + 300
        while not Path("runs/search/digits_trhg_s/version_1").exists():
            assert time.time() < until
            time.sleep(0.05)
        while len({t.user_attrs.get("worker") for t in trials() if t.state == TrialState.COMPLETE}) < 2:
            assert time.time() < until
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
    running = [t for t in trials() if t.state == TrialState.RUNNING]
    total = len(study.counted(optuna.load_study(study_name=None, storage=url)))
    assert running
    assert total >= 3

    search([*args, f"--trials={total + 1}"])
    rows = results()
    assert len(rows) == total + 1
    assert all(row["state"] == "complete" for row in rows)
    assert not {row["trial"] for row in rows} & {str(t.number) for t in running}
    values = {row["model.dynamics.lr"] for row in rows}
    assert len(values) == total + 1  # no worker drew what another had drawn
    assert {str(t.params["model.dynamics.lr"]) for t in running if t.params} <= values
