import logging

import pytest
import torch
from loops import Batches, fit, trainer
from problems import Quadratic, Vector
from pytorch_lightning import Callback

from bilevel_lightning import RHG, BilevelError, BilevelModule, BilevelTask, GradientDescent, Step, tree
from bilevel_lightning.callbacks import ResidualStopping
from bilevel_lightning.schedules import InverseTime, at

LR, RATE, T = 0.1, 0.2, 3  # step sizes of x and y, lower steps


def sgd():
    return lambda params: torch.optim.SGD(params, lr=LR)


def rhg(task, **settings):
    return RHG(task=task, **{"upper_optimizer": sgd(), "dynamics": GradientDescent(RATE), "lower_steps": T, **settings})


class Box(Quadratic):
    """The quadratic problem with x in a box that its solution touches."""

    bound = 0.2

    def project_upper(self, upper):
        return {"x": upper["x"].clamp(-self.bound, self.bound)}


def plain_loop(task, iterations, lr=lambda k: LR):
    """Returns x_0, x_1, ... of RHG with SGD on a `Box` by closed form."""
    x, y, xs = task.upper.x.detach().clone(), task.y().detach().clone(), []
    for k in range(iterations + 1):
        xs.append(x)
        direction = task.unrolled(x, y, RATE, T, T)
        for _ in range(T):
            y = y - RATE * (task.A @ y - task.B @ x)
        x = (x - lr(k) * direction).clamp(-task.bound, task.bound)
    return xs


def first(test, iterations):
    """Returns the first k = 1, 2, ... at which ``test(k)`` holds."""
    return next(k for k in range(1, iterations) if test(k))


class Descent(BilevelModule):
    """x and y step at once, along f_x and g_y; y with a step size of its own."""

    def __init__(self, lower_lr, **settings):
        super().__init__(**settings)
        self.lower_lr = lower_lr

    def bilevel_step(self, problem, x, y):
        f_x, _ = problem.grad_f(x, y)
        return Step(f_x, tree.axpy(-at(self.lower_lr, self.global_step), problem.grad_g(x, y), y))


class Separate(BilevelTask):
    """Starts that do not see each other: f = sum_i c_i |x_i|^2 / 2 + |y_i - x_i|^2 / 2, g = |y - x|^2 / 2."""

    starts = 3

    def __init__(self, rows=3):
        super().__init__()
        x = torch.arange(1.0, 1 + 2 * rows, dtype=torch.float64).reshape(rows, 2)
        self.upper, self.lower = Vector(x=x), Vector(y=torch.zeros_like(x))
        self.c = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)[:rows, None]

    def upper_loss(self, batch):
        x, y = self.upper.x, self.lower.y
        return 0.5 * (self.c * x.square()).sum() + 0.5 * (y - x).square().sum()

    def lower_loss(self, batch):
        return 0.5 * (self.lower.y - self.upper.x).square().sum()

    def residual(self, k):
        """By hand for steps of f's gradient at y = x, where x_i shrinks by the factor 1 - LR c_i."""
        x = torch.arange(1.0, 7, dtype=torch.float64).reshape(3, 2)
        return (self.c * x * (1 - LR * self.c) ** (k - 1)).norm(dim=1)


class Exact(BilevelModule):
    """Steps along the gradient of f(x, y*(x)) where y* = x."""

    def bilevel_step(self, problem, x, y):
        y = {"y": x["x"]}
        return Step(problem.grad_f(x, y)[0], y)


def exact(task, **settings):
    return Exact(task=task, upper_optimizer=sgd(), **settings)


def test_the_hook_comes_once_an_iteration_before_x_and_y_move():
    seen = []

    class Seen(ResidualStopping):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append((trainer.global_step, module.task.upper.x.detach().clone(), module.task.y().detach().clone()))
            super().on_before_optimizer_step(trainer, module, optimizer)

    for iterations in (1, 3):
        seen.clear()
        task, other = Box(), Box()
        y = [other.y().detach().clone()]
        xs = plain_loop(other, 6)
        for x in xs[:5]:
            z = y[-1]
            for _ in range(T):
                z = z - RATE * (other.A @ z - other.B @ x)
            y.append(z)
        fit(rhg(task, upper_iterations=iterations), 6, callbacks=[Seen(1e-12)])
        assert [k for k, _, _ in seen] == list(range(6))
        for (_, x, z), expected_x, expected_y in zip(seen, xs, y, strict=False):
            torch.testing.assert_close(x, expected_x)
            torch.testing.assert_close(z, expected_y)


