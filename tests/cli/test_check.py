import re
from pathlib import Path

import pytest

from bilevel_lightning.cli import check, fit

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SMALL = ["--config", "hyper_cleaning/digits_trhg", "--config", str(TINY)]
REGULAR = ["--model.task.l2", "0.1", "--model.lower_steps", "100", "--model.truncation", "60"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Anything written would lie in an empty working folder."""
    monkeypatch.chdir(tmp_path)


def run(capsys, *args):
    """Returns the exit status, what was printed, and the lines of errors."""
    with pytest.raises(SystemExit) as end:
        check([*args, "--trainer.accelerator", "cpu"])
    out, err = capsys.readouterr()
    return end.value.code, " ".join(out.split()), [line for line in err.splitlines() if line]


def test_a_trusted_config_ends_with_status_0_and_writes_nothing(capsys):
    status, out, err = run(capsys, *SMALL, *REGULAR)
    assert status == 0
    assert "The hypergradient can be trusted" in out
    assert re.search(r"cosine │ (1|0.99) ", out)
    assert not err
    assert not list(Path().iterdir())


def test_a_doubtful_one_with_status_1_and_advice(capsys):
    status, out, _ = run(capsys, *SMALL, "--check.reference_steps", "100")
    assert status == 1
    assert "lower steps of the reference │ 100 │" in out
    assert "raise lower_steps" in out
    assert not list(Path().iterdir())


def test_minibatches_and_other_algorithms(capsys):
    small = ["--data.lower_batch_size=16", "--data.upper_batch_size=16", "--check.reference_steps=20"]
    status, out, _ = run(capsys, "--config", "hyper_cleaning/digits_minibatch", "--config", str(TINY), *small)
    assert status == 1
    assert "hypergradient of ┃ TRHG" in out
    aid = ["--model", "AIDCG", "--model.linear_solver.steps", "1", "--data", "DigitsCleaning"]
    keep = ["--data.train_samples", "60", "--data.val_samples", "30", "--check.reference_steps", "100"]
    _, out, err = run(capsys, *SMALL, "--model.task.l2", "0.1", *aid, *keep)
    assert "residual of the linear system" in out, err


def test_a_checkpoint_is_checked_where_it_ended(capsys):
    fit([*SMALL, "--model.lower_steps=7", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"])
    (path,) = Path("runs").rglob("*.ckpt")
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    status, out, _ = run(capsys, "--ckpt_path", str(path), "--check.reference_steps", "7")
    assert status == 1
    assert "T │ 7 │" in out
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "nothing"], "--config nothing is neither a file nor a shipped config"),
        (["--model.lower_stepz", "3"], "has no setting lower_stepz"),
        (["--model.task.samples", "599"], "The task has 599 weights but the data 600 training samples"),
        (["--check.directions", "0"], "directions must be a positive number, got 0."),
        (["--check.reference_steps", "many"], "check.reference_steps"),
        (["test"], "test"),
    ],
)
def test_mistakes_end_in_one_line_with_status_2(capsys, args, message):
    status, _, err = run(capsys, *args)
    assert status == 2
    assert len(err) == 1
    assert err[0].startswith("bilevel-check: error: ")
    assert message in err[0]


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        check(["--help"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("usage: bilevel-check [")
    assert "hyper_cleaning/mnist_trhg" in out
    assert "most lower steps of the reference" in out
    assert "Exit status: 0 trusted, 1 not, 2 wrong arguments." in out
