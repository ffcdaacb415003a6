"""Configs with settings at their bounds and beyond end in a run, or in one message.

BILEVEL_FUZZ=500 python -m pytest tests/cli/test_fuzz.py     # as many configs; default 30
"""

import inspect
import os
import sys
import types
import typing
import warnings
from collections import Counter

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bilevel_lightning import BilevelModule, algorithms, dynamics
from bilevel_lightning.algorithms.penalty import Loopless
from bilevel_lightning.cli import fit

STARTED = ("MAML", "FOMAML", "ANIL", "MetaSGD", "Reptile", "IMAML")  # they need a y_0(x) to learn
INTEGERS = st.sampled_from([-1, 0, 1, 2, 5, 21, 10**12])
FLOATS = st.sampled_from([-1.0, 0.0, 1e-300, 1e-8, 0.1, 1.0, 3.0, 1e30, float("inf"), float("nan")])
SLOW = {"lower_steps", "evaluation_steps", "directions", "upper_iterations", "steps", "chunk", "multi_step"}
SLOW |= {"accumulate"}  # a run with 10^12 has no end
TRAINER = {
    "strategy": ["fsdp", "nothing", "single_xla"], "devices": [-5, 0, "x"], "num_nodes": [0, -1],
    "val_check_interval": [-1, 0, 0.5, 1, 1.5, 1000], "check_val_every_n_epoch": [-1, 0, 1],
    "limit_train_batches": [-1, 0, 1, 1.5], "limit_val_batches": [-1, 0, 0.5, 1.5], "overfit_batches": [-1, 1, 0.5],
    "log_every_n_steps": [-1, 0, 7], "num_sanity_val_steps": [-1, 2], "max_epochs": [-5, 0, 1], "min_steps": [-1, 1],
    "max_time": ["x", "00:00:01:00"], "accumulate_grad_batches": [0, 2], "gradient_clip_val": [0.0, 1.0],
    "fast_dev_run": [True, -1], "precision": ["bf16-true", "8"], "profiler": ["x"], "detect_anomaly": [True],
}  # fmt: skip
LEFT = {"task", "compile", "upper_scheduler", "upper_optimizer", "dynamics", "evaluation_dynamics"}


def value(name, hint):
    """Returns a strategy for a setting of a type, or None where the type is an object's."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from([*options, "wrong"])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for option in options if (part := value(name, option)) is not None]
        return st.one_of(*parts) if parts else None
    if hint is int and name in SLOW:
        return st.sampled_from([-1, 0, 1, 2, 5])
    plain = {bool: st.booleans(), int: INTEGERS, float: FLOATS, type(None): st.none()}
    return plain.get(hint) if isinstance(hint, type) else None


def drawn(cls):
    """Returns a strategy for some of a class's settings."""
    found = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and base not in (object, torch.nn.Module):
            hints = typing.get_type_hints(base.__init__)
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                if parameter.kind is not parameter.VAR_KEYWORD and name in hints and name not in LEFT:
                    found[name] = value(name, hints[name])
    found = {name: strategy for name, strategy in found.items() if strategy is not None}
    # a few settings each: with many there would be a wrong one in every config
    names = st.lists(st.sampled_from(sorted(found)), max_size=4, unique=True) if found else st.just([])
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: found[name] for name in chosen}))


