import csv
import json
import subprocess
import sys
from pathlib import Path

import contract
import processes
import pytest
import torch
from loops import trainer

from bilevel_lightning.cli import fit

TINY = str(Path(__file__).parent / "configs" / "tiny.yaml")
COMMON = [
    "--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.precision=64-true",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip
DIGITS = ["--config", "hyper_cleaning/digits_trhg", "--config", TINY, *COMMON]
MINIBATCHES = [*DIGITS, "--data.lower_batch_size=20", "--data.upper_batch_size=10"]


def episodes(model):
    return [
        "--config", "few_shot/sinusoid_maml", "--model", model, *COMMON, "--data.val_episodes=6",
        "--data.test_episodes=8", "--data.epoch_length=2", "--trainer.log_every_n_steps=1",
    ]  # fmt: skip


# a digits equilibrium whose states are stored by sample
STORED = [
    "--config", "equilibrium/digits", *COMMON, "--trainer.max_steps=12", "--model.task.stored_states=1000",
    "--data.epoch_length=12", "--data.evaluation_batch_size=60",
]  # fmt: skip


def alone(name, *more):
    return ["--trainer.devices=1", f"--trainer.default_root_dir={name}", *more]


def shared(name, *more):
    return ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.default_root_dir={name}", *more]


FOUR = ["--data.episodes_per_batch=4", "--model.episodes_at_once=4"]
TWO_EACH = ["--data.episodes_per_batch=2", "--model.episodes_at_once=1"]


def output(*command):
    """Returns what a command prints; it must succeed."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(name):
    (path,) = Path(name).rglob("*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def assert_same_weights(one, two, apart=()):
    """Compares checkpoints but for the names ``apart``."""
    one, two = ({name: t for name, t in weights(run).items() if name not in apart} for run in (one, two))
    for name, value in one.items():
        assert value.dtype in (torch.float64, torch.int64)
        torch.testing.assert_close(two[name], value, rtol=1e-10, atol=1e-12)


def logged(name):
    (metrics,) = Path(name).rglob("metrics.csv")
    with metrics.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of what two processes have found, of which this one is the second."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        first = torch.multiprocessing.spawn(processes.worker, (str(folder),), nprocs=1, join=False)
        processes.worker(1, str(folder))
        while not first.join():
            pass
    return folder


def test_two_processes_with_half_the_batch_are_one_with_all_of_it(pair):
    whole = processes.hypergradients(torch.arange(12))
    for rank in (0, 1):
        for part, want in zip(torch.load(pair / f"{rank}.pt"), whole, strict=True):
            for name, value in want.items():
                torch.testing.assert_close(part[name], value, rtol=1e-12, atol=1e-15)


def test_running_statistics_of_two_processes_are_those_of_one(pair):
    whole = processes.running_statistics(0, 6)
    for rank in (0, 1):
        for part, want in zip(torch.load(pair / f"statistics{rank}.pt"), whole, strict=True):
            assert part.keys() == want.keys()
            assert any(int(t.max()) > 0 for name, t in want.items() if name.endswith("num_batches_tracked"))
            for name, value in want.items():
                torch.testing.assert_close(part[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_the_command_line_on_two_processes(tmp_path, monkeypatch):
    """The same weights from one process and from two under Lightning's DDP, in float64."""
    monkeypatch.chdir(tmp_path)
    fit([*DIGITS, *alone("one")])
    assert output("-m", "bilevel_lightning", *DIGITS, *shared("two")).count("clean samples only") == 1
    assert_same_weights("one", "two")


@pytest.mark.slow
def test_spawned_processes_are_one_from_python_and_from_the_command_line(tmp_path, monkeypatch):
    """The module is pickled for them, with its default settings; afterwards it holds their values."""
    monkeypatch.chdir(tmp_path)
    whole, pair = contract.made("TRHG", "cleaning").double(), contract.made("TRHG", "cleaning").double()
    assert pair.upper_optimizer.__name__ == "<lambda>"
    for module, settings in ((whole, {}), (pair, {"strategy": "ddp_spawn", "devices": 2})):
        trainer(3, precision="64-true", **settings).fit(module, datamodule=contract.Patches())
    assert pair.task.upper.logits.any()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(pair.state_dict()[name], value, rtol=1e-10, atol=1e-12)
    fit([*MINIBATCHES, *alone("one")])
    fit([*MINIBATCHES, *shared("two"), "--trainer.strategy=ddp_spawn"])
    assert_same_weights("one", "two")


@pytest.mark.slow
def test_minibatches_and_episodes_on_two_processes(tmp_path, monkeypatch):
    """Two processes of 2 episodes are one of 4: the same weights, the same mean and interval of all test episodes.

    So are two with half of each minibatch of states, which are stored by sample.
    """
    monkeypatch.chdir(tmp_path)
    models = ("MAML", "IAPTTGM")
    fit([*MINIBATCHES, *alone("one")])
    for model in models:
        fit([*episodes(model), *alone(f"{model}/one", *FOUR)])
    fit([*STORED, *alone("stored/one")])
    runs = [[*episodes(model), *shared(f"{model}/two", *TWO_EACH)] for model in models]
    runs.append([*STORED, *shared("stored/two")])
    printed = output(processes.__file__, json.dumps([[*MINIBATCHES, *shared("two")], *runs]))
    assert printed.count("clean samples only") == 1
    assert_same_weights("one", "two")
    for model in models:
        assert_same_weights(f"{model}/one", f"{model}/two")
        rows = [logged(f"{model}/{name}") for name in ("one", "two")]
        for key in (
            "train/upper_loss", "train/hypergradient_norm", "val/mse", "val/mse_ci95", "test/mse", "test/mse_ci95",
        ):  # fmt: skip
            one, two = ([float(row[key]) for row in found if row[key]] for found in rows)
            assert len(one) > 0
            assert two == pytest.approx(one, rel=1e-5), (model, key)
    assert_same_weights("stored/one", "stored/two", ["oracles"])
    one, two = weights("stored/one"), weights("stored/two")
    assert one["task.stored"].abs().amax(1).all()
    assert torch.equal(one["oracles"][-1], two["oracles"][-1])  # samples
    assert torch.equal(2 * one["oracles"][:-1], two["oracles"][:-1])  # of two problems
    rows = [logged(f"stored/{name}") for name in ("one", "two")]
    for key in ("val/accuracy", "val/accuracy_ci95", "val/hg_norm", "val/prox_map_norm", "test/upper_loss"):
        one, two = ([float(row[key]) for row in found if row[key]] for found in rows)
        assert two == pytest.approx(one, rel=1e-5), key