@pytest.mark.parametrize("patience", [1, 3])
def test_it_stops_where_a_plain_loop_stops(patience):
    task = Box()
    xs = plain_loop(task, 400)
    small = [k > 0 and float((xs[k] - xs[k - 1]).norm() / LR) <= 1e-3 for k in range(400)]
    expected = first(lambda k: all(small[max(k - patience + 1, 0) : k + 1]), 400)
    assert 5 < expected < 300
    stopping = ResidualStopping(1e-3, patience=patience)
    run = fit(rhg(task), 400, callbacks=[stopping])
    assert run.global_step == expected
    assert stopping.steps.tolist() == [expected]
    torch.testing.assert_close(task.upper.x.detach(), xs[expected])
    residual = float((xs[expected] - xs[expected - 1]).norm() / LR)
    assert float(run.callback_metrics["train/residual_mapping"]) == pytest.approx(residual, rel=1e-4)


def test_patience_counts_iterations_in_a_row():
    class Scripted(BilevelModule):
        def bilevel_step(self, problem, x, y):
            norm = (0.01, 1.0, 0.01, 0.01, 1.0, 0.01, 0.01, 0.01)[self.global_step]
            return Step({"x": torch.tensor([norm, 0.0, 0.0, 0.0], dtype=torch.float64)}, y)

    stopping = ResidualStopping(0.1, patience=3)
    run = fit(Scripted(task=Quadratic(), upper_optimizer=sgd()), 9, callbacks=[stopping])
    assert run.global_step == int(stopping.steps) == 8


def test_the_residual_is_the_projected_gradient_mapping_of_the_step_taken():
    """Also with a step size that changes after each step, so that the wrong one would be noticed."""
    task = Box()
    decay = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    x, y = plain_loop(task, 3, lambda k: LR * 0.5**k)[3], task.y().detach().clone()
    for previous in plain_loop(task, 2, lambda k: LR * 0.5**k):
        start = y
        for _ in range(T):
            y = y - RATE * (task.A @ y - task.B @ previous)
    step = LR * 0.5**2
    mapping = (previous - (previous - step * task.unrolled(previous, start, RATE, T, T)).clamp(-0.2, 0.2)) / step
    run = fit(rhg(task, upper_scheduler=decay), 3, callbacks=[ResidualStopping(1e-12)])
    torch.testing.assert_close(task.upper.x.detach(), x)
    assert float(run.callback_metrics["train/residual_mapping"]) == pytest.approx(float(mapping.norm()), rel=1e-6)


def test_relative_measure():
    task = Box()
    xs = plain_loop(task, 400)
    expected = first(lambda k: float((xs[k] - xs[k - 1]).norm() / xs[k].norm()) <= 1e-5, 400)
    stopping = ResidualStopping(1e-5, "relative")
    run = fit(rhg(task), 400, callbacks=[stopping])
    assert run.global_step == int(stopping.steps) == expected
    assert 0 < float(run.callback_metrics["train/residual_relative"]) <= 1e-5


def test_relative_measure_at_zero_has_no_nan():
    class AtZero(Separate):
        starts = 1

        def project_upper(self, upper):
            return {"x": torch.zeros_like(upper["x"])}

    stopping = ResidualStopping(1e-5, "relative")
    run = fit(exact(AtZero()), 9, callbacks=[stopping])
    assert run.global_step == 2  # 1: |x_0| / 0
    assert float(run.callback_metrics["train/residual_relative"]) == 0.0


@pytest.mark.parametrize("lower_lr", [0.3, InverseTime(0.3, 40)])
def test_y_counts_where_it_has_a_step_size(lower_lr):
    task = Quadratic()
    x, y = task.upper.x.detach().clone(), task.y().detach().clone()
    for k in range(200):
        g_y = task.A @ y - task.B @ x
        residual = (task.rho**2 * x.square().sum() + g_y.square().sum()).sqrt()
        x, y = x - LR * task.rho * x, y - at(lower_lr, k) * g_y
        if residual <= 0.1:
            break
    assert 20 < k < 199
    module = Descent(lower_lr, task=task, upper_optimizer=sgd())
    run = fit(module, 200, callbacks=[ResidualStopping(0.1)])
    assert run.global_step == k + 1
    assert float(run.callback_metrics["train/residual_mapping"]) == pytest.approx(float(residual), rel=1e-6)


