import math

import pytest
import torch
from jsonargparse import ArgumentParser
from loops import trainer
from pytorch_lightning.loggers import CSVLogger

from bilevel_lightning import AIDCG, RHG, BilevelError, BilevelTask, GradientDescent, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.callbacks import SolutionError
from bilevel_lightning.datamodules import NoData
from bilevel_lightning.tasks import (
    BDACounterExample,
    GPBGDTrap,
    GroupLasso,
    Lasso,
    MerelyConvex,
    PBGDToy,
    SineSum,
    SinProblem,
    StronglyConvex,
)

TASKS = {
    "toy": PBGDToy,
    "trap": GPBGDTrap,
    "sin": SinProblem,
    "strong": lambda **kwargs: StronglyConvex(n=3, **kwargs),
    "mere": lambda **kwargs: MerelyConvex(n=3, **kwargs),
    "bda": BDACounterExample,
    "sine": SineSum,
    "sine3": lambda **kwargs: SineSum(n=3, a=1.5, c=-0.5, **kwargs),
    "lasso": lambda **kwargs: Lasso(n=4, **kwargs),
    "group": lambda **kwargs: GroupLasso(m=30, groups=6, samples=20, **kwargs),
}
SOLVED = [name for name in TASKS if name != "group"]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random(low, high, *shape, seed=0):
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def feasible(task, number, seed=0):
    """Random feasible x, shape (number, n)."""
    x = random(*task.ranges[0], number, task.upper["x"].shape[1], seed=seed)
    return task.project_upper({"x": x})["x"]


# The toy.


def test_derivatives_of_the_toy():
    task = PBGDToy()
    x, y = random(0, 3, 2000, 1).requires_grad_(), random(-5, 8.5, 2000, 1, seed=1).requires_grad_()
    s = torch.sigmoid(4 * x - 2)
    u = 4 * x - 2
    closed = {
        "f": (4 * s * (1 - s) * torch.cos(4 * y + 2) + 4 * u / (u**2 + 1), -4 * torch.sin(4 * y + 2) * s),
        "g": (
            2 * (x + y) + torch.sin(x + y) ** 2 + x * torch.sin(2 * (x + y)),
            2 * (x + y) + x * torch.sin(2 * (x + y)),
        ),
    }
    h = 1e-5
    for name, (by_x, by_y) in closed.items():
        loss = getattr(task, name)
        found = torch.autograd.grad(loss(x, y).sum(), (x, y))
        differences = (loss(x + h, y) - loss(x - h, y)) / (2 * h), (loss(x, y + h) - loss(x, y - h)) / (2 * h)
        for gradient, formula, slope in zip(found, (by_x, by_y), differences, strict=True):
            assert (gradient - formula).abs().max() < 1e-12
            assert (gradient[:, 0] - slope).abs().max() < 1e-7


def test_losses_of_the_toy_by_hand():
    x, y = torch.tensor([[1.3]]), torch.tensor([[-0.4]])
    f = math.cos(4 * -0.4 + 2) / (1 + math.exp(2 - 4 * 1.3)) + math.log((4 * 1.3 - 2) ** 2 + 1) / 2
    assert PBGDToy().f(x, y).item() == pytest.approx(f, abs=1e-15)
    assert PBGDToy().g(x, y).item() == pytest.approx(0.9**2 + 1.3 * math.sin(0.9) ** 2, abs=1e-15)


def test_the_value_function_of_the_toy_is_zero():
    task, x = PBGDToy(), random(0, 3, 500, 1)
    assert torch.equal(task.g(x, -x), torch.zeros(500))
    assert task.g(x, random(-9, 9, 500, 1, seed=1)).min() > 0


