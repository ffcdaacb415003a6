"""What every algorithm must do; a new name in ``algorithms.__all__`` is tested without further ado."""

import copy
import inspect

import pytest
import torch
from jsonargparse import ArgumentParser
from loops import fit
from problems import Quadratic, Vector
from pytorch_lightning import Callback

from bilevel_lightning import DARTS, BilevelError, GradientDescent, algorithms, linear_solvers, tree
from bilevel_lightning.algorithms.penalty import Loopless
from bilevel_lightning.binding import bind
from bilevel_lightning.linear_solvers import ConjugateGradient, FixedPointIteration, Neumann

ALGORITHMS = [getattr(algorithms, name) for name in algorithms.__all__]


def identity(values):
    return values


def prepared(algorithm, task, **settings):
    module = algorithm(task=task, **settings)
    module.configure_model()
    return module


class Started(Quadratic):
    """The quadratic whose lower level starts at further upper variables, y_0 = (first, rest)."""

    persistent_lower = False

    def __init__(self):
        super().__init__()
        x = {"x": self.upper.x.detach()}
        self.upper = Vector(**x, **{name: 0.5 - t for name, t in tree.detach(tree.of(self.lower)).items()})

    def initial_lower(self, upper):
        return {name: upper[name] for name in ("first", "rest")}

    def start(self):
        return torch.cat([self.upper.first.flatten(), self.upper.rest]).detach()


def suited(algorithm):
    """A quadratic that the algorithm can solve."""
    return Started() if algorithm.__name__ in STARTED else Quadratic()


def hypergradient(module, x=None, y=None):
    """One `bilevel_step` at the module's variables."""
    x = tree.detach(module.upper_parameters()) if x is None else x
    y = tree.detach(module.hooks.initial_lower(x)) if y is None else y
    problem, x, _ = bind(module.hooks, None, x, identity)
    return module.bilevel_step(problem, x, y)


def settled(module, times):
    """The last of several iterations at a fixed x: for methods that solve the lower level across iterations."""
    x = tree.detach(module.upper_parameters())
    y = tree.detach(module.hooks.initial_lower(x))
    for _ in range(times):
        problem, x, _ = bind(module.hooks, None, x, identity)
        step = module.bilevel_step(problem, x, y)
        y = step.lower(problem, x) if callable(step.lower) else step.lower
        for name, values in step.state.items():
            module.states[name].set(values)
    return step._replace(lower=y)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def one_step(task, x, y):
    """What DARTS documents: lr I, lr = 0.4, for the inverse of g_yy."""
    return task.rho * x + 0.4 * task.B.T @ (y - task.c)


# Settings, closed form (None: the exact hypergradient) and error, where they are not the defaults.
LIMITS = {
    "TRHG": ({"truncation": 150}, None, 1e-10),
    "IAPTTGM": ({"truncate": False}, None, 1e-10),  # the truncated gradient is in test_iapttgm_bda.py
    "AIDNeumann": ({"linear_solver": Neumann(150)}, None, 1e-10),
    "AIDFP": ({"linear_solver": FixedPointIteration(150)}, None, 1e-9),
    "Nystrom": ({"linear_solver": linear_solvers.Nystrom(6, damping=1e-8)}, None, 1e-6),
    "StocBiO": ({"linear_steps": 150}, None, 1e-10),
    "AmIGO": ({"linear_steps": 150}, None, 1e-10),
    "BSGM": ({"linear_steps": 150}, None, 1e-10),
    "ALSET": ({"linear_steps": 150}, None, 1e-10),
    # their relative standard deviation is about (4 / directions) ** 0.5; exact formulas are in hypergradients/
    "FG2U": ({"directions": 4000}, None, 0.1),
    "PZOBO": ({"directions": 60, "lower_steps": 60}, None, 0.6),
    "DARTS": ({}, one_step, 1e-9),
    "SAMA": ({"dynamics": GradientDescent(0.4)}, one_step, 1e-9),
}


