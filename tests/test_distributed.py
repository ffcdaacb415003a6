import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import hypergradients, worker

TINY = str(Path(__file__).parent / "configs" / "tiny.yaml")


def test_two_processes_with_half_the_batch_are_one_with_all_of_it(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    whole = hypergradients(torch.arange(12))
    for rank in (0, 1):
        for part, want in zip(torch.load(tmp_path / f"{rank}.pt"), whole, strict=True):
            for name, value in want.items():
                torch.testing.assert_close(part[name], value, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [[], ["--data.lower_batch_size=20", "--data.upper_batch_size=10"]])
def test_the_command_line_on_two_processes(tmp_path, batches):
    """The same weights from one process and from two under Lightning's DDP, in float64."""
    command = [
        sys.executable, "-m", "bilevel_lightning", "--config", "hyper_cleaning/digits_trhg", "--config", TINY, *batches,
        "--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.precision=64-true",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    states = []
    for name, extra in (("one", ["--trainer.devices=1"]), ("two", ["--trainer.devices=2", "--trainer.strategy=ddp"])):
        done = subprocess.run(
            [*command, *extra, f"--trainer.default_root_dir={name}"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("clean samples only") == 1
        (path,) = (tmp_path / name).rglob("*.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
    for name, value in states[0].items():
        assert value.dtype in (torch.float64, torch.int64)
        torch.testing.assert_close(states[1][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["MAML", "IAPTTGM"])
def test_episodes_on_two_processes(tmp_path, model):
    """Two processes of 2 episodes are one of 4: the same weights, the same mean and interval of all test episodes."""
    command = [
        sys.executable, "-m", "bilevel_lightning", "--config", "few_shot/sinusoid_maml", "--model", model,
        "--data.val_episodes=6", "--data.test_episodes=8", "--data.epoch_length=2", "--trainer.max_steps=4",
        "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu", "--trainer.precision=64-true",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    states, rows = [], []
    for name, extra in (
        ("one", ["--trainer.devices=1", "--data.episodes_per_batch=4", "--model.episodes_at_once=4"]),
        (
            "two",
            [
                "--trainer.devices=2", "--trainer.strategy=ddp", "--data.episodes_per_batch=2",
                "--model.episodes_at_once=1",
            ],
        ),
    ):  # fmt: skip
        done = subprocess.run(
            [*command, *extra, f"--trainer.default_root_dir={name}"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / name).rglob("*.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
        (metrics,) = (tmp_path / name).rglob("metrics.csv")
        with metrics.open() as file:
            rows.append(list(csv.DictReader(file)))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-10, atol=1e-12)
    for key in ("train/upper_loss", "train/hypergradient_norm", "val/mse", "val/mse_ci95", "test/mse", "test/mse_ci95"):
        one, two = ([float(row[key]) for row in found if row[key]] for found in rows)
        assert len(one) > 0
        assert two == pytest.approx(one, rel=1e-5), key


@pytest.mark.slow
def test_stored_states_on_two_processes(tmp_path):
    """Two processes with half of each minibatch store the states, and learn the weights, of one with all of it."""
    command = [
        sys.executable, "-m", "bilevel_lightning", "--config", "equilibrium/digits", "--model.task.stored_states=1000",
        "--data.epoch_length=12", "--data.evaluation_batch_size=60", "--trainer.max_steps=12",
        "--trainer.accelerator=cpu", "--trainer.precision=64-true",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    states, rows = [], []
    for name, extra in (("one", ["--trainer.devices=1"]), ("two", ["--trainer.devices=2", "--trainer.strategy=ddp"])):
        done = subprocess.run(
            [*command, *extra, f"--trainer.default_root_dir={name}"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / name).rglob("*.ckpt")
        states.append(torch.load(path, weights_only=True)["state_dict"])
        (metrics,) = (tmp_path / name).rglob("metrics.csv")
        with metrics.open() as file:
            rows.append(list(csv.DictReader(file)))
    assert states[0]["task.stored"].abs().amax(1).all()
    one, two = (state.pop("oracles") for state in states)
    assert torch.equal(one[-1], two[-1])  # samples
    assert torch.equal(2 * one[:-1], two[:-1])  # of two problems
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-10, atol=1e-12)
    for key in ("val/accuracy", "val/accuracy_ci95", "val/hg_norm", "val/prox_map_norm", "test/upper_loss"):
        one, two = ([float(row[key]) for row in found if row[key]] for found in rows)
        assert two == pytest.approx(one, rel=1e-5)