def test_minimisers_of_the_toy():
    task = PBGDToy()
    x, y = task.solutions()
    assert torch.equal(y, -x)
    assert (x[:, 0] - torch.tensor([0.38236, 1.21515, 2.82964])).abs().max() < 5e-6
    assert (task.hyper_objective(x) - torch.tensor([0.44271, 0.19991, 1.24346])).abs().max() < 5e-6
    grid = torch.linspace(0, 3, 30001)[:, None]
    values = task.hyper_objective(grid)
    inner = (values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])
    assert (grid[1:-1][inner] - x).abs().max() < 1e-4
    shift = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(task.f(shift, -shift).sum(), shift)
    assert slope.abs().max() < 1e-14


def test_the_trap_holds_gradient_norms_but_is_no_solution():
    task = GPBGDTrap()
    x, y = task.upper["x"].detach(), task.lower["y"].detach().clone().requires_grad_()
    (f_y,) = torch.autograd.grad(task.f(x, y).sum(), y)
    (g_y,) = torch.autograd.grad(task.g(x, y).sum(), y, create_graph=True)
    (g_yy,) = torch.autograd.grad(g_y.sum(), y)
    assert abs(f_y.item()) < 1e-15
    assert abs(g_yy.item()) < 1e-14
    assert g_y.item() == pytest.approx(4 * math.pi / 3 - math.sqrt(3))


# Solutions.


@pytest.mark.parametrize("name", SOLVED)
def test_lower_solutions_minimise(name):
    """No random feasible y is better; those with the least f are what F is, over far more branches too."""
    task = TASKS[name]()
    x = feasible(task, 40)
    candidates = task.lower_solutions(x)
    step = torch.tensor(0.7)

    def g(y):
        nonsmooth = (x * y.abs()).sum(1) if name == "lasso" else 0.0
        return task.g(x, y) + nonsmooth

    others = [random(*task.ranges[1], *candidates[0].shape, seed=i) for i in range(50)]
    least = torch.stack([g(y) for y in others]).amin(0)
    for y in candidates:
        known = ~y.isnan().any(1)
        assert (g(y) <= least + 1e-12)[known].all()
    moved = candidates.nan_to_num().requires_grad_()
    gradient = torch.autograd.grad(torch.stack([task.g(x, y) for y in moved]).sum(), moved)[0]
    there = torch.stack(
        [task.prox_lower({"x": x}, {"y": y - step * d}, step)["y"] for y, d in zip(moved, gradient, strict=True)]
    )
    assert (there - candidates)[~candidates.isnan()].abs().max() < 1e-12
    assert not candidates.isnan().all(0).any()


def test_hyper_objectives_with_several_lower_solutions():
    """F is the least f over all branches, listed far beyond those of the task."""
    sin, sine = SinProblem(), SineSum(n=3, a=1.5, c=-0.5)
    x = random(1, 10, 300, 1)
    branches = torch.stack([(math.pi / 2 + 2 * math.pi * k) / x for k in range(-9, 9)])
    values = torch.stack([sin.f(x, y).where(y[:, 0].abs() <= 2, torch.inf) for y in branches])
    assert torch.equal(sin.hyper_objective(x), values.amin(0))
    x = random(-50, 50, 300, 1)
    branches = [(2 * math.pi * k - math.pi / 2 + sine.c - x).expand(-1, 3) for k in range(-20, 20)]
    values = torch.stack([sine.f(x, y) for y in branches])
    assert (sine.hyper_objective(x) - values.amin(0)).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["toy", "trap", "strong", "mere", "bda", "sine", "sine3"])
def test_solutions_are_stationary(name):
    task = TASKS[name]()
    x, y = task.solutions()
    assert (task.lower_solutions(x) - y).abs().amin(0).max() < 1e-14
    for shift in 1e-5 * torch.eye(x.shape[1]):
        slope = (task.hyper_objective(x + shift) - task.hyper_objective(x - shift)) / 2e-5
        assert slope.abs().max() < 1e-9