# First-order methods: settings whose solution is near the bilevel one, the iterations that settle them at one x, and
# the bias that remains; tests/algorithms/test_first_order.py has their exact formulas.
NEAR = {
    "VPBGD": ({"gamma": 1e3, "rescale": False, "lower_lr": 4e-4, "lower_steps": 60}, 200, 3e-3),
    "GPBGD": ({"gamma": 1e3, "rescale": False, "lower_lr": 1e-4}, 200, 3e-3),
    "F2SA": ({"gamma": 1e3}, 1, 1e-5),
    "BVFSM": ({"mu": 1e-6, "theta": 1e-6, "tau": 1e-7, "dynamics": GradientDescent(0.15)}, 3, 1e-2),
    "SOBA": ({"lower_lr": 0.4}, 200, 1e-10),
    "MASOBA": ({"lower_lr": 0.4}, 200, 1e-10),
    "SABA": ({"lower_lr": 0.4}, 200, 1e-10),
    "SRBA": ({"lower_lr": 0.4}, 200, 1e-10),
    "FSLA": ({"lower_lr": 0.4}, 200, 1e-10),
    "BAMM": ({"mu": 0.0, "lower_lr": 0.4}, 200, 1e-10),  # mu > 0 is below
    "MRBO": ({"lower_lr": 0.4, "linear_steps": 150, "linear_lr": 0.4}, 100, 1e-10),
    "MEHA": ({"gamma": 1.0, "c": 1e3, "lower_lr": 0.3, "lower_steps": 1, "dynamics": GradientDescent(0.2)}, 300, 3e-3),
}


def solved(task, x, y0):
    """y* = A^-1 B x, and the hypergradient, in which the start has no part."""
    return torch.linalg.solve(task.A, task.B @ x), task.hypergradient(x), torch.zeros_like(y0)


def first_order(task, x, y0):
    y = solved(task, x, y0)[0]
    return y, task.rho * x, y - task.c


def displacement(task, x, y0):
    y = solved(task, x, y0)[0]
    return y, torch.zeros_like(x), y0 - y


def proximal(task, x, y0, s=0.8):
    near = torch.linalg.inv(task.A + s * torch.eye(6, dtype=torch.float64))
    y = near @ (task.B @ x + s * y0)
    return y, task.rho * x + task.B.T @ near @ (y - task.c), s * near @ (y - task.c)


# Methods whose lower level starts at upper variables: settings, and closed form of y, of the direction in x and in y_0.
STARTED = {
    "MAML": ({}, solved),
    "FOMAML": ({}, first_order),
    "ANIL": ({}, solved),
    "MetaSGD": ({"dynamics": GradientDescent(0.4, learn_lr="per_parameter")}, solved),
    "Reptile": ({}, displacement),
    "IMAML": (
        {"strength": 0.8, "dynamics": GradientDescent(0.35), "linear_solver": ConjugateGradient(20, 1e-14)},
        proximal,
    ),
}


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.__name__ in STARTED])
def test_direction_tends_to_its_closed_form_where_the_start_is_learnt(algorithm):
    settings, limit = STARTED[algorithm.__name__]
    task = Started()
    module = prepared(algorithm, task, **{"dynamics": GradientDescent(0.4), "lower_steps": 160, **settings})
    step = hypergradient(module)
    exact = limit(task, task.upper.x.detach(), task.start())
    joined = lambda values: torch.cat([values["first"].flatten(), values["rest"]])
    for found, want in zip((joined(step.lower), step.upper_grad["x"], joined(step.upper_grad)), exact, strict=True):
        assert (found - want).norm() < 1e-10


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.__name__ in NEAR])
def test_first_order_direction_tends_to_the_hypergradient(algorithm):
    settings, times, tolerance = NEAR[algorithm.__name__]
    task = Quadratic()
    solver = {} if issubclass(algorithm, Loopless) else {"dynamics": GradientDescent(0.4), "lower_steps": 160}
    step = settled(prepared(algorithm, task, **{**solver, **settings}), times)
    exact, found = task.hypergradient(task.upper.x.detach()), step.upper_grad["x"]
    found = found * (exact @ found) / (found @ found)
    assert relative(found, exact) < tolerance


# Their directions are random, or moved by training alone: their expectations and definitions are in test_stochastic.py.
ELSEWHERE = ("BOME", "BSA", "TTSA", "SUSTAIN", "VRBO")


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.__name__ not in (*NEAR, *STARTED, *ELSEWHERE)])
def test_hypergradient_tends_to_its_closed_form(algorithm):
    settings, limit, tolerance = LIMITS.get(algorithm.__name__, ({}, None, 1e-10))
    task = Quadratic()
    torch.manual_seed(0)
    module = prepared(algorithm, task, **{"dynamics": GradientDescent(0.4), "lower_steps": 160, **settings})
    step = hypergradient(module)
    x = task.upper.x.detach()
    y = torch.cat([step.lower["first"].flatten(), step.lower["rest"]])
    assert relative(y, torch.linalg.solve(task.A, task.B @ x)) < 1e-10
    assert relative(step.upper_grad["x"], limit(task, x, y) if limit else task.hypergradient(x)) < tolerance


