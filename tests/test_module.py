from functools import partial

import pytest
import torch
from loops import Batches, fit, trainer
from problems import Contraction, FromX, Nonlinear, Quadratic, Vector
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from bilevel_lightning import (
    RHG,
    SAMA,
    TRHG,
    Adam,
    AggregatedDescent,
    BilevelError,
    BilevelTask,
    FixedPoint,
    GradientDescent,
    Momentum,
    tree,
)
from bilevel_lightning.binding import bind
from bilevel_lightning.datamodules.iterations import Iterations
from bilevel_lightning.flow import GradientFlow
from bilevel_lightning.state import State


def sgd(lr):
    return lambda params: torch.optim.SGD(params, lr=lr)


def test_one_iteration_is_the_update_of_the_paper():
    task = Quadratic()
    x, y = task.upper.x.detach().clone(), task.y().detach().clone()
    expected = x - 0.1 * task.unrolled(x, y, 0.2, 15, 15)
    run = fit(RHG(task=task, dynamics=GradientDescent(0.2), lower_steps=15, upper_optimizer=sgd(0.1)), 1)
    torch.testing.assert_close(task.upper.x.detach(), expected, rtol=1e-12, atol=1e-14)
    for _ in range(15):
        y = y - 0.2 * (task.A @ y - task.B @ x)
    torch.testing.assert_close(task.y().detach(), y, rtol=1e-12, atol=1e-14)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged["train/upper_loss"] == pytest.approx(
        float(0.5 * (y - task.c).square().sum() + 0.15 * x.square().sum()), rel=1e-6
    )
    assert logged["train/lower_loss"] == pytest.approx(float(0.5 * y @ task.A @ y - y @ task.B @ x), rel=1e-6)
    assert logged["train/stationarity"] == pytest.approx(float((task.A @ y - task.B @ x).norm()), rel=1e-6)
    assert logged["train/hypergradient_norm"] == pytest.approx(float((x - expected).norm() / 0.1), rel=1e-6)
    assert logged["oracle/lower_gradients"] == 15
    assert logged["oracle/hessian_products"] == logged["oracle/cross_products"] == 15


def test_a_subclass_of_an_algorithm_states_the_problem_as_well():
    class Mine(RHG):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.upper, self.lower = task.upper, task.lower

        def upper_loss(self, batch):
            return task.upper_loss(batch)

        def lower_loss(self, batch):
            return task.lower_loss(batch)

    task = Quadratic()
    fit(Mine(), 5)
    injected = Quadratic()
    fit(RHG(task=injected), 5)
    assert torch.equal(task.upper.x, injected.upper.x)
    assert torch.equal(task.y(), injected.y())


def test_warm_and_cold_start():
    warm, cold = Quadratic(), Quadratic()
    start = cold.y().detach().clone()
    fit(RHG(task=warm, lower_steps=3, upper_optimizer=sgd(1e-12)), 50)
    fit(RHG(task=cold, lower_steps=3, upper_optimizer=sgd(1e-12), warm_start=False), 50)
    solution = torch.linalg.solve(warm.A, warm.B @ warm.upper.x)
    assert (warm.y() - solution).norm() < 1e-4
    y = start
    for _ in range(3):
        y = y - 0.1 * (cold.A @ y - cold.B @ cold.upper.x)
    torch.testing.assert_close(cold.y().detach(), y.detach())


def test_a_learnt_step_size_is_an_upper_variable():
    module = RHG(task=Quadratic(), dynamics=GradientDescent(0.05, learn_lr=True), lower_steps=5)
    run = fit(module, 30)
    assert module.learnable["dynamics/log_lr_factor"].item() > 0.05  # larger steps come closer to y* in five steps
    assert float(run.callback_metrics["train/log_lr_factor"]) == pytest.approx(
        module.learnable["dynamics/log_lr_factor"].item()
    )


