import pytest
import torch
from problems import Nonlinear

from bilevel_lightning import Adam, BilevelError, GradientDescent, Momentum, Nesterov, tree
from bilevel_lightning.problem import BilevelProblem, bind
from bilevel_lightning.schedules import InverseTime, Linear, Power

TORCH = {
    "gradient descent": (GradientDescent(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (Momentum(0.1, 0.7), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7)),
    "nesterov": (Nesterov(0.1, 0.7), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, nesterov=True)),
    "adam": (Adam(0.05, (0.8, 0.95), 1e-6), lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-6)),
}


@pytest.mark.parametrize(("dynamics", "optimizer"), TORCH.values(), ids=TORCH)
def test_trajectory_is_that_of_the_torch_optimizer(dynamics, optimizer):
    task = Nonlinear()
    problem, x, _ = bind(task, None, tree.clone(tree.of(task.upper)), lambda v: v)
    state = dynamics.start(tree.clone(tree.of(task.lower)))
    stepper = optimizer(task.lower.parameters())
    for t in range(25):
        state = dynamics.step(problem, x, state, t)
        stepper.zero_grad()
        task.lower_loss(None).backward()
        stepper.step()
        for name, p in task.lower.named_parameters():
            torch.testing.assert_close(state[0][name], p.detach(), rtol=1e-12, atol=1e-13)


def test_decreasing_step():
    problem = BilevelProblem(lambda x, y: y["y"].sum(), lambda x, y: y["y"].sum())
    dynamics = GradientDescent(InverseTime(1.0, 2.0))
    state = dynamics.start({"y": torch.zeros(1)})
    for t in range(3):
        state = dynamics.step(problem, {}, state, t)
    assert float(state[0]["y"]) == pytest.approx(-(1 + 2 / 3 + 2 / 4))


def test_learnt_step_size_starts_at_lr_and_stays_positive():
    dynamics = GradientDescent(0.25, learn_lr=True)
    (name,) = dynamics.learnable(12)
    assert float(dynamics.rate(dynamics.learnable(12), 0)) == 0.25
    assert float(dynamics.rate({name: torch.tensor(-9.0)}, 0)) > 0
    assert GradientDescent(0.25).learnable(12) == {}


def test_adam_has_a_derivative_where_all_gradients_were_zero():
    """y - lr g / (|g| + eps) has the slope -lr / eps in g at g = 0; a naive square root gives NaN."""
    problem = BilevelProblem(lambda x, y: y["y"].sum(), lambda x, y: (x["x"] * y["y"]).sum())
    x = {"x": torch.zeros(2, dtype=torch.float64, requires_grad=True)}
    y = {"y": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    (end, *_) = Adam(0.1, eps=1e-3).step(problem, x, Adam().start(y), 0, track=True)
    (slope,) = torch.autograd.grad(end["y"].sum(), x["x"])
    torch.testing.assert_close(slope, torch.full((2,), -0.1 / 1e-3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientDescent(-0.1), "GradientDescent.lr must be a positive number, got -0.1"),
        (lambda: GradientDescent(float("nan")), "GradientDescent.lr must be a positive number"),
        (lambda: Adam(0.0), "Adam.lr must be a positive number, got 0.0"),
        (lambda: Momentum(0.1, 1.0), r"Momentum.momentum must be in \[0, 1\), got 1.0"),
        (lambda: Nesterov(0.1, -0.5), r"Nesterov.momentum must be in \[0, 1\)"),
        (lambda: Adam(betas=(0.9, 1.0)), r"Adam.betas must be in \[0, 1\)"),
        (lambda: Adam(eps=0.0), "Adam.eps must be a positive number"),
        (lambda: Linear(0.0, 1.0, 5), "Linear.start must be a positive number"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(BilevelError, match=message):
        make()


def test_schedules():
    assert [Linear(1.0, 3.0, 4)(t) for t in (0, 2, 4, 9)] == [1.0, 2.0, 3.0, 3.0]
    assert [InverseTime(2.0, 10.0)(t) for t in (0, 10)] == [2.0, 1.0]
    assert [Power(2.0, -0.5)(t) for t in (0, 3)] == [2.0, 1.0]
