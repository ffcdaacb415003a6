import pytest
import torch
from problems import Nonlinear, Quadratic, Vector
from torch import nn

from bilevel_lightning import BilevelError, BilevelProblem, BilevelTask, GradientDescent, Minibatches, tree
from bilevel_lightning.binding import bind, split
from bilevel_lightning.hypergradients import reverse


def identity(values):
    return values


def setup(task, batch=None):
    problem, x, pull_back = bind(task, batch, tree.detach(tree.of(task.upper)), identity)
    return problem, x, tree.detach(tree.of(task.lower)), pull_back


def flat(values):
    return torch.cat([t.flatten() for t in values.values()])


def test_oracles_of_the_quadratic():
    task = Quadratic()
    problem, x, y, _ = setup(task)
    vector = flat(y)
    f_x, f_y = problem.grad_f(x, y)
    torch.testing.assert_close(f_x["x"], task.rho * x["x"])
    torch.testing.assert_close(flat(f_y), vector - task.c)
    torch.testing.assert_close(flat(problem.grad_g(x, y)), task.A @ vector - task.B @ x["x"])
    g_yy, g_xy = problem.hessian_products(x, y)
    for _ in range(2):  # the graph serves any number of products
        torch.testing.assert_close(flat(g_yy(y)), task.A @ vector)
        torch.testing.assert_close(g_xy(y)["x"], -task.B.T @ vector)
    # the second lower gradient is the one that the products differentiate
    counts = {"upper_gradients": 1, "lower_gradients": 2, "hessian_products": 2, "cross_products": 2, "samples": 0}
    assert problem.counts == counts


def test_oracles_leave_the_task_alone():
    task = Nonlinear()
    before = {name: p.clone() for name, p in task.named_parameters()}
    problem, x, y, _ = setup(task)
    problem.grad_f(tree.axpy(1.0, x, x), y)
    problem.grad_g(x, tree.axpy(1.0, y, y))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in task.named_parameters())


def test_untracked_gradient_has_no_graph_and_tracked_has_one():
    problem, x, y, _ = setup(Nonlinear())
    assert not any(t.requires_grad for t in problem.grad_g(tree.leaf(x), y).values())
    assert all(t.requires_grad for t in problem.grad_g(tree.leaf(x), tree.leaf(y), track=True).values())


def test_frozen_parameters_are_left_out():
    task = Nonlinear()
    task.lower.b.requires_grad_(False)
    problem, x, y, _ = setup(task)
    assert list(y) == ["w"]
    assert list(problem.grad_g(x, y)) == ["w"]
    assert not task.lower.b.requires_grad


def test_tied_parameters_are_one_variable():
    class Tied(BilevelTask):
        def __init__(self):
            super().__init__()
            self.upper = Vector(x=torch.tensor(0.5, dtype=torch.float64))
            self.lower = nn.Module()
            self.lower.a = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
            self.lower.b = self.lower.a

        def lower_loss(self, batch):
            return self.lower.a * self.lower.b * self.upper.x

    problem, x, y, _ = setup(Tied())
    assert list(y) == ["a"]
    moved = {"a": torch.tensor(3.0, dtype=torch.float64)}
    assert float(problem.g(x, moved)) == 4.5
    assert float(problem.grad_g(x, moved)["a"]) == 3.0


def test_minibatches_go_round():
    class Mean(BilevelTask):
        def __init__(self):
            super().__init__()
            self.upper, self.lower = Vector(x=torch.zeros(1)), Vector(y=torch.ones(1))

        def lower_loss(self, batch):
            return (self.lower.y * batch).sum()

    batch = {"lower": Minibatches([torch.tensor(2.0), torch.tensor(5.0)]), "upper": None}
    problem, x, y, _ = setup(Mean(), batch)
    assert [float(problem.grad_g(x, y, t)["y"]) for t in range(4)] == [2.0, 5.0, 2.0, 5.0]


