"""What files from others can do: nothing but what they are for."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bilevel_lightning import BilevelError
from bilevel_lightning.cli import fit
from bilevel_lightning.cli.arguments import NAME, PACKAGES, checkpoint_settings
from bilevel_lightning.datamodules import CIFAR10Cleaning

QUICK = [
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu",
    "--trainer.logger=false", "--trainer.max_steps=2",
]  # fmt: skip
MODULE = """
from pathlib import Path

import torch
from torch import nn

from bilevel_lightning import BilevelTask

Path("imported").touch()

class Ridge(BilevelTask):
    def __init__(self):
        super().__init__()
        self.upper, self.lower = nn.ParameterDict(dict(p=torch.zeros(3))), nn.Linear(3, 1)

    def lower_loss(self, batch):
        return (self.upper["p"].exp() * self.lower.weight.square()).sum() + (self.lower.weight - 1).square().sum()

    def upper_loss(self, batch):
        return (self.lower.weight - 0.5).square().sum()
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("BILEVEL_ALLOW", raising=False)


@pytest.fixture
def own():
    """A module of a person's own in the working folder, with a name that no other test has imported."""
    number = 0
    while f"own{number}" in sys.modules:
        number += 1
    Path(f"own{number}.py").write_text(MODULE)
    return f"own{number}"


def config(**settings):
    Path("theirs.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", "theirs.yaml"]


def of(module):
    init_args = {"task": {"class_path": f"{module}.Ridge"}}
    return {"model": {"class_path": "RHG", "init_args": init_args}, "data": {"class_path": "NoData"}}


def failure(capsys, *args):
    with pytest.raises(SystemExit) as end:
        fit([*args, *QUICK])
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def refusal(name):
    return (
        f"bilevel-fit: error: The config or checkpoint names {name}, which is neither of this package nor of Lightning "
        "or torch. If you trust it, type the name on the command line, or set the environment variable "
        f"BILEVEL_ALLOW={name.partition('.')[0]}."
    )


def test_a_config_cannot_import_what_nobody_named(capsys, own):
    assert failure(capsys, *config(**of(own))) == refusal(f"{own}.Ridge")
    assert own not in sys.modules
    assert not Path("imported").exists()


def test_a_name_typed_on_the_command_line_is_allowed(own):
    fit(["--model=RHG", f"--model.task={own}.Ridge", "--data=NoData", *QUICK])
    assert Path("imported").exists()


def test_a_name_allowed_by_the_environment_is_allowed_once(capsys, monkeypatch, own):
    monkeypatch.setenv("BILEVEL_ALLOW", f"other, {own}")
    fit([*config(**of(own)), *QUICK])
    monkeypatch.delenv("BILEVEL_ALLOW")
    assert failure(capsys, *config(**of(own))) == refusal(f"{own}.Ridge")


def test_the_installed_command_finds_modules_in_the_working_folder(own):
    """Its script lies elsewhere, so that Python would not look in the working folder."""
    Path("away").mkdir()
    Path("away/bilevel-fit").write_text("from bilevel_lightning.cli import fit\n\nfit()\n")
    args = ["--model", "RHG", "--model.task", f"{own}.Ridge", "--data", "NoData", *QUICK]
    done = subprocess.run([sys.executable, "away/bilevel-fit", *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["os.system", "torch.os.system", "torch.hub.load", "jsonargparse.set_parsing_settings", "builtins.eval"]
)
@pytest.mark.parametrize("setting", ["upper_optimizer", "callback"])
def test_a_config_cannot_name_what_runs_commands(capsys, name, setting):
    model, callback = {"class_path": "RHG"}, {}
    if setting == "upper_optimizer":
        model["init_args"] = {"upper_optimizer": name}
    else:
        callback = {"class_path": "LambdaCallback", "init_args": {"on_fit_start": name}}
        callback = {
            "trainer": {"callbacks": [{**callback, "class_path": "pytorch_lightning.callbacks.LambdaCallback"}]}
        }
    found = failure(capsys, "--config", "hyper_cleaning/digits_trhg", *config(model=model, **callback))
    assert "names " in found
    assert "which is neither of this package nor of Lightning or torch" in found


def test_typing_a_name_of_python_itself_allows_nothing(capsys):
    found = failure(capsys, "--config", "hyper_cleaning/digits_trhg", "--model.upper_optimizer=os.system")
    assert found == refusal("os.system")


def test_a_checkpoint_cannot_import_what_nobody_named(capsys, own):
    fit(["--model=RHG", f"--model.task={own}.Ridge", "--data=NoData", *QUICK])
    (path,) = Path().rglob("*.ckpt")
    state = torch.load(path, weights_only=True)
    state["hyper_parameters"]["task"]["class_path"] = "theirs.Ridge"
    shutil.copy(f"{own}.py", "theirs.py")
    torch.save(state, path)
    Path("imported").unlink()
    assert failure(capsys, "--ckpt_path", str(path)) == refusal("theirs.Ridge")
    assert not Path("imported").exists()


class Foreign:
    def __reduce__(self):
        return Path.touch, (Path("imported"),)


def test_a_checkpoint_is_loaded_without_running_what_it_pickles(capsys):
    torch.save({"state_dict": {}, "hyper_parameters": Foreign()}, "their.ckpt")
    with pytest.raises(BilevelError, match="their.ckpt is not a checkpoint that loads without running code"):
        checkpoint_settings("their.ckpt")
    assert "not a checkpoint that loads without running code" in failure(capsys, "--ckpt_path=their.ckpt")
    assert not Path("imported").exists()


def test_pickles_of_cifar_with_other_sums_are_not_opened(tmp_path):
    """torchvision unpickles them, but only those with the md5 sums of the original."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Foreign()))
    data = CIFAR10Cleaning(root=str(tmp_path), download=False)
    with pytest.raises(BilevelError, match="CIFAR10Cleaning found no complete data"):
        data.setup("fit")
    assert not Path("imported").exists()


def test_the_rule_that_is_written_down():
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    assert all(f"`{name}`" in text for name in (*PACKAGES, "BILEVEL_ALLOW"))
    assert not NAME.fullmatch("digits_trhg")
    assert not NAME.fullmatch("runs/a.ckpt")
