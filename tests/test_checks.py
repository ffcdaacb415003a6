"""Every guard, with the message that a person sees."""

import pytest
import torch
from loops import Batches, fit, trainer
from problems import Quadratic
from pytorch_lightning import Callback
from torch import nn

from bilevel_lightning import AIDCG, RHG, SOBA, BilevelError, BilevelTask, GradientDescent, tree
from bilevel_lightning.checks import check_classifier


def sgd(lr):
    return lambda params: torch.optim.SGD(params, lr=lr)


class Rows(BilevelTask):
    """Ridge regression on the batches' rows."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.upper = nn.ParameterDict({"ridge": torch.zeros(3, dtype=dtype)})
        self.lower = nn.Linear(3, 1, dtype=dtype)

    def lower_loss(self, batch):
        return self.lower(batch).square().mean() + (self.upper["ridge"].exp() * self.lower.weight.square()).sum()

    def upper_loss(self, batch):
        return (self.lower(batch) - 1).square().mean()


class Given(Batches):
    def __init__(self, *batches):
        super().__init__(len(batches))
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def data(dtype=torch.float32, scale=1.0):
    part = scale * torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {"lower": part, "upper": part}


def message(task, *batches, algorithm=RHG, **settings):
    """Returns the message that a run ends with."""
    with pytest.raises(BilevelError) as error:
        trainer(len(batches) or 1).fit(algorithm(task=task, **settings), Given(*(batches or [data()])))
    return str(error.value)


def warning(task, *batches, **settings):
    """Returns the one warning of this package that a run gives."""
    with pytest.warns(UserWarning, match="A loss|loss uses|g_y") as found:
        trainer(len(batches) or 1).fit(RHG(task=task, **settings), Given(*(batches or [data()])))
    return ours(found)


def ours(found):
    lightning = ("val_dataloader", "treespec")
    (one,) = [words for w in found if not any(name in (words := str(w.message)) for name in lightning)]
    return one


# Values.


class Keep(Callback):
    """Saves a checkpoint after each batch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_nan_in_a_later_batch_ends_the_run_and_keeps_what_was_good(tmp_path, level):
    broken = {**data(), level: torch.full((5, 3), float("nan"))}
    module = RHG(task=Rows())
    with pytest.raises(BilevelError) as error:
        trainer(3, callbacks=[Keep(tmp_path / "good.ckpt")]).fit(module, Given(data(), data(), broken))
    assert str(error.value) == f"{level}_loss is nan at upper iteration 2; look for NaN or Inf in the data."
    kept = torch.load(tmp_path / "good.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    for name, value in module.state_dict().items():
        assert torch.equal(value, kept["state_dict"][name])
        assert torch.isfinite(value).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"dynamics": GradientDescent(1e200)},
            "y is nan in norm at upper iteration 0: the run has diverged. Lower dynamics.lr; the last checkpoint is as "
            "it was.",
        ),
        (
            {"upper_optimizer": sgd(1e9), "lower_steps": 1},
            "The hypergradient is 3.13e+08 in norm at upper iteration 1: the run has diverged. Lower "
            "upper_optimizer.lr or dynamics.lr; the last checkpoint is as it was.",
        ),
    ],
)
def test_divergence_names_level_iteration_and_setting(settings, words):
    with pytest.raises(BilevelError) as error:
        fit(RHG(task=Quadratic(), **settings), 5)
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("algorithm", "settings", "remedy"),
    [
        (RHG, {"dynamics": GradientDescent(0.51), "lower_steps": 20}, "dynamics.lr, or raise lower_steps"),
        (SOBA, {"lower_lr": 0.7}, "lower_lr"),
    ],
)
def test_a_lower_level_that_is_not_solved_is_told_once(algorithm, settings, remedy):
    task = Quadratic()
    with pytest.warns(UserWarning, match="g_y") as found:
        fit(algorithm(task=task, upper_optimizer=sgd(1e-9), **settings), 6)
    words = ours(found)
    assert words.startswith("|g_y| is ")
    assert words.endswith(
        "when the run began: the lower level is not solved, and its hypergradient cannot be trusted. Lower "
        f"{remedy}; bilevel-check tells more."
    )


def test_a_linear_system_that_is_not_solved_is_told():
    class Flat(Quadratic):
        def lower_loss(self, batch):
            return self.y()[0].square() - self.y()[0] * self.upper.x.sum()

    with pytest.warns(UserWarning, match="ConjugateGradient: g_yy is singular at y, and the hypergradient is not def"):
        run = fit(AIDCG(task=Flat()), 1)
    assert run.callback_metrics["train/residual"] > 0.1


# Batches.


def test_a_batch_without_the_keys():
    assert message(Rows(), {"train_x": torch.ones(1), "val_x": torch.ones(1)}) == (
        "A batch needs the keys 'lower' and 'upper' (or 'support' and 'query'), got ['train_x', 'val_x']. Rename them "
        "in the data module's collate function."
    )


def test_a_batch_of_another_type():
    assert message(Rows(), data(torch.float64)).startswith(
        "A loss fails on the first batch. The batch holds torch.float64 on cpu, the parameters are torch.float32 on "
        "cpu: convert in the data module. ("
    )