@pytest.mark.parametrize(("keys", "expected"), [(("lower", "upper"), (1, 2)), (("support", "query"), (1, 2))])
def test_names_of_the_levels(keys, expected):
    assert split(dict(zip(keys, expected, strict=True))) == expected
    assert split("anything") == ("anything", "anything")
    with pytest.raises(BilevelError, match=r"keys 'lower' and 'upper' .* got \['image', 'label'\]"):
        split({"image": 1, "label": 2})


class Features(BilevelTask):
    """A shared backbone (upper) and a head (lower); the ridge factor is used beside the features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.upper = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 5), nn.Tanh())}).double()
        self.upper.register_parameter("ridge", nn.Parameter(torch.tensor(-1.0, dtype=torch.float64)))
        self.lower = nn.Linear(5, 2).double()
        self.calls = 0

    def features(self, images):
        self.calls += 1
        return self.upper["body"](images)

    def loss(self, features, labels):
        return nn.functional.cross_entropy(self.lower(features), labels)

    def lower_loss(self, batch):
        ridge = self.upper.ridge.exp() * self.lower.weight.square().sum()
        return self.loss(self.features(batch[0]), batch[1]) + ridge

    def upper_loss(self, batch):
        return self.loss(self.features(batch[0]), batch[1]) + 0.1 * self.upper.ridge.square()


class Prepared(Features):
    def prepare(self, batch):
        return {level: (self.features(images), labels) for level, (images, labels) in batch.items()}

    def lower_loss(self, batch):
        return self.loss(*batch) + self.upper.ridge.exp() * self.lower.weight.square().sum()

    def upper_loss(self, batch):
        return self.loss(*batch) + 0.1 * self.upper.ridge.square()


@pytest.mark.parametrize("memory", ["graph", "recompute"])
def test_prepare_is_exact_and_computes_features_once(memory):
    generator = torch.Generator().manual_seed(2)
    draw = lambda: (torch.randn(8, 3, generator=generator).double(), torch.arange(8) % 2)
    batch = {"lower": draw(), "upper": draw()}
    results = []
    for task in (Features(), Prepared()):
        problem, x, y, pull_back = setup(task, batch)
        gradient, y_end = reverse(problem, GradientDescent(0.5), x, y, 6, memory=memory)
        results.append((pull_back(gradient), y_end, task.calls))
    (plain, y_plain, _), (shared, y_shared, calls) = results
    assert list(plain) == list(shared)
    torch.testing.assert_close(flat(shared), flat(plain), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(flat(y_shared), flat(y_plain), rtol=1e-12, atol=1e-14)
    assert calls == 2  # once for each level, whatever T


def test_a_problem_from_two_functions():
    problem = BilevelProblem(lambda x, y: (y["y"] - 1).square().sum(), lambda x, y: (y["y"] - x["x"]).square().sum())
    x, y = {"x": torch.tensor([3.0])}, {"y": torch.tensor([0.0])}
    gradient, y = reverse(problem, GradientDescent(0.5), x, y, 1)
    assert (float(gradient["x"]), float(y["y"])) == (4.0, 3.0)
    with pytest.raises(BilevelError, match="no fixed-point map"):
        problem.fixed_point(x, y)


class Halves(Quadratic):
    """Losses that the batch scales."""

    def upper_loss(self, batch):
        return batch.mean() * super().upper_loss(batch)

    def lower_loss(self, batch):
        return batch.mean() * super().lower_loss(batch)


def minibatched():
    task = Halves()
    batch = {
        "lower": Minibatches([torch.tensor([1.0]), torch.tensor([2.0, 4.0])]),
        "upper": Minibatches([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0])]),
    }
    problem, x, _ = bind(task, batch, tree.detach(tree.of(task.upper)))
    return task, problem, x, tree.detach(tree.of(task.lower))


def test_the_upper_loss_is_the_mean_over_its_minibatches():
    task, problem, x, y = minibatched()
    f_x, f_y = problem.grad_f(x, y)
    torch.testing.assert_close(f_x["x"], 3 * task.rho * x["x"])
    torch.testing.assert_close(flat(f_y), 3 * (flat(y) - task.c))
    assert problem.counts["samples"] == 4


def test_only_some_minibatches():
    task, problem, x, y = minibatched()
    view = problem.only([1], [1])
    torch.testing.assert_close(flat(view.grad_g(x, y)), 3 * (task.A @ flat(y) - task.B @ x["x"]))
    torch.testing.assert_close(view.grad_f_x(x, y)["x"], 5 * task.rho * x["x"])
    assert problem.counts["samples"] == 2 + 1
    assert (view.minibatches, problem.minibatches) == (1, 2)
    torch.testing.assert_close(flat(problem.grad_g(x, y)), task.A @ flat(y) - task.B @ x["x"])


def test_gradient_and_products_in_one_evaluation():
    task, problem, x, y = minibatched()
    v = tree.axpy(2.0, y, y)
    g_y, product, cross = problem.gradient_and_products(x, y, v, 1)
    torch.testing.assert_close(flat(g_y), 3 * (task.A @ flat(y) - task.B @ x["x"]))
    torch.testing.assert_close(flat(product), 3 * task.A @ flat(v))
    torch.testing.assert_close(cross["x"], -3 * task.B.T @ flat(v))
    counts = {"lower_gradients": 1, "hessian_products": 1, "cross_products": 1, "samples": 6}
    assert problem.counts == counts
    assert not any(t.requires_grad for t in (*g_y.values(), *product.values(), *cross.values()))


def test_a_gradient_built_for_products_touches_their_samples_alone():
    _, problem, x, y = minibatched()
    g_yy, g_xy = problem.hessian_products(x, y, 1)
    assert problem.counts["samples"] == 0
    g_yy(y), g_xy(y)
    assert problem.counts["samples"] == 4


class Gathered(Halves):
    """Prepares each lower minibatch: half of what it holds, times x."""

    def prepare(self, batch):
        return {**batch, "lower": Minibatches([t * self.upper.x.sum() for t in batch["lower"]])}


def test_prepared_minibatches_are_upper_variables_of_their_own():
    task = Gathered()
    batch = {"lower": Minibatches([torch.ones(2), torch.full((3,), 2.0)]), "upper": torch.ones(1)}
    batch = {**batch, "lower": Minibatches([t.double() for t in batch["lower"]])}
    x, y = tree.detach(tree.of(task.upper)), tree.detach(tree.of(task.lower))
    problem, z, pull_back = bind(task, batch, x)
    assert {name: t.shape for name, t in z.items() if name != "x"} == {"prepared/0": (2,), "prepared/1": (3,)}
    _, cross = problem.hessian_products(z, y, 1)
    found = cross(y)
    assert not found["prepared/0"].any()
    whole = pull_back(found)["x"]
    total, vector = x["x"].sum(), flat(y)
    by_hand = lambda x: 2 * x.sum() * (vector @ task.A @ vector - vector @ task.B @ x)
    want = torch.autograd.functional.jacobian(by_hand, x["x"])
    torch.testing.assert_close(whole, want)
    torch.testing.assert_close(flat(problem.grad_g(z, y, 0)), total * (task.A @ vector - task.B @ x["x"]))


def test_the_product_with_g_yy_alone():
    """As the first of the two maps, with the same counts, and without a graph of x."""
    problem, x, y, _ = setup(Nonlinear())
    both, _ = problem.hessian_products(x, y)
    twice = problem.counts.copy()
    v = {name: torch.ones_like(t) for name, t in y.items()}
    problem.counts.clear()
    alone = problem.hessian_product(tree.leaf(x), y)
    assert problem.counts == twice
    torch.testing.assert_close(flat(alone(v)), flat(both(v)), rtol=1e-15, atol=0)