def settings_of(algorithm):
    """The names of all settings, those of base classes included."""
    parser = ArgumentParser()
    parser.add_class_arguments(algorithm, "model")
    return vars(parser.get_defaults().model).keys()


def with_setting(name):
    """The algorithms that have it; FOMAML differentiates no lower step."""
    return [a for a in ALGORITHMS if name in settings_of(a) and a.__name__ != "FOMAML"]


@pytest.mark.parametrize("algorithm", with_setting("memory"))
def test_modes_of_memory_give_one_hypergradient(algorithm):
    settings = {"truncation": 7} if "truncation" in settings_of(algorithm) else {}
    results = []
    for memory in ("graph", "recompute"):
        torch.manual_seed(0)
        module = prepared(algorithm, suited(algorithm), lower_steps=12, memory=memory, **settings)
        step = hypergradient(module)
        results.append(torch.cat([t.flatten() for part in (step.upper_grad, step.lower) for t in part.values()]))
    assert relative(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("algorithm", with_setting("truncation"))
def test_truncation_to_all_steps_is_none(algorithm):
    task = suited(algorithm)
    full, all_steps, fewer = (
        hypergradient(prepared(algorithm, task, lower_steps=12, truncation=k)).upper_grad["x"] for k in (None, 12, 3)
    )
    assert torch.equal(all_steps, full)
    assert relative(fewer, full) > 1e-6


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_step_keeps_names_and_shapes_and_touches_nothing(algorithm):
    module = prepared(algorithm, suited(algorithm))
    before = copy.deepcopy(module.state_dict())
    step = settled(module, 1)
    module.load_state_dict(before)  # what the iteration keeps is set by the loop, not by the step
    for got, want in ((step.upper_grad, module.upper_parameters()), (step.lower, tree.of(module.hooks.lower))):
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
        assert not any(t.requires_grad for t in got.values())
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_bamm_with_a_fixed_share_solves_the_aggregated_problem():
    """At a fixed x, y comes to argmin psi and the direction to the gradient of f(x, argmin psi(x, .))."""
    task, share = Quadratic(), 0.3
    x = task.upper.x.detach().clone().requires_grad_()
    matrix = share * torch.eye(len(task.c), dtype=x.dtype) + (1 - share) * task.A
    y = torch.linalg.solve(matrix, share * task.c + (1 - share) * task.B @ x)
    (want,) = torch.autograd.grad(0.5 * (y - task.c).square().sum() + 0.5 * task.rho * x.square().sum(), x)
    step = settled(prepared(algorithms.BAMM, task, mu=share, lower_lr=0.4), 200)
    found = torch.cat([t.flatten() for t in step.lower.values()])
    assert relative(found, y.detach()) < 1e-10
    assert relative(step.upper_grad["x"], want) < 1e-10


class Gap(Callback):
    """The relative gap of F(x) = f(x, y*(x)); training stops where it is below 1e-3."""

    def __init__(self, task):
        zero = torch.zeros(4, dtype=torch.float64)
        hessian = torch.autograd.functional.jacobian(task.hypergradient, zero)
        self.task, self.minimiser = task, torch.linalg.solve(hessian, -task.hypergradient(zero))
        self.least = self.objective(self.minimiser)
        self.first = self.objective(task.upper.x.detach())

    def objective(self, x):
        y = torch.linalg.solve(self.task.A, self.task.B @ x)
        return float(0.5 * (y - self.task.c).square().sum() + 0.5 * self.task.rho * x.square().sum())

    def __call__(self):
        return (self.objective(self.task.upper.x.detach()) - self.least) / (self.first - self.least)

    def on_train_batch_end(self, trainer, module, *args):
        trainer.should_stop = self() < 1e-3


class Below(Callback):
    """Training stops where the upper loss is small."""

    def __init__(self, value):
        self.value = value

    def on_train_batch_end(self, trainer, module, *args):
        trainer.should_stop = trainer.callback_metrics["train/upper_loss"] < self.value


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.__name__ in STARTED])
def test_training_solves_the_quadratic_where_the_start_is_learnt(algorithm):
    """With y_0 free, f(x, y_T) has its minimum 0 at x = 0, y_T = c; Reptile leaves x and goes to y*(x)."""
    task, reptile = Started(), algorithm.__name__ == "Reptile"
    x = task.upper.x.detach().clone()
    settings = {} if reptile else {"upper_optimizer": lambda p: torch.optim.Adam(p, lr=0.05)}
    if algorithm.__name__ == "FOMAML":
        settings["dynamics"] = GradientDescent(0.1)  # with steps beyond 1 / L, d y_T / d y_0 is far from I
    first = float(0.5 * (task.start() - task.c).square().sum())
    stop = [] if reptile else [Below(1e-3 * first)]
    run = fit(algorithm(task=task, upper_iterations=10, **settings), 100 if reptile else 700, callbacks=stop)
    if reptile:
        assert torch.equal(task.upper.x, x)
        assert relative(task.start(), torch.linalg.solve(task.A, task.B @ x)) < 1e-10
    else:
        assert run.callback_metrics["train/upper_loss"] < 1e-3 * first


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.__name__ not in STARTED])
def test_training_with_default_settings_solves_the_quadratic(algorithm):
    """The relative gap falls below 1e-3 within 700 upper iterations, or the documented bias is what remains.

    The gap is relative to that of the task's x; the runs begin at a quarter of its distance, to save time.
    """
    torch.manual_seed(0)
    task = Quadratic()
    gap = Gap(task)
    if not issubclass(algorithm, DARTS):
        tree.assign(task.upper, {"x": gap.minimiser.lerp(task.upper.x.detach(), 0.25)})
    module = algorithm(task=task, upper_iterations=10)
    fit(module, 700, log_every_n_steps=5, callbacks=[gap])
    if not issubclass(algorithm, DARTS):
        assert gap() < 1e-3
        return
    # x rests where rho x + B' D (y - c) is zero, D = lr I for DARTS and the derivative of Adam's step for SAMA.
    x, y = task.upper.x.detach(), task.y().detach()
    d = torch.full_like(y, 0.1)
    if module.states:
        m, v = (torch.cat([t.flatten() for t in module.kept(f"memory{i}").values()]) for i in (0, 1))
        d = adam_slope(m, v, task.A @ y - task.B @ x, 0.01, 700)
    parts = task.rho * x, task.B.T @ (d * (y - task.c))
    assert gap() < 0.2
    assert (parts[0] + parts[1]).norm() < 0.1 * (task.B.T.abs() @ (d * (y - task.c)).abs()).norm()