def test_the_solution_of_the_sin_problem_is_the_least_of_all():
    task = SinProblem()
    x, y = task.solutions()
    best = task.hyper_objective(x)
    assert best.item() == pytest.approx(-8.639379797371931, abs=1e-12)
    assert task.f(x, y).item() == best.item()
    assert (task.hyper_objective(torch.linspace(1, 10, 5001)[:, None]) > best).all()
    assert task.hyper_objective(x - 1e-6).item() == pytest.approx(best.item() + 2 * math.pi, abs=1e-5)
    local = torch.tensor([[1.0], [3 * math.pi / 4], [7 * math.pi / 4], [11 * math.pi / 4]])
    values = torch.tensor([2.5708, -2.35619, -5.49779, -8.63938])
    assert (task.hyper_objective(local) - values).abs().max() < 1e-5
    assert (task.hyper_objective(local.float()) - values).abs().max() < 1e-5  # y = -2 survives rounding


@pytest.mark.parametrize(
    ("task", "x", "y", "best"),
    [
        (StronglyConvex, 0.5, 0.5, 25.0),
        (MerelyConvex, 1.0, 1.0, 0.0),
        (BDACounterExample, 1.0, 1.0, 0.0),
        (SineSum, 2.356194, 4.356194, 0.253749),
        (lambda: SineSum(n=10), 2.647626, 4.064763, 0.461362),
        (lambda: SineSum(n=100), 2.705336, 4.007053, None),
        (GPBGDTrap, 0.0, 0.0, 0.75),
        (SinProblem, 8.639380, -2.0, -8.639380),
    ],
)
def test_reference_values(task, x, y, best):
    task = task()
    found_x, found_y = task.solutions()
    assert (found_x - x).abs().max() < 1e-6
    assert (found_y - y).abs().max() < 1e-6
    if best is not None:
        assert task.hyper_objective(found_x).item() == pytest.approx(best, abs=1e-6)


def test_lasso_has_a_set_of_solutions():
    task = Lasso(n=6)
    x, y = task.solutions()
    assert torch.equal(x, torch.tensor([[1.0, 1, 1, 0, 0, 0]]) / 6)
    assert torch.equal(y, torch.tensor([[0.0, 0, 0, -1, -1, -1]]) / 6)
    assert task.hyper_objective(x).item() == pytest.approx(-0.5, abs=1e-15)
    assert (task.hyper_objective(random(0, 1, 500, 6)) > -0.5).all()
    others = torch.tensor([[0.2, 1.0, 1 / 6, 0, 0, 0], [0.1, 0.5, 0.5, 0, 0, 0.3]])
    errors = task.errors(others, y.expand(2, -1))
    assert errors["x"][0] == 0
    nearest = torch.tensor([1 / 6, 0.5, 0.5, 0, 0, 0])
    assert errors["x"][1].item() == pytest.approx(((others[1] - nearest).norm() / nearest.norm()).item())
    assert (task.hyper_objective(others) + 0.5).abs()[0] < 1e-15
    assert errors["y"].abs().max() < 1e-15


# Proximal maps.


