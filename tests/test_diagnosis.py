"""The check says the truth about problems whose hypergradients are known."""

import copy

import pytest
import torch
from problems import Contraction, FromX, Quadratic, ScalarMerelyConvex, ScalarStronglyConvex
from torch import nn

from bilevel_lightning import (
    AIDCG,
    DARTS,
    FG2U,
    RHG,
    TRHG,
    Adam,
    AIDNeumann,
    BilevelError,
    BilevelTask,
    FixedPoint,
    ForwardHG,
    GradientDescent,
    Minibatches,
    Momentum,
)
from bilevel_lightning.diagnosis import TOLERANCE, check
from bilevel_lightning.linear_solvers import ConjugateGradient, Dense, Neumann

BATCH = {"lower": torch.zeros(1), "upper": torch.zeros(1)}
GD = GradientDescent(lr=0.4)  # contracts by 0.6 a step on Quadratic


def said(report):
    return " ".join(report.words())


def off(task, steps, kept):
    """The relative error of gradient descent's (truncated) hypergradient, by the closed forms."""
    x, y0 = task.upper.x.detach(), task.y().detach()
    truth = task.hypergradient(x)
    return float((task.unrolled(x, y0, 0.4, steps, kept) - truth).norm() / truth.norm())


# What can be trusted.


@pytest.mark.parametrize("method", [RHG, ForwardHG, AIDCG])
def test_a_solved_lower_level_is_trusted(method):
    report = check(method(task=Quadratic(), dynamics=GD, lower_steps=40), BATCH)
    assert report.trusted
    assert report.error < 1e-6
    assert report.cosine == pytest.approx(1)
    assert report.derivative < 1e-6
    assert report.change < 0.01
    assert report.stationarity[1] < 1e-6 * report.stationarity[0]
    assert report.words()[0].startswith("The hypergradient can be trusted: it is 0.0% off")
    assert report.suggested_steps < 40
    assert f"T = {report.suggested_steps}" in report.words()[1]


class Well(BilevelTask):
    """A lower level whose |g_y| first rises on the way from y = 2.5 to its minimum at x = 0."""

    def __init__(self):
        super().__init__()
        self.upper, self.lower = (nn.ParameterDict({"w": torch.full((1,), start)}) for start in (0.0, 2.5))

    def upper_loss(self, batch):
        return (self.lower["w"] - 1).square().sum()

    def lower_loss(self, batch):
        return -(-(self.lower["w"] - self.upper["w"]).square() / 2).exp().sum()


def test_a_slope_that_rises_on_the_way_to_a_minimum_is_no_divergence():
    report = check(RHG(task=Well(), dynamics=GradientDescent(lr=0.5), lower_steps=8), BATCH)
    first, last, rest = report.stationarity
    assert rest < first < last
    assert not report.trusted
    assert "raise lower_steps" in said(report)
    assert "diverges" not in said(report)