def test_a_batch_on_another_device():
    found = {level: part.to("meta") for level, part in data().items()}
    assert message(Rows(), found, algorithm=OnMeta).startswith(
        "A loss fails on the first batch. The batch holds torch.float32 on meta, the parameters are torch.float32 on "
        "cpu: convert in the data module. ("
    )


class OnMeta(RHG):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def test_errors_of_a_loss_itself_keep_their_traceback():
    class Broken(Rows):
        def upper_loss(self, batch):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        message(Broken())


def test_a_batch_without_episodes():
    class Episodes(Rows):
        persistent_lower = False

        def episodes(self, batch):
            return []

    assert message(Episodes()) == ("episodes(batch) returned no problem: every batch must hold one, on every process.")


# Losses.


def test_a_loss_that_changes_parameters_in_place():
    class InPlace(Rows):
        def lower_loss(self, batch):
            self.lower.weight.data.mul_(0.5)
            return super().lower_loss(batch)

    task = InPlace()
    before = tree.clone(dict(task.named_parameters()))
    assert message(task) == (
        "A loss changes the parameters ['lower.weight'] in place: compute new tensors from them instead."
    )
    assert all(torch.equal(p, before[name]) for name, p in task.named_parameters())


def test_a_loss_that_reads_parameters_around_the_levels():
    class Around(Rows):
        def __init__(self):
            super().__init__()
            self.kept = [self.lower.weight]

        def upper_loss(self, batch):
            return (batch @ self.kept[0].T - 1).square().mean()

    assert message(Around()) == (
        "upper_loss reads the parameters ['lower.weight'] not as members of self.upper or self.lower, such as from a "
        "list, so that it does not see other values of them: read them there."
    )


def test_parameters_of_neither_level():
    class Third(Rows):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def upper_loss(self, batch):
            return self.scale * super().upper_loss(batch)

    assert warning(Third()) == "upper_loss uses the parameters ['scale'] of neither level: they stay as they are."


def test_buffers_that_a_loss_changes():
    class Counting(Rows):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def lower_loss(self, batch):
            self.calls += 1
            return super().lower_loss(batch)

    assert warning(Counting()) == (
        "A loss changes the buffers ['calls']. It is evaluated many times in an upper iteration, so that what they "
        "hold depends on the algorithm: leave them as they are, or keep what you count outside the losses."
    )


def test_compiled_modules():
    task = Rows()
    task.lower = torch.compile(nn.Linear(3, 1))
    assert message(task) == (
        "lower is compiled by torch.compile: it has no second derivatives, and would be compiled again for each value "
        "of its parameters. Give the plain module; RHG has compile."
    )


def test_a_model_is_tried_on_one_sample_without_a_trace():
    """Batch normalisation takes no single sample in training mode, and would keep its statistics."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[3].eval()
    before = tree.clone(model.state_dict())
    check_classifier(model, torch.rand(5, 1, 2, 2), 2)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model] == [True, True, True, False, True]
    with pytest.raises(BilevelError, match=r"does not accept images of shape \(1, 3, 3\)"):
        check_classifier(model, torch.rand(5, 1, 3, 3), 2)
    assert model.training


# Settings that are given from Python.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": Rows}, "task must be an instance of a BilevelTask, got the class Rows"),
        ({"dynamics": GradientDescent}, "dynamics must be a Dynamics, .* got the class GradientDescent"),
        ({"evaluation_dynamics": "Momentum"}, "evaluation_dynamics must be a Dynamics, .* got an object of str"),
        ({"upper_optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)}, "upper_optimizer must be a function .* of SGD"),
        ({"lower_steps": 10.0}, r"lower_steps must be an integer, got 10\.0"),
        ({"lower_steps": "10"}, "lower_steps must be an integer, got '10'"),
    ],
)
def test_settings_of_another_type(settings, words):
    with pytest.raises(BilevelError, match=words):
        RHG(**{"task": Quadratic(), **settings})


def test_an_algorithm_without_a_task():
    with pytest.raises(BilevelError, match=r"RHG.upper must be a module .* Set task, or define it."):
        fit(RHG(), 1)


def test_an_optimizer_of_other_parameters():
    other = nn.Parameter(torch.zeros(1))
    with pytest.raises(BilevelError, match="upper_optimizer must be made for the parameters that it is given"):
        fit(RHG(task=Quadratic(), upper_optimizer=lambda params: torch.optim.SGD([other], 0.1)), 1)


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [({"gradient_clip_val": 1.0}, "upper_clip_norm"), ({"accumulate_grad_batches": 2}, "algorithm's accumulate")],
)
def test_what_the_trainer_does_to_gradients(setting, remedy):
    with pytest.raises(BilevelError, match=remedy):
        fit(RHG(task=Quadratic()), 1, **setting)


def validated(found):
    class Measured(Quadratic):
        def metrics(self, batch):
            return found

    run = trainer(1)
    run.validate(RHG(task=Measured()), Batches(1), verbose=False)
    return run.callback_metrics


def test_metrics_may_be_numbers():
    found = validated({"number": 0.5, "count": 3, "tensor": torch.tensor(0.25)})
    assert [float(found[f"val/{name}"]) for name in ("number", "count", "tensor")] == [0.5, 3.0, 0.25]


def test_metrics_without_names():
    with pytest.raises(BilevelError, match="metrics must return a dictionary of scalars by name, got Tensor"):
        validated(torch.tensor(0.5))