def adam_slope(m, v, g, lr, t, b1=0.9, b2=0.999, eps=1e-8):
    """The derivative of Adam's t-th step in its gradient g, written out."""
    root = (v / (1 - b2**t)).sqrt()
    up, down = m / (1 - b1**t), root + eps
    return lr * ((1 - b1) / (1 - b1**t) / down - up / down**2 * (1 - b2) / (1 - b2**t) * g / root)


def test_there_is_no_setting_for_a_lower_loop_that_is_not():
    """Neither from Python nor, by the signature, from the command line; VRBO alone has steps, of ``lower_lr``."""
    found = {a.__name__ for a in ALGORITHMS if issubclass(a, Loopless)}
    assert found == {"BAMM", "FSLA", "GPBGD", "MASOBA", "MRBO", "SABA", "SOBA", "SRBA", "SUSTAIN", "VRBO"}
    for algorithm in ALGORITHMS:
        loopless = algorithm.__name__ in found
        names = settings_of(algorithm)
        assert ("dynamics" in names) != loopless
        assert ("lower_steps" in names) != loopless or algorithm.__name__ == "VRBO"
        for setting in {"dynamics": GradientDescent(0.1)}, {"lower_steps": 2}:
            if loopless and not setting.keys() & names:
                (name,) = setting
                with pytest.raises(BilevelError, match=f"{name} has no part in .* leave {name} out, and set lower_lr"):
                    algorithm(**setting)


@pytest.mark.parametrize(("algorithm", "steps"), [("SOBA", 1), ("VRBO", 4)])
def test_checkpoints_of_methods_without_a_lower_loop_load_bare(algorithm, steps, tmp_path):
    """They hold lower_steps, which SOBA takes as 1 only."""
    algorithm = getattr(algorithms, algorithm)
    module = algorithm(task=Quadratic(), **({"lower_steps": steps} if steps > 1 else {}))
    fit(module, 1).save_checkpoint(tmp_path / "end.ckpt")
    loaded = algorithm.load_from_checkpoint(tmp_path / "end.ckpt", task=Quadratic())
    assert loaded.lower_steps == module.lower_steps == steps


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_settings_are_documented(algorithm):
    for name in inspect.signature(algorithm.__init__).parameters:
        if name not in ("self", "kwargs"):
            assert f"{name}:" in algorithm.__doc__
    assert "References:" in algorithm.__doc__