def test_each_start_is_done_at_its_first_hit():
    task = Separate()
    expected = [first(lambda k, i=i: float(task.residual(k)[i]) <= 0.1, 999) for i in range(3)]
    assert len(set(expected)) == 3
    stopping, left = ResidualStopping(0.1), []

    class Look(Callback):
        def on_train_batch_end(self, run, *args):
            left.append(int(run.callback_metrics["train/unfinished_starts"]))

    run = fit(exact(task), 999, callbacks=[stopping, Look()])
    assert stopping.steps.tolist() == expected
    assert stopping.steps.dtype == torch.long
    assert run.global_step == max(expected)
    assert left == [sum(k < end for end in expected) for k in range(1, max(expected) + 1)]
    largest = float(task.residual(max(expected)).max())
    assert float(run.callback_metrics["train/residual_mapping"]) == pytest.approx(largest, rel=1e-5)


def test_several_iterations_on_a_batch_stop_within_it():
    one, several = ResidualStopping(0.1), ResidualStopping(0.1)
    fit(exact(Separate()), 999, callbacks=[one])
    run = fit(exact(Separate(), upper_iterations=1000), 1000, callbacks=[several])
    assert torch.equal(one.steps, several.steps)
    assert run.global_step == int(one.steps.max()) + 1


def test_a_resumed_run_knows_who_is_done(tmp_path):
    whole, part, resumed = (ResidualStopping(0.1, patience=2) for _ in range(3))
    fit(exact(Separate()), 999, callbacks=[whole])
    middle, last = int(whole.steps.min()) + 3, int(whole.steps.max())
    path = tmp_path / "middle.ckpt"
    run = fit(exact(Separate()), middle, callbacks=[part])
    run.save_checkpoint(path)
    assert sorted(part.steps.tolist())[:2] == [-1, -1]
    again = trainer(999, callbacks=[resumed])
    again.fit(exact(Separate()), Batches(100), ckpt_path=path)
    assert torch.equal(resumed.steps, whole.steps)
    assert again.global_step == last

    path = tmp_path / "end.ckpt"
    again.save_checkpoint(path)
    ended = trainer(999, callbacks=[ResidualStopping(0.1, patience=2)])
    ended.fit(exact(Separate()), Batches(100), ckpt_path=path)
    assert ended.global_step == last
    stricter = trainer(999, callbacks=[ResidualStopping(0.09, patience=2)])
    with pytest.warns(match="callbacks used to create the checkpoint"):
        stricter.fit(exact(Separate()), Batches(100), ckpt_path=path)
    assert stricter.global_step > last


def test_patience_in_a_row_survives_the_checkpoint(tmp_path):
    patient = ResidualStopping(0.1, patience=5)
    fit(exact(Separate()), 999, callbacks=[patient])
    last, path = int(patient.steps.max()), tmp_path / "middle.ckpt"
    run = fit(exact(Separate()), last - 2, callbacks=[ResidualStopping(0.1, patience=5)])
    run.save_checkpoint(path)
    again = trainer(999, callbacks=[ResidualStopping(0.1, patience=5)])
    again.fit(exact(Separate()), Batches(100), ckpt_path=path)
    assert again.global_step == last


def test_it_says_why_training_ended(caplog):
    def said(steps, task, **settings):
        caplog.clear()
        with caplog.at_level(logging.INFO, "pytorch_lightning"):
            fit(exact(task), steps, callbacks=[ResidualStopping(**settings)])
        messages = [record.getMessage().split("ResidualStopping: ") for record in caplog.records]
        ((_, message),) = [parts for parts in messages if len(parts) == 2]
        return message

    class One(Separate):
        starts = 1

    assert "tolerance 1e-05 not reached in 5 upper iterations; mapping residual 5.81" in said(5, One())
    assert "not reached by 2 of 3 starts in 40 upper iterations; mapping residual " in said(40, Separate(), tol=0.1)
    assert said(99, One(), tol=0.1) == "at upper iteration 64 the mapping residual was at most 0.1."
    assert said(9, Separate(), tol=0.3, measure="relative") == (
        "each of 3 starts, the last one at upper iteration 1 the relative residual was at most 0.3."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tol": 0.0}, "ResidualStopping.tol must be a positive number, got 0.0."),
        ({"measure": "gap"}, "ResidualStopping.measure must be mapping or relative, got gap."),
        ({"patience": 0}, "ResidualStopping.patience must be at least 1, got 0."),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        ResidualStopping(**settings)


def test_starts_that_the_variables_do_not_have():
    with pytest.raises(BilevelError, match=r"The task has 3 starts, but x the shape \(2, 2\): ResidualStopping needs"):
        fit(exact(Separate(rows=2)), 1, callbacks=[ResidualStopping()])


def test_without_logs_it_stops_as_well():
    stopping = ResidualStopping(0.1)
    run = fit(exact(Separate()), 999, callbacks=[stopping], log_every_n_steps=0)
    assert run.global_step == int(stopping.steps.max())
    assert not run.callback_metrics