@pytest.mark.parametrize("name", ["lasso", "group"])
def test_proximal_maps_minimise(name):
    """|q - p|^2 / 2 + step h(x, q) is least at the map's q, among 2000 points near and far."""
    task, step = TASKS[name](), 0.3
    x = {"x": random(0, 1, *task.upper["x"].shape)}
    p = random(-0.6, 0.6, *task.lower["y"].shape, seed=1)
    p[0, : p.shape[1] // 2] *= 0.1

    def value(q):
        return 0.5 * (q - p).square().sum() + step * task.nonsmooth_lower(x, {"y": q})

    q = task.prox_lower(x, {"y": p}, step)["y"]
    generator = torch.Generator().manual_seed(2)
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(700):
            assert value(q + scale * torch.randn(q.shape, generator=generator)) > value(q)
    assert (q == 0).any()
    assert (q != 0).any()


def test_nonsmooth_terms_by_hand():
    task = Lasso(n=2)
    x, y = torch.tensor([[0.5, 2.0]]), torch.tensor([[-3.0, 0.25]])
    assert task.nonsmooth_lower({"x": x}, {"y": y}).item() == 2.0
    task = GroupLasso(m=15, groups=3, samples=2)
    y = torch.zeros(1, 15)
    y[0, 0], y[0, 1], y[0, 10] = 3, 4, -2
    x = torch.tensor([[0.5, 1.0, 2.0]], requires_grad=True)
    value = task.nonsmooth_lower({"x": x}, {"y": y})
    assert value.item() == 6.5
    (slope,) = torch.autograd.grad(value, x)
    assert slope.tolist() == [[5.0, 0.0, 2.0]]


# Group lasso.


def test_data_of_group_lasso():
    task = GroupLasso(m=600, groups=30)
    signal = task.features @ task.coefficients
    assert task.features.shape == (3, 100, 600)
    assert (signal.norm() / (task.responses - signal).norm()).item() == pytest.approx(2, abs=1e-12)
    for part in range(3):
        ratio = (signal[part].norm() / (task.responses[part] - signal[part]).norm()).item()
        assert 1.6 < ratio < 2.5
    assert abs(task.features.mean().item()) < 0.01
    assert task.features.var().item() == pytest.approx(1, abs=0.01)
    assert task.coefficients.nonzero().flatten().tolist() == [*range(5), *range(200, 205), *range(400, 405)]
    assert task.coefficients.square().sum() == 165
    same, other = GroupLasso(m=600, groups=300), GroupLasso(seed=1)
    assert torch.equal(task.responses, same.responses)
    assert not torch.equal(task.responses, other.responses)


def test_losses_and_errors_of_group_lasso():
    task = GroupLasso(m=15, groups=5, samples=4)
    y = random(-1, 1, 2, 15)
    squares = [(task.responses[i] - y[1] @ task.features[i].T).square().mean() for i in range(3)]
    assert task.g(None, y)[1].item() == pytest.approx(0.5 * squares[0].item())
    assert task.f(None, y)[1].item() == pytest.approx(0.5 * squares[1].item())
    assert task.squared_error(y, 2)[1].item() == pytest.approx(squares[2].item())
    assert set(task.metrics(())) == {"validation_error", "test_error"}


# Starts.


@pytest.mark.parametrize("name", TASKS)
def test_starts_are_drawn_from_the_ranges(name):
    task, same, other = TASKS[name](starts=200), TASKS[name](starts=200), TASKS[name](starts=200, seed=1)
    for level, part in enumerate(("upper", "lower")):
        (value,) = getattr(task, part).values()
        (low, high) = task.ranges[level]
        assert len(value) == 200
        assert low <= value.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < value.max() <= high
        assert torch.equal(value, next(iter(getattr(same, part).values())))
        assert not torch.equal(value, next(iter(getattr(other, part).values())))


def test_starts_can_be_named():
    task = MerelyConvex(n=2, starts=[(1, 2), (3, -4.5)])
    assert task.upper["x"].tolist() == [[1, 1], [3, 3]]
    assert task.lower["y"].tolist() == [[2] * 4, [-4.5] * 4]
    assert BDACounterExample().project_upper({"x": torch.tensor([[-300.0, 7.0, 200.0]])})["x"].tolist() == [
        [-100, 7, 100]
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PBGDToy(starts=0), "PBGDToy.starts"),
        (lambda: SinProblem(starts=[]), "SinProblem.starts"),
        (lambda: SinProblem(starts=[(1, 2, 3)]), "SinProblem.starts"),
        (lambda: SineSum(ranges=((2, 1), (0, 1))), "SineSum.ranges"),
        (lambda: Lasso(n=3), "Lasso.n"),
        (lambda: MerelyConvex(n=0), "MerelyConvex.n"),
        (lambda: GroupLasso(m=600, groups=7), "GroupLasso.groups=7"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(BilevelError, match=message):
        make()


def points(name):
    task = TASKS[name](starts=3)
    return task, task.upper["x"].detach().clone(), task.lower["y"].detach().clone()


def descend(task, steps=5):
    """RHG with plain gradient descent on both levels, by the oracles; returns x and y."""
    module = RHG(task=task, lower_steps=4, dynamics=GradientDescent(0.05))
    for _ in range(steps):
        problem, x, _ = bind(task, {"lower": (), "upper": ()}, tree.detach(tree.of(task.upper)))
        step = module.bilevel_step(problem, x, tree.detach(tree.of(task.lower)))
        tree.assign(task.upper, task.project_upper(tree.axpy(-0.05, step.upper_grad, x)))
        tree.assign(task.lower, step.lower)
    return task.upper["x"].detach(), task.lower["y"].detach()


@pytest.mark.parametrize("name", TASKS)
def test_starts_run_independently(name):
    """A run of three starts is three runs of one."""
    task, x, y = points(name)
    together = descend(task)
    assert not torch.equal(together[0], x)
    for i in range(3):
        alone = TASKS[name]()
        tree.assign(alone.upper, {"x": x[i : i + 1]})
        tree.assign(alone.lower, {"y": y[i : i + 1]})
        for all_starts, one in zip(together, descend(alone), strict=True):
            assert (all_starts[i] - one[0]).abs().max() < 1e-12


def test_errors_are_relative_and_to_the_nearest_solution():
    task = PBGDToy(starts=[(0.4, -0.5), (2.8, -2.5), (1.0, -1.0)])
    x, y = task.solutions()
    errors = task.errors(task.upper["x"], task.lower["y"])
    for i, j in enumerate((0, 2, 1)):
        assert errors["x"][i].item() == pytest.approx(abs(task.upper["x"][i].item() - x[j].item()) / x[j].item())
        assert errors["y"][i].item() == pytest.approx(abs(task.lower["y"][i].item() - y[j].item()) / x[j].item())
    found = task.metrics(())
    assert found["error_x"] == errors["x"].mean()
    assert found["error_y_max"] == errors["y"].max()
    gap = task.f(task.upper["x"], -task.upper["x"]).mean() - task.hyper_objective(x)[1]
    assert found["hyper_gap"].item() == pytest.approx(gap.item())
    trap = GPBGDTrap(starts=[(0.25, -0.5)])
    assert {n: e.item() for n, e in trap.errors(trap.upper["x"], trap.lower["y"]).items()} == {"x": 0.25, "y": 0.5}
    strong = StronglyConvex(n=4, starts=[(0.75, 0.5)])
    assert strong.metrics(())["error_x"].item() == pytest.approx(0.5)
    assert "error_x_max" not in strong.metrics(())


# Whole runs.


# where x is in the nonsmooth term alone
@pytest.mark.filterwarnings("ignore:The losses use no gradient of the upper variables")
@pytest.mark.parametrize("name", TASKS)
def test_a_run_of_the_trainer(name, tmp_path):
    """From float32, as a config makes a task, to double precision; the report and, for one x and one y, the picture."""
    torch.set_default_dtype(torch.float32)
    task = TASKS[name](starts=4)
    module = RHG(
        task=task,
        lower_steps=3,
        dynamics=GradientDescent(0.1),
        upper_optimizer=lambda params: torch.optim.SGD(params, lr=0.01),
    )
    logger = CSVLogger(tmp_path, name="", version="")
    loop = trainer(6, tmp_path, precision="64-true", log_every_n_steps=2, logger=logger)
    loop.fit(module, datamodule=NoData(iterations=6))
    assert loop.global_step == 6
    assert {t.dtype for t in [*task.parameters(), *task.buffers()]} == {torch.float64}
    assert len((tmp_path / "ends.csv").read_text().splitlines()) == 5
    assert (tmp_path / "paths.png").exists() == (task.upper["x"].shape[1] == task.lower["y"].shape[1] == 1)
    wanted = ["test_error"] if name == "group" else ["error_x", "error_y", "error_x_max", "hyper_gap"]
    for metric in wanted:
        assert torch.isfinite(loop.callback_metrics[f"train/{metric}"])
        assert loop.callback_metrics[f"val/{metric}"] == loop.callback_metrics[f"train/{metric}"]
    if name != "group":
        assert {t.dtype for t in task.solutions()} == {torch.float64}


def test_double_precision_keeps_solutions_exact():
    torch.set_default_dtype(torch.float32)
    tasks = [PBGDToy(), Lasso(n=6), SineSum(n=3)]
    for task in tasks:
        assert task.upper["x"].dtype == torch.float32
        x, y = task.double().solutions()
        assert task.errors(x, y)["x"].dtype == torch.float64
        assert task.errors(x, y)["x"].max() == 0
        assert (task.lower_solutions(x) - y).abs().amin(0).max() < 1e-15


def fit(task, algorithm, steps, lr, folder, **settings):
    """A run without a picture."""
    task.callbacks = lambda: [SolutionError()]
    module = algorithm(task=task, upper_optimizer=lambda params: torch.optim.SGD(params, lr=lr), **settings)
    loop = trainer(steps, folder, precision="64-true", log_every_n_steps=steps)
    loop.fit(module, datamodule=NoData(iterations=steps))
    return {name: value.item() for name, value in loop.callback_metrics.items()}


def test_rhg_finds_the_minimisers_of_the_toy(tmp_path):
    found = fit(PBGDToy(starts=50), RHG, 60, 0.05, tmp_path, lower_steps=8, dynamics=GradientDescent(0.1))
    assert found["train/error_x_max"] < 0.02
    assert found["train/error_y_max"] < 0.02


def test_implicit_differentiation_solves_the_strongly_convex_problem(tmp_path):
    found = fit(StronglyConvex(n=5), AIDCG, 12, 0.4, tmp_path, lower_steps=20, dynamics=GradientDescent(0.5))
    assert found["train/error_x"] < 1e-6
    assert found["train/hyper_gap"] < 1e-6


def test_rhg_does_not_solve_the_counter_example(tmp_path):
    """It never moves y_2 = 0 and ends at x = 1/2, as published."""
    task = BDACounterExample()
    found = fit(task, RHG, 12, 0.4, tmp_path, lower_steps=20, dynamics=GradientDescent(0.5))
    assert task.upper["x"].item() == pytest.approx(0.5, abs=1e-6)
    assert found["train/hyper_gap"] == pytest.approx(0.125, abs=1e-5)


def test_rhg_ends_in_a_local_solution_of_the_sin_problem(tmp_path):
    """Without a learnt start of the lower level it falls to x = 1, as measured for the paper's settings."""
    task = SinProblem(starts=[(1, 2), (3, 2)])
    fit(task, RHG, 40, 0.1, tmp_path, lower_steps=8, dynamics=GradientDescent(0.1))
    assert task.upper["x"].tolist() == [[1.0], [1.0]]
    assert (task.lower["y"] - math.pi / 2).abs().max() < 1e-6


def test_starts_from_a_config():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BilevelTask, "task")
    for starts, shape in (([[1, 2], [3, 2], [6, 0]], 3), (7, 7)):
        settings = {"class_path": "bilevel_lightning.tasks.SinProblem", "init_args": {"starts": starts}}
        task = parser.instantiate_classes(parser.parse_object({"task": settings})).task
        assert task.upper["x"].shape == (shape, 1)
    task = parser.instantiate_classes(parser.parse_object({"task": {"class_path": settings["class_path"]}})).task
    assert task.lower["y"].tolist() == [[2.0]]