def test_scheduler_clipping_and_projection():
    class Boxed(Quadratic):
        def project_upper(self, upper):
            return {"x": upper["x"].clamp(-0.01, 0.01)}

    scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    task = Boxed()
    run = fit(RHG(task=task, upper_scheduler=scheduler), 4)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert task.upper.x.abs().max() <= 0.01
    clipped = Quadratic()
    before = clipped.upper.x.detach().clone()
    fit(RHG(task=clipped, upper_optimizer=sgd(1.0), upper_clip_norm=0.25), 1)
    assert float((clipped.upper.x.detach() - before).norm()) == pytest.approx(0.25)


def test_clipping_by_value_comes_before_that_by_norm():
    free, clipped, both = Quadratic(), Quadratic(), Quadratic()
    x = free.upper.x.detach().clone()
    fit(RHG(task=free, upper_optimizer=sgd(1.0)), 1)
    fit(RHG(task=clipped, upper_optimizer=sgd(1.0), upper_clip_value=0.3), 1)
    fit(RHG(task=both, upper_optimizer=sgd(1.0), upper_clip_value=0.3, upper_clip_norm=0.25), 1)
    gradient = x - free.upper.x.detach()
    assert gradient.abs().max() > 0.3 > gradient.abs().min()
    want = gradient.clamp(-0.3, 0.3)
    torch.testing.assert_close(x - clipped.upper.x.detach(), want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(x - both.upper.x.detach(), want * 0.25 / want.norm(), rtol=1e-12, atol=1e-14)


class Targets(Quadratic):
    """Episodes whose targets are a batch's rows; y is solved for each."""

    persistent_lower = False

    def episodes(self, batch):
        return list(batch["rows"])

    def upper_loss(self, target):
        return 0.5 * (self.y() - target).square().sum() + 0.5 * self.rho * self.upper.x.square().sum()


def rows(number):
    return torch.randn(number, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def accumulated(split, path=None, ckpt_path=None, **settings):
    """Trains on 12 episodes an epoch, ``split`` in a batch; returns the module and its trainer."""
    module = RHG(task=Targets(), lower_steps=5, **settings)
    save = [] if path is None else [SaveAfter(4, path)]
    batches = [{"rows": part} for part in rows(12).split(split)]
    # a validation after each batch
    run = trainer(4, callbacks=save, val_check_interval=1, limit_val_batches=1)
    data = Iterations(lambda k: batches[k % len(batches)], len(batches), run)
    run.fit(module, data, Iterations(lambda k: batches[0], 1), ckpt_path=ckpt_path)
    return module, run


class SaveAfter(Callback):
    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("settings", [{}, {"upper_clip_norm": 0.2, "upper_clip_value": 0.1}])
def test_accumulating_batches_is_one_step_with_their_mean(settings):
    """Three batches of two episodes are one of six, with validations in between; logs and steps count windows."""
    whole, steps = accumulated(6, **settings)
    parts, same = accumulated(2, accumulate=3, **settings)
    assert steps.global_step == same.global_step == 4
    torch.testing.assert_close(parts.task.upper.x, whole.task.upper.x, rtol=1e-12, atol=1e-14)
    for name in ("train/hypergradient_norm", "oracle/hessian_products"):
        assert float(same.callback_metrics[name]) == pytest.approx(float(steps.callback_metrics[name]), rel=1e-6)


def test_a_checkpoint_inside_the_window_keeps_what_was_gathered(tmp_path):
    whole, _ = accumulated(2, tmp_path / "inside.ckpt", accumulate=3)
    assert torch.load(tmp_path / "inside.ckpt", weights_only=True)["accumulated"][0] == 1
    resumed, _ = accumulated(2, ckpt_path=tmp_path / "inside.ckpt", accumulate=3)
    assert torch.equal(resumed.task.upper.x, whole.task.upper.x)


def test_steps_of_an_accumulating_run_with_kept_memories():
    """Adam's memories of the lower level count the batches, not the steps of x, which are none here."""
    plain, gathered = Quadratic(), Quadratic()
    fit(SAMA(task=plain, upper_optimizer=sgd(1e-300)), 6)
    fit(SAMA(task=gathered, upper_optimizer=sgd(1e-300), accumulate=3), 2)
    assert torch.equal(plain.y(), gathered.y())


def test_episodes_are_averaged_and_y_is_solved_for_each():
    """Two episodes with targets c and -c, whose mean hypergradient is that of c = 0; y is not kept."""

    class Episodes(Quadratic):
        persistent_lower = False

        def episodes(self, batch):
            return [self.c, -self.c]

        def upper_loss(self, target):
            return 0.5 * (self.y() - target).square().sum()

    task = Episodes()
    x, y = task.upper.x.detach().clone(), task.y().detach().clone()
    fit(RHG(task=task, upper_optimizer=sgd(0.1), lower_steps=7), 1)
    single = Quadratic(rho=0.0)
    single.c = torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(task.upper.x.detach(), x - 0.1 * single.unrolled(x, y, 0.1, 7, 7))
    assert torch.equal(task.y(), y)


def test_validation_solves_y_for_each_episode_and_changes_nothing():
    class Measured(FromX):
        def metrics(self, batch):
            return {"y_norm": sum(p.square().sum() for p in self.lower.parameters())}

    module = RHG(task=Measured(), lower_steps=4, dynamics=Momentum(0.1))
    before = tree.clone(dict(module.named_parameters()))
    (logged,) = trainer(1).validate(module, Batches(1), verbose=False)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    problem_x = tree.detach(module.upper_parameters())
    problem, x, _ = bind(module.task, None, problem_x, lambda v: v)
    y = module.solve_lower(problem, x, module.task.initial_lower(x))
    assert logged["val/y_norm"] == pytest.approx(float(sum(t.square().sum() for t in y.values())), rel=1e-6)
    assert logged["val/upper_loss"] == pytest.approx(float(problem.f(x, y)), rel=1e-6)


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("algorithm", [RHG, TRHG])
@pytest.mark.parametrize("warm_start", [True, False])
def test_resuming_is_exact_to_the_bit(tmp_path, algorithm, warm_start):
    class Noisy(Nonlinear):  # draws random numbers in its loss
        def lower_loss(self, batch):
            return super().lower_loss(batch) + 0.01 * (torch.randn(3, dtype=torch.float64) * self.lower.w).sum()

    def module():
        torch.manual_seed(0)
        dynamics = Adam(0.05, learn_lr=True)
        scheduler = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)
        return algorithm(
            task=Noisy(), dynamics=dynamics, lower_steps=12, upper_scheduler=scheduler, warm_start=warm_start
        ).double()

    whole, path = module(), tmp_path / "middle.ckpt"
    fit(whole, 9, callbacks=[SaveAt(4, path)])
    resumed = module()
    run = trainer(9)
    run.fit(resumed, Batches(100), ckpt_path=path)
    assert run.global_step == 9
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class SaveWhen(Callback):
    """Saves once at a hook: in the middle of an epoch, by its last validation, or at its end."""

    def __init__(self, hook, path):
        setattr(self, hook, lambda trainer, *args: self.save(trainer, path))

    def save(self, trainer, path):
        if trainer.global_step >= 2 and not path.exists():
            trainer.save_checkpoint(path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
def test_loaders_that_draw_random_numbers_leave_those_of_the_losses_as_they_are(tmp_path, hook):
    class Noisy(Nonlinear):
        def lower_loss(self, batch):
            return super().lower_loss(batch) + 0.01 * (torch.randn(3, dtype=torch.float64) * self.lower.w).sum()

        def initial_lower(self, upper):  # the check of the first batch, which a resumed run does again, draws too
            return {name: t + 0.01 * torch.randn_like(t) for name, t in tree.of(self.lower).items()}

    def trained(steps, ckpt_path=None, callbacks=None):
        torch.manual_seed(0)
        module = RHG(task=Noisy(), lower_steps=3).double()
        data = [{"lower": torch.zeros(1), "upper": torch.zeros(1)}] * 3
        loader = DataLoader(data, batch_size=None)  # draws a seed for its workers at the beginning of an epoch
        trainer(steps, callbacks=callbacks).fit(module, loader, DataLoader(data, batch_size=None), ckpt_path=ckpt_path)
        return tree.of(module.task.upper)

    path = tmp_path / "saved.ckpt"
    whole = trained(8, callbacks=[SaveWhen(hook, path)])
    resumed = trained(8, ckpt_path=path)
    assert all(torch.equal(resumed[name], t) for name, t in whole.items())


def test_global_step_counts_upper_iterations_and_checkpoints_follow_it(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(RHG(task=Quadratic()), 7, callbacks=[checkpoint], enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt"]


def test_state_keeps_names_with_dots_through_a_state_dict():
    state = State({"a.weight": torch.ones(2), "b": torch.zeros(1)})
    other = State({"a.weight": torch.zeros(2), "b": torch.ones(1)})
    other.load_state_dict(state.state_dict())
    assert other.get()["a.weight"].tolist() == [1, 1]


def test_hyper_parameters_hold_plain_values_only():
    module = TRHG(task=Quadratic(), lower_steps=30, truncation=4)
    assert module.hparams["truncation"] == 4
    assert module.hparams["lower_steps"] == 30
    assert "task" not in module.hparams


def test_an_equilibrium_model_needs_no_lower_loss():
    task = Contraction()
    run = fit(RHG(task=task, dynamics=FixedPoint(), lower_steps=30, upper_optimizer=sgd(0.2)), 200)
    torch.testing.assert_close(task.lower.y.detach(), task.c, rtol=1e-4, atol=1e-4)  # F = |y*(x) - c|^2 / 2 is zero
    assert float(run.callback_metrics["train/lower_loss"]) < 1e-12
    assert run.callback_metrics["oracle/fixed_point_maps"] == 200 * 30


# What a person can do wrong.


def loss_is(value):
    class Wrong(Quadratic):
        def lower_loss(self, batch):
            return value(self)

    return Wrong()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RHG(lower_steps=0), "lower_steps must be at least 1, got 0"),
        (lambda: RHG(lower_steps=5, truncation=6), "truncation K=6 must be between 1 and lower_steps T=5"),
        (lambda: RHG(truncation=0), "truncation K=0 must be between 1"),
        (lambda: RHG(memory="disk"), "memory must be 'graph', 'recompute' or 'mixed', got 'disk'"),
        (lambda: RHG(upper_clip_norm=0.0), "upper_clip_norm must be a positive number, got 0.0"),
        (lambda: RHG(upper_clip_value=-1.0), "upper_clip_value must be a positive number, got -1.0"),
        (lambda: RHG(accumulate=0), "accumulate must be a positive number, got 0"),
        (lambda: RHG(accumulate=2, upper_iterations=2), "accumulate gathers several batches for one upper iteration"),
        (
            lambda: fit(RHG(task=Quadratic(), upper_optimizer=sgd(-1.0)), 1),
            "upper_optimizer: Invalid learning rate: -1",
        ),
        (
            lambda: fit(RHG(task=Quadratic(), upper_optimizer=sgd(float("inf"))), 1),
            "upper_optimizer: its lr must be a finite number, got inf",
        ),
        (lambda: fit(RHG(task=Quadratic(), upper_optimizer=torch.optim.LBFGS), 1), "LBFGS needs a closure"),
        (
            lambda: fit(RHG(task=Quadratic(), upper_optimizer=partial(GradientFlow, lr=1.0)), 1),
            "GradientFlow needs a closure",
        ),
        (lambda: fit(RHG(), 1), "RHG.upper must be a module that holds the upper variables"),
        (lambda: fit(RHG(task=loss_is(lambda t: t.y())), 1), r"lower_loss must return a scalar tensor, got \(6,\)"),
        (lambda: fit(RHG(task=loss_is(lambda t: 1.0)), 1), "lower_loss must return a scalar tensor, got float"),
        (
            lambda: fit(RHG(task=loss_is(lambda t: t.y().sum() * float("nan"))), 1),
            "lower_loss is nan on the first batch",
        ),
        (
            lambda: fit(RHG(task=loss_is(lambda t: t.upper.x.sum())), 1),
            "does not depend on any parameter of self.lower",
        ),
        (
            lambda: fit(RHG(task=Quadratic(), dynamics=GradientDescent(1e9)), 3),
            r"hypergradient is (nan|inf).*dynamics.lr",
        ),
        (lambda: fit(RHG(task=Quadratic(), dynamics=FixedPoint()), 1), "has no fixed-point map"),
        (lambda: fit(RHG(task=BilevelTask()), 1), "BilevelTask.upper must be a module"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(BilevelError, match=message):
        make()


def test_missing_loss():
    class Half(BilevelTask):
        def __init__(self):
            super().__init__()
            self.upper, self.lower = Vector(x=torch.zeros(1)), Vector(y=torch.zeros(1))

    with pytest.raises(BilevelError, match=r"Half does not define upper_loss\(batch\)"):
        fit(RHG(task=Half()), 1)


def test_a_parameter_of_both_levels_and_a_level_without_any():
    task = Quadratic()
    task.lower.shared = task.upper.x
    with pytest.raises(BilevelError, match=r"both an upper and a lower variable: \['shared'\]"):
        fit(RHG(task=task), 1)
    task = Quadratic()
    task.upper = nn.Identity()
    with pytest.raises(BilevelError, match="Quadratic.upper has no trainable parameter"):
        fit(RHG(task=task), 1)


def test_several_episodes_with_one_y():
    class Two(Quadratic):
        def episodes(self, batch):
            return [batch, batch]

    with pytest.raises(BilevelError, match=r"returned 2 problems, but one y persists; set persistent_lower = False"):
        fit(RHG(task=Two()), 1)


def test_a_diverged_iteration_changes_nothing():
    task = Quadratic()
    before = tree.clone(dict(task.named_parameters()))
    with pytest.raises(BilevelError, match="y is nan"):
        fit(RHG(task=task, dynamics=GradientDescent(1e200)), 1)
    assert all(torch.equal(p, before[name]) for name, p in task.named_parameters())


def test_an_unused_upper_variable_is_named():
    task = Quadratic()
    task.upper.idle = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"no gradient of the upper variables \['idle'\]"):
        fit(RHG(task=task), 2)
    assert task.upper.idle.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("16-mixed", "precision 16-mixed cannot be used: its loss scaling does not reach hypergradients"),
        ("bf16-true", "precision bf16-true would keep x and y in bfloat16 or less, which rounds small steps away"),
    ],
)
def test_precisions_that_hypergradients_cannot_have_are_refused(precision, message):
    module = RHG(task=Quadratic())
    run = trainer(1)
    run.strategy._lightning_module = module
    module.trainer = run
    run._accelerator_connector.precision_plugin.precision = precision
    with pytest.raises(BilevelError, match=message):
        module.setup("fit")


class Attentive(Nonlinear):
    def lower_loss(self, batch):
        token = self.lower.w.reshape(1, 1, 3)
        return super().lower_loss(batch) + torch.nn.functional.scaled_dot_product_attention(token, token, token).sum()


def test_attention_in_the_lower_loss_is_told_once(caplog):
    with caplog.at_level("INFO"):
        fit(RHG(task=Attentive(), lower_steps=2), 3)
    assert len([r for r in caplog.records if "scaled dot-product attention" in r.getMessage()]) == 1
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(RHG(task=Nonlinear(), lower_steps=2), 3)
    assert not [r for r in caplog.records if "attention" in r.getMessage()]


@pytest.mark.parametrize(
    "setting",
    [{"evaluation_steps": 3}, {"evaluation_dynamics": GradientDescent(0.1)}, {"episodes_at_once": 2}],
)
def test_settings_of_episodes_are_refused_where_one_y_persists(setting):
    module = RHG(task=Quadratic(), **setting)
    with pytest.raises(BilevelError, match=rf"{next(iter(setting))}: these settings are for tasks whose y is solved"):
        module.configure_model()


def test_evaluation_dynamics_never_see_the_upper_loss():
    module = RHG(task=Quadratic(), evaluation_dynamics=AggregatedDescent(0.3, 0.2, 0.5))
    assert type(module.evaluation_dynamics) is GradientDescent