@st.composite
def configs(draw):
    name = draw(st.sampled_from(algorithms.__all__))
    cls = getattr(algorithms, name)
    loopless = issubclass(cls, Loopless)
    model = {**({} if loopless else {"lower_steps": 2}), **({"truncation": 1} if name == "TRHG" else {})}
    model |= draw(drawn(cls))
    if not loopless and draw(st.booleans()):
        moved = draw(st.sampled_from([n for n in dynamics.__all__ if n not in ("Dynamics", "State")]))
        init_args = draw(drawn(getattr(dynamics, moved)))
        model["dynamics"] = {"class_path": moved, "init_args": init_args}
    if draw(st.booleans()):
        model["upper_optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": draw(FLOATS)}}
    if name in STARTED or (draw(st.booleans()) and not issubclass(cls, algorithms.VPBGD)):
        network = {"class_path": "RegressionMLP", "init_args": {"hidden": [4]}}
        head = {"class_path": "LinearHead", "init_args": {"features": 1, "ways": 1}}
        model["task"] = {"class_path": "FewShotRegression", "init_args": {"body": network, "head": head}}
        if draw(st.booleans()):
            del model["task"]["init_args"]["head"]
        sizes = ("shots", "episodes_per_batch", "epoch_length", "val_episodes")
        data = {"class_path": "Sinusoid", "init_args": {"test_episodes": 2, **dict.fromkeys(sizes, 2)}}
        changes = {n: st.sampled_from([-1, 0, 1, 3]) for n in sizes}
    else:
        network = {"class_path": "LinearNet", "init_args": {"image_shape": [1, 8, 8]}}
        samples = draw(st.sampled_from([12] * 8 + [0, 13]))
        model["task"] = {"class_path": "HyperCleaning", "init_args": {"model": network, "samples": samples, "l2": 0.01}}
        data = {"class_path": "DigitsCleaning", "init_args": {"train_samples": 12, "val_samples": 10}}
        sizes = st.sampled_from([None, -1, 0, 4, 10, 12, 13])
        changes = {"lower_batch_size": sizes, "upper_batch_size": sizes, "noise_rate": FLOATS}
    change = draw(st.one_of(st.none(), st.sampled_from(sorted(changes))))
    if change is not None:
        data["init_args"][change] = draw(changes[change])
    trainer = {
        "max_steps": draw(st.sampled_from([0, 1, 2])), "accelerator": "cpu", "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False,
        "precision": draw(st.sampled_from(["32-true", "64-true", "bf16-mixed"] * 3 + ["16-true"])),
        "callbacks": [{"class_path": "CleaningReport", "init_args": {"steps": 1}}],
    }  # fmt: skip
    return {"model": {"class_path": name, "init_args": model}, "data": data, "trainer": trainer}


def ended(config, folder, capsys, kinds):
    """Runs a config and counts the kind of its end; returns what is wrong with it, or nothing."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    for old in folder.rglob("*.ckpt"):
        old.unlink()
    capsys.readouterr()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(["--config", str(file), f"--trainer.default_root_dir={folder}"])
    except SystemExit as end:
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bilevel-fit: error: ")]
        kinds["message"] += 1
        return [] if end.code == 2 and len(lines) == 1 else [f"exit {end.code}, {lines}"]
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    found = []
    kinds["run"] += 1
    for path in folder.rglob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        found += [f"{n} is not finite" for n, t in state.items() if not torch.isfinite(t.double()).all()]
    return found


@settings(
    max_examples=int(os.environ.get("BILEVEL_FUZZ", "30")), deadline=None, derandomize=True, database=None,
    suppress_health_check=[*HealthCheck], phases=[Phase.generate],
)  # fmt: skip
@given(config=configs())
def check(config, folder, capsys, failures, kinds):
    wrong = ended(config, folder, capsys, kinds)
    if wrong:
        failures.append((wrong, config))


def test_configs_end_in_a_run_or_in_one_message(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failures, kinds = [], Counter()
    check(folder=tmp_path, capsys=capsys, failures=failures, kinds=kinds)
    print(dict(kinds), file=sys.stderr)
    for wrong, config in failures:
        print(wrong, yaml.safe_dump(config), file=sys.stderr)
    assert [wrong for wrong, _ in failures] == []
    assert min(kinds["run"], kinds["message"]) > 0.2 * kinds.total()  # what is drawn tests both ends


@pytest.mark.parametrize("name", algorithms.__all__)
def test_settings_of_every_algorithm_are_drawn(name):
    assert issubclass(getattr(algorithms, name), BilevelModule)
    assert drawn(getattr(algorithms, name)).validate() is None


@pytest.mark.parametrize("name", TRAINER)
def test_settings_of_the_trainer_end_in_a_run_or_in_one_message(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = {"class_path": "LinearNet", "init_args": {"image_shape": [1, 8, 8]}}
    task = {"class_path": "HyperCleaning", "init_args": {"model": network, "samples": 12, "l2": 0.01}}
    data = {"class_path": "DigitsCleaning", "init_args": {"train_samples": 12, "val_samples": 10, "epoch_length": 3}}
    for chosen in TRAINER[name]:
        trainer = {"max_steps": 4, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, name: chosen}
        trainer["callbacks"] = [{"class_path": "CleaningReport", "init_args": {"steps": 1}}]
        model = {"class_path": "MEHA", "init_args": {"task": task}}
        assert not ended({"model": model, "data": data, "trainer": trainer}, tmp_path, capsys, Counter()), chosen
