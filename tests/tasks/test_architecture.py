import pytest
import torch
from loops import trainer
from torch.nn.functional import cross_entropy

from bilevel_lightning import (
    DARTS,
    F2SA,
    MEHA,
    RHG,
    SAMA,
    VPBGD,
    Adam,
    BilevelError,
    GradientDescent,
    Momentum,
    hypergradient,
    tree,
)
from bilevel_lightning.binding import bind
from bilevel_lightning.datamodules import DigitsSearch
from bilevel_lightning.models import Genotype, SearchNetwork
from bilevel_lightning.tasks import ArchitectureSearch

OPERATIONS = ("none", "skip_connect", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_3x3")


def part(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.arange(samples) % 3


BATCH = {"lower": part(6, 0), "upper": part(5, 1)}


def tiny(edge_normalization=False, **settings):
    """Two nodes, five operations, 2 channels, in float64."""
    torch.manual_seed(0)
    network = SearchNetwork(
        (1, 8, 8), 3, channels=2, layers=3, nodes=2, operations=OPERATIONS, edge_normalization=edge_normalization
    )
    return ArchitectureSearch(network, scale=0.5, **settings).double()


def direction(values):
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in values.items()}


def difference(function, x, v, radius=1e-6):
    """The derivative of a scalar function along v, by central differences."""
    return (function(tree.axpy(radius, v, x)) - function(tree.axpy(-radius, v, x))) / (2 * radius)


def test_losses_are_the_formulas():
    task = tiny(l2=0.02, upper_l2=0.03)
    (images, labels), (other, targets) = BATCH["lower"], BATCH["upper"]
    squares = sum(p.square().sum().item() for p in task.lower.parameters())
    expected = cross_entropy(task.lower(images, task.upper()), labels).item() + 0.02 * squares
    assert task.lower_loss((images, labels)).item() == pytest.approx(expected, rel=1e-12)
    squares = sum(p.square().sum().item() for p in task.upper.parameters())
    expected = cross_entropy(task.lower(other, task.upper()), targets).item() + 0.03 * squares
    assert task.upper_loss((other, targets)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("edge_normalization", [False, True])
def test_derivatives_in_x_agree_with_finite_differences(edge_normalization):
    task = tiny(edge_normalization, upper_l2=0.01)
    problem, x, _ = bind(task, BATCH, tree.clone(tree.of(task.upper)))
    y = tree.clone(tree.of(task.lower))
    v, w = direction(x), direction(y)
    f_x, f_y = problem.grad_f(x, y)
    _, g_x, _ = problem.values_and_gradients(x, y)
    assert float(tree.dot(f_x, v)) == pytest.approx(difference(lambda x: problem.f(x, y), x, v).item(), abs=1e-6)
    assert float(tree.dot(f_y, w)) == pytest.approx(difference(lambda y: problem.f(x, y), y, w).item(), abs=1e-6)
    assert float(tree.dot(g_x, v)) == pytest.approx(difference(lambda x: problem.g(x, y), x, v).item(), abs=1e-6)
    product, cross = (apply(w) for apply in problem.hessian_products(x, y))
    along = difference(lambda x: tree.dot(problem.grad_g(x, y), w), x, v)
    assert float(tree.dot(cross, v)) == pytest.approx(along.item(), abs=1e-6)
    along = difference(lambda y: tree.dot(problem.grad_g(x, y), w), y, w)
    assert float(tree.dot(product, w)) == pytest.approx(along.item(), abs=1e-5)
    assert abs(float(tree.dot(cross, v))) > 1e-3  # otherwise the comparison would say nothing


def test_the_hypergradient_of_two_steps_agrees_with_finite_differences():
    task = tiny(edge_normalization=True)
    x = tree.clone(tree.of(task.upper))
    settings = {"dynamics": GradientDescent(0.05), "lower_steps": 2}
    found = hypergradient(task, x, batch=BATCH, method="RHG", **settings)
    problem, _, _ = bind(task, BATCH, x)
    module, start = RHG(**settings), tree.clone(tree.of(task.lower))
    v = direction(x)
    along = difference(lambda x: problem.f(x, module.solve_lower(problem, x, start)), x, v)
    assert float(tree.dot(found, v)) == pytest.approx(along.item(), abs=1e-6)


def written_out(task, x, y, lr, radius):
    """DARTS: f_x(x, y') - lr (g_x(x, y+) - g_x(x, y-)) / (2 eps), by plain autograd on the network."""

    def gradient(loss, wrt, x, y):
        with torch.no_grad():
            for level, values in ((task.upper, x), (task.lower, y)):
                for name, p in level.named_parameters():
                    p.copy_(values[name])
        grads = torch.autograd.grad(loss(), [*wrt.parameters()])
        return dict(zip((name for name, _ in wrt.named_parameters()), grads, strict=True))

    def f():
        return cross_entropy(task.lower(BATCH["upper"][0], task.upper()), BATCH["upper"][1])

    def g():
        images, labels = BATCH["lower"]
        return cross_entropy(task.lower(images, task.upper()), labels) + task.l2 * sum(
            p.square().sum() for p in task.lower.parameters()
        )

    after = {n: y[n] - lr * d for n, d in gradient(g, task.lower, x, y).items()}
    f_x, f_y = gradient(f, task.upper, x, after), gradient(f, task.lower, x, after)
    eps = radius / sum(float(t.square().sum()) for t in f_y.values()) ** 0.5
    above = gradient(g, task.upper, x, {n: y[n] + eps * f_y[n] for n in y})
    below = gradient(g, task.upper, x, {n: y[n] - eps * f_y[n] for n in y})
    return {n: f_x[n] - lr * (above[n] - below[n]) / (2 * eps) for n in x}, f_x


def test_darts_of_both_orders_is_its_formula():
    task = tiny()
    x, y = tree.clone(tree.of(task.upper)), tree.clone(tree.of(task.lower))
    settings = {"batch": BATCH, "method": "DARTS", "dynamics": GradientDescent(0.1)}
    second = hypergradient(task, x, y, order=2, **settings)
    first = hypergradient(task, x, y, order=1, **settings)
    expected, f_x = written_out(task, x, y, 0.1, 0.01)
    for name in x:
        assert torch.allclose(second[name], expected[name], rtol=1e-9, atol=1e-12)
        assert torch.allclose(first[name], f_x[name], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(first[name], second[name], rtol=1e-4)


def search(cls, steps=1, folder=None, logger=False, **settings):
    torch.manual_seed(0)
    network = SearchNetwork((1, 8, 8), channels=2, layers=3, nodes=2)
    module = cls(task=ArchitectureSearch(network), **settings)
    if not logger:
        module.task.callbacks = list
    before = {n: p.detach().clone() for n, p in module.task.named_parameters()}
    loop = trainer(steps, folder, logger=logger, limit_val_batches=int(logger))
    loop.fit(module, datamodule=DigitsSearch(samples=80, lower_batch_size=8, upper_batch_size=8, epoch_length=steps))
    after = dict(module.task.named_parameters())
    return module, {n for n, t in before.items() if not torch.equal(t, after[n])}, loop


ALGORITHMS = {
    "MEHA": (MEHA, {"gamma": 200.0, "c": 2.0, "lower_lr": 0.025, "dynamics": GradientDescent(0.025)}),
    "DARTS, order 2": (DARTS, {"dynamics": Momentum(0.025)}),
    "DARTS, order 1": (DARTS, {"order": 1, "dynamics": Momentum(0.025)}),
    "SAMA": (SAMA, {"dynamics": Adam(1e-3)}),
    "VPBGD": (VPBGD, {"lower_lr": 0.025, "dynamics": GradientDescent(0.025), "lower_steps": 1}),
    "F2SA": (F2SA, {"dynamics": GradientDescent(0.025), "lower_steps": 1}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_step_of_each_algorithm_changes_all_of_x_and_y(name):
    cls, settings = ALGORITHMS[name]
    module, changed, _ = search(cls, **settings)
    assert changed == {n for n, _ in module.task.named_parameters()}


def test_a_search_with_meha_ends_in_a_valid_genotype(tmp_path):
    cls, settings = ALGORITHMS["MEHA"]
    module, _, loop = search(cls, 4, tmp_path, logger=True, **settings)
    genotype = Genotype.load(f"{loop.log_dir}/genotype.json")
    assert genotype == module.task.upper.genotype()
    assert len(genotype.normal) == len(genotype.reduction) == 2


def test_accuracy_and_predictions():
    task = tiny()
    images, labels = BATCH["upper"]
    predicted = task.logits(images).argmax(1)
    found = task.predict((images, labels))
    assert torch.equal(found["predicted"], predicted)
    assert torch.equal(found["label"], labels)
    assert float(task.metrics(BATCH)["accuracy"]) == pytest.approx(float((predicted == labels).double().mean()))


def test_settings_and_data_that_do_not_fit():
    network = SearchNetwork((1, 8, 8), 3, channels=2, layers=3, nodes=1)
    with pytest.raises(BilevelError, match="l2 must not be negative"):
        ArchitectureSearch(network, l2=-1.0)
    with pytest.raises(BilevelError, match="upper_l2 must not be negative"):
        ArchitectureSearch(network, upper_l2=-1.0)
    data = DigitsSearch()
    with pytest.raises(BilevelError, match="The data have 10 classes: set task.network.classes to that, not to 3"):
        ArchitectureSearch(network).check_data(data)
    with pytest.raises(BilevelError, match=r"image_shape is \(3, 32, 32\) but the data's images"):
        ArchitectureSearch(SearchNetwork(channels=2, layers=3, nodes=1)).check_data(data)
    with pytest.raises(BilevelError, match="order must be 1 or 2, got 3"):
        DARTS(order=3)
