"""At a checkpoint, what a person gives of the optimizer is never silently replaced by the state of before."""

from pathlib import Path

import pytest
import torch

from bilevel_lightning.cli import fit

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
QUICK = [f"--trainer.{name}=false" for name in ("enable_progress_bar", "enable_model_summary")]
QUICK += ["--trainer.accelerator=cpu", "--trainer.callbacks=CleaningReport", "--trainer.callbacks.steps=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(folder, steps, *args):
    """Trains; returns the checkpoint at the end, and its path."""
    fit([*args, *QUICK, f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}"])
    (path,) = Path(folder).rglob("*.ckpt")
    return torch.load(path, weights_only=True), str(path)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Two iterations, with some settings."""
    done = {}

    def trained(*args):
        if args not in done:
            small = ["--config", "hyper_cleaning/digits_trhg", "--config", str(TINY)]
            done[args] = run(tmp_path_factory.mktemp("first"), 2, *small, *args)
        return done[args]

    return trained


def group(checkpoint):
    (optimizer,) = checkpoint["optimizer_states"]
    (settings,) = optimizer["param_groups"]
    return settings, optimizer["state"].get(0, {})


def test_a_step_has_the_size_that_is_given_now(first):
    """The third step of gradient descent, at the same hypergradient, once with .3 and once with .7."""
    start, path = first("--model.upper_optimizer=SGD", "--model.upper_optimizer.lr=0.3")
    same, _ = run("same", 3, "--ckpt_path", path)
    other, _ = run("other", 3, "--ckpt_path", path, "--model.upper_optimizer.lr=0.7")
    x, a, b = (checkpoint["state_dict"]["task.upper.logits"] for checkpoint in (start, same, other))
    assert (a - x).abs().max() > 1e-5
    torch.testing.assert_close(b - x, (a - x) * 0.7 / 0.3, rtol=1e-3, atol=1e-7)
    assert group(other)[0]["lr"] == 0.7


EXPONENTIAL = ("--model.upper_scheduler=torch.optim.lr_scheduler.ExponentialLR", "--model.upper_scheduler.gamma=0.5")
POWER = ("--model.upper_scheduler=Power", "--model.upper_scheduler.initial=1", "--model.upper_scheduler.exponent=-1")

POWER_OF_RETRAINING = ("--model.scheduler.initial=1", "--model.scheduler.exponent=-1")


@pytest.mark.parametrize(
    ("before", "now", "lr", "kept"),
    [
        ((), ("--model.upper_optimizer.lr=0.7",), 0.7, True),
        ((), ("--model.upper_optimizer.amsgrad=true",), 0.3, False),
        ((), ("--model.upper_optimizer=RMSprop", "--model.upper_optimizer.lr=0.2"), 0.2, False),
        ((), EXPONENTIAL, 0.3 * 0.5**4, True),
        (EXPONENTIAL, (), 0.3 * 0.5**4, True),
        (EXPONENTIAL, ("--model.upper_scheduler.gamma=0.9",), 0.3 * 0.9**4, True),
        (EXPONENTIAL, ("--model.upper_optimizer.lr=0.8",), 0.8 * 0.5**4, True),
        (EXPONENTIAL, ("--model.upper_scheduler=null",), 0.3, True),
        (EXPONENTIAL, POWER, 0.3 / 5, True),
        (POWER, ("--model.upper_scheduler.exponent=-2",), 0.3 / 25, True),
    ],
)
def test_the_optimizer_and_its_schedule_are_those_given_now(first, before, now, lr, kept):
    _, path = first("--model.upper_optimizer.lr=0.3", *before)
    settings, state = group(run("second", 4, "--ckpt_path", path, *now)[0])
    assert settings["lr"] == pytest.approx(lr)
    assert int(state["step"]) == (4 if kept else 2)  # how long the optimizer remembers


def test_patience_is_the_one_given_now():
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/auroc"]
    stopping += ["--trainer.callbacks.strict=false"]  # Lightning looks for the metric before the first new iteration
    small = ["--config", "hyper_cleaning/digits_trhg", "--config", str(TINY)]
    resumed = []
    for folder, steps, patience in (("first", 2, 3), ("second", 3, 9)):
        end = [f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}"]
        fit([*small, *QUICK, *stopping, f"--trainer.callbacks.patience={patience}", *end, *resumed])
        (path,) = map(str, Path(folder).rglob("*.ckpt"))
        resumed = ["--ckpt_path", path]
        states = torch.load(path, weights_only=True)["callbacks"]
        (state,) = [value for name, value in states.items() if name.startswith("EarlyStopping")]
        assert state["patience"] == patience


def test_weights_alone_are_no_run_to_go_on_from(capsys):
    small = ["--config", "hyper_cleaning/digits_trhg", "--config", str(TINY)]
    weights = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true"]
    fit([*small, *QUICK, *weights, "--trainer.max_steps=1", "--trainer.default_root_dir=first"])
    (path,) = map(str, Path("first").rglob("*.ckpt"))
    with pytest.raises(SystemExit) as end:
        run("second", 2, "--ckpt_path", path)
    assert end.value.code == 2
    assert "error: Trying to restore optimizer state but checkpoint contains only the model" in capsys.readouterr().err


def test_retraining():
    """With a longer run half a cosine becomes longer, and with another optimizer the step sizes are its own."""
    small = ["--model.channels=4", "--model.layers=3", "--data.train_samples=20", "--data.batch_size=10"]
    quick = [*QUICK[:3], "--trainer.max_epochs=-1", "--trainer.log_every_n_steps=1"]
    ends = {}
    for folder, steps, args in (
        ("first", 2, ["--config", "nas/digits_retrain", "--model.genotype=random", *small]),
        ("longer", 4, []),
        ("other", 4, ["--model.optimizer.lr=0.5", "--model.scheduler=Power", *POWER_OF_RETRAINING]),
    ):
        resumed = ["--ckpt_path", str(next(Path("first").rglob("*.ckpt")))] if ends else []
        fit([*resumed, *args, *quick, f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}"])
        ends[folder] = torch.load(next(Path(folder).rglob("*.ckpt")), weights_only=True)
    name = "network.classifier.weight"
    assert group(ends["first"])[0]["lr"] == 0
    assert not torch.equal(ends["longer"]["state_dict"][name], ends["first"]["state_dict"][name])
    assert group(ends["other"])[0]["lr"] == pytest.approx(0.5 / 5)
