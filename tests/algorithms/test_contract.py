"""What every algorithm must do; a new name in ``algorithms.__all__`` is tested without further ado."""

import copy
import inspect

import pytest
import torch
from loops import fit
from problems import Quadratic

from bilevel_lightning import GradientDescent, algorithms, tree
from bilevel_lightning.problem import bind

ALGORITHMS = [getattr(algorithms, name) for name in algorithms.__all__]


def identity(values):
    return values


def prepared(algorithm, task, **settings):
    module = algorithm(task=task, **settings)
    module.configure_model()
    return module


def hypergradient(module, x=None, y=None):
    """One `bilevel_step` at the module's variables."""
    x = tree.detach(module.upper_parameters()) if x is None else x
    y = tree.detach(tree.of(module.hooks.lower)) if y is None else y
    problem, x, _ = bind(module.hooks, None, x, identity)
    return module.bilevel_step(problem, x, y)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hypergradient_tends_to_the_closed_form(algorithm):
    task = Quadratic()
    module = prepared(algorithm, task, dynamics=GradientDescent(0.4), lower_steps=160, truncation=150)
    step = hypergradient(module)
    x = task.upper.x.detach()
    assert relative(step.upper_grad["x"], task.hypergradient(x)) < 1e-10
    y = torch.cat([step.lower["first"].flatten(), step.lower["rest"]])
    assert relative(y, torch.linalg.solve(task.A, task.B @ x)) < 1e-10


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_step_keeps_names_and_shapes_and_touches_nothing(algorithm):
    module = prepared(algorithm, Quadratic())
    before = copy.deepcopy(module.state_dict())
    step = hypergradient(module)
    for got, want in ((step.upper_grad, module.upper_parameters()), (step.lower, tree.of(module.hooks.lower))):
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
        assert not any(t.requires_grad for t in got.values())
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_with_default_settings_solves_the_quadratic(algorithm):
    """The relative gap of F(x) = f(x, y*(x)) falls below 1e-3 within 700 upper iterations."""
    task = Quadratic()
    minimiser = torch.linalg.solve(
        torch.autograd.functional.jacobian(task.hypergradient, torch.zeros(4, dtype=torch.float64)),
        -task.hypergradient(torch.zeros(4, dtype=torch.float64)),
    )

    def objective(x):
        y = torch.linalg.solve(task.A, task.B @ x)
        return float(0.5 * (y - task.c).square().sum() + 0.5 * task.rho * x.square().sum())

    start = objective(task.upper.x.detach())
    run = fit(algorithm(task=task), 700, log_every_n_steps=50)
    assert run.global_step == 700
    gap = (objective(task.upper.x.detach()) - objective(minimiser)) / (start - objective(minimiser))
    assert gap < 1e-3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_settings_are_documented(algorithm):
    for name in inspect.signature(algorithm.__init__).parameters:
        if name not in ("self", "kwargs"):
            assert f"{name}:" in algorithm.__doc__
    assert "References:" in algorithm.__doc__