def test_one_step_is_not_and_the_suggestion_is_right():
    task = Quadratic()
    report = check(RHG(task=task, dynamics=GD, lower_steps=1), BATCH)
    assert not report.trusted
    assert report.error == pytest.approx(off(task, 1, 1), rel=1e-4)
    assert report.stopped_error < 1e-12
    steps, kept = report.suggested_steps, report.suggested_kept
    assert off(task, steps, steps) <= TOLERANCE < off(task, steps // 2, steps // 2)
    assert off(task, steps, kept) <= TOLERANCE < off(task, steps, kept // 2)
    assert f"raise lower_steps; T = {steps}" in said(report)
    assert "As the gradient of f(x, y_T(x))" in said(report)
    better = check(TRHG(task=task, dynamics=GD, lower_steps=steps, truncation=kept), BATCH)
    assert better.trusted


def test_truncation_is_told_from_an_unsolved_lower_level():
    report = check(TRHG(task=Quadratic(), dynamics=GD, lower_steps=40, truncation=1), BATCH)
    assert not report.trusted
    assert report.unrolled_error < 1e-6
    assert "raise truncation" in said(report)
    assert "raise lower_steps" not in said(report)


def test_other_approximations_are_named():
    assert "DARTS is" in said(check(DARTS(task=Quadratic(), dynamics=GD, lower_steps=20), BATCH))
    assert "mean over many iterations" in said(check(FG2U(task=Quadratic(), dynamics=GD, directions=1), BATCH))


# Implicit methods.


def test_an_unsolved_lower_level_of_an_implicit_method():
    report = check(AIDCG(task=Quadratic(), dynamics=GD, lower_steps=1), BATCH)
    assert not report.trusted
    assert report.residual < 1e-6
    assert report.solved_error < 1e-3
    assert report.suggested_steps > 1
    assert "lower_steps" in said(report)
    assert "linear system alone" not in said(report)


def test_an_unsolved_linear_system():
    solver = ConjugateGradient(steps=1)
    report = check(AIDCG(task=Quadratic(), dynamics=GD, lower_steps=40, linear_solver=solver), BATCH)
    assert not report.trusted
    assert report.residual > 0.1
    assert 1 < report.suggested_kept <= 10
    assert f"raise linear_solver.steps; K = {report.suggested_kept} would do" in said(report)
    assert "raise lower_steps" not in said(report)
    assert solver.steps == 1


def test_a_singular_system_is_put_in_words():
    task = ScalarMerelyConvex()
    with torch.no_grad():
        task.lower.y2.fill_(1.0)
    report = check(AIDCG(task=task, dynamics=GD, lower_steps=40), BATCH)
    assert "g_yy is singular" in said(report)
    assert not report.trusted


def test_diverging_is_a_verdict():
    for module in (
        RHG(task=Quadratic(), dynamics=GradientDescent(lr=1e6), lower_steps=60),
        AIDNeumann(task=Quadratic(), dynamics=GD, linear_solver=Neumann(steps=500, lr=1e3)),
    ):
        report = check(module, BATCH)
        assert not report.trusted
        assert "is not finite" in said(report)


def test_other_errors_are_no_verdict():
    class Refusing(AIDCG):
        def bilevel_step(self, problem, x, y):
            raise BilevelError("a finite number is missing")

    with pytest.raises(BilevelError, match="a finite number is missing"):
        check(Refusing(task=Quadratic(), dynamics=GD, lower_steps=2), BATCH)


# What hides in the losses.


class Detached(Quadratic):
    """x reaches the lower level behind autograd's back."""

    def lower_loss(self, batch):
        y = self.y()
        return 0.5 * y @ self.A @ y - y @ self.B @ self.upper.x.detach()


def test_a_detached_loss_is_found_out():
    report = check(RHG(task=Detached(), dynamics=GD, lower_steps=40), BATCH)
    assert report.error < 1e-6  # both are wrong alike
    assert report.derivative > 0.1
    assert not report.trusted
    assert "detach()" in said(report)


def test_one_step_does_not_hide_it():
    class Curved(Quadratic):
        def lower_loss(self, batch):
            y = self.y()
            return 0.5 * y @ self.A @ y.detach() - y @ self.B @ self.upper.x

    assert check(RHG(task=Curved(), dynamics=GD, lower_steps=1), BATCH, reference_steps=20).derivative > 0.01


def test_wrong_losses_end_in_an_error():
    class Vectors(Quadratic):
        def upper_loss(self, batch):
            return self.y()

    with pytest.raises(BilevelError, match="upper_loss must return a scalar"):
        check(RHG(task=Vectors()), BATCH)
    with pytest.raises(BilevelError, match="symmetric"):
        check(AIDCG(task=Contraction(), dynamics=FixedPoint()), BATCH)
    with pytest.raises(BilevelError, match="directions must be a positive number"):
        check(RHG(task=Quadratic()), BATCH, directions=0)


# The reference.


def test_a_slow_lower_level_leaves_no_verdict_of_trust():
    """With a tiny step size nothing changes, which is no sign of a solution."""
    report = check(RHG(task=Quadratic(), dynamics=GradientDescent(lr=1e-6), lower_steps=10), BATCH, reference_steps=100)
    assert not report.trusted
    assert report.change > 0.3
    assert "has not settled" in said(report) or "still changed" in said(report)


def test_a_reference_of_t_steps_is_the_stopped_lower_level():
    report = check(RHG(task=Quadratic(), dynamics=GD, lower_steps=3), BATCH, reference_steps=3)
    assert report.trusted
    assert report.reference_steps == 3


def test_a_start_that_depends_on_x_has_its_t_steps_as_reference():
    report = check(RHG(task=FromX(), lower_steps=2), BATCH)
    assert report.trusted
    assert report.reference_steps == 2


def test_fixed_points_learnt_settings_and_adam():
    assert check(RHG(task=Contraction(), dynamics=FixedPoint(), lower_steps=30), BATCH).trusted
    assert check(RHG(task=Quadratic(), dynamics=GradientDescent(0.4, "per_step"), lower_steps=30), BATCH).trusted
    assert (
        check(RHG(task=Quadratic(), dynamics=Adam(lr=0.1), lower_steps=9), BATCH, reference_steps=20).derivative < 1e-4
    )
    assert check(AIDCG(task=ScalarStronglyConvex(), dynamics=Momentum(0.5, 0.5), lower_steps=30), BATCH).trusted


def test_implicit_methods_of_any_solver():
    class AIDDense(AIDCG):
        pass

    report = check(AIDDense(task=Quadratic(), dynamics=GD, lower_steps=30, linear_solver=Dense()), BATCH)
    assert report.trusted
    assert report.kept is None


# Random losses, minibatches, data in float32; and nothing changes.


class Dropout(BilevelTask):
    def __init__(self, p=0.5):
        super().__init__()
        self.upper = nn.ParameterDict({"log_penalty": torch.zeros(4)})
        self.lower = nn.Sequential(nn.Dropout(p), nn.Linear(4, 1))
        self.scale = torch.tensor([1.0])  # neither parameter nor buffer

    def upper_loss(self, batch):
        return (self.lower(batch[0])[:, 0] @ torch.eye(len(batch[0])) - self.scale * batch[1]).square().mean()

    def lower_loss(self, batch):
        return self.upper_loss(batch) + (self.upper["log_penalty"].exp() * self.lower[1].weight.square()).sum()


def data(n=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=generator), torch.randn(n, generator=generator)


def test_dropout_is_the_same_function_every_time_and_nothing_changes():
    batch = {"lower": data(), "upper": data()}
    module = RHG(task=Dropout(), lower_steps=10, warm_start=False)
    before, state, kept = copy.deepcopy(module.state_dict()), torch.get_rng_state(), dict(vars(module))
    report = check(module, batch, reference_steps=50)
    assert report.derivative < 1e-6
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert module.state_dict().keys() == before.keys()
    for name, value in module.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert vars(module) == kept
    assert module.task.scale.dtype == batch["lower"][0].dtype == torch.float32
    torch.manual_seed(5)
    assert check(module, batch, reference_steps=50) == report


def test_minibatches_and_a_reference_that_goes_around_them():
    batch = {"lower": Minibatches([data(4), data(5), data(6)]), "upper": data()}
    report = check(RHG(task=Dropout(0.0), lower_steps=3), batch, reference_steps=400)
    assert report.derivative < 1e-6
    assert report.reference_steps % 3 == report.suggested_steps % 3 == 0
    better = check(RHG(task=Dropout(0.0), lower_steps=report.suggested_steps), batch, reference_steps=400)
    assert better.error <= TOLERANCE
