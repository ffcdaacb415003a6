"""Equilibrium models: the map by hand, hypergradients, the contraction, stored states, evaluation in chunks."""

import copy

import pytest
import torch
from episodic import Given
from loops import trainer
from pytorch_lightning import LightningDataModule
from torch.nn.functional import cross_entropy, unfold

from bilevel_lightning import RHG, TRHG, AIDNeumann, Anderson, BilevelError, FixedPoint, hypergradient, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.datamodules import DigitsEquilibrium
from bilevel_lightning.linear_solvers import Neumann
from bilevel_lightning.models import ConvolutionalCell, DenseCell
from bilevel_lightning.tasks import Equilibrium

SHAPE, SAMPLES = (1, 8, 8), 12


def equilibrium(kind="dense", seed=0, scale=1.0, **settings):
    torch.manual_seed(seed)
    cell = DenseCell(SHAPE, units=6, std=0.3) if kind == "dense" else ConvolutionalCell(SHAPE, channels=3)
    task = Equilibrium(cell, classes=4, **settings).double()
    with torch.no_grad():
        task.upper["head"].weight.mul_(50)
        task.upper["head"].bias.normal_()
    return task


def data(n=SAMPLES, seed=1):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(n, *SHAPE, generator=g, dtype=torch.float64)
    return {"lower": (images, torch.arange(n)), "upper": torch.randint(4, (n,), generator=g)}


kinds = pytest.mark.parametrize("kind", ["dense", "convolutional"])


def phi(task, h, images):
    """The map, written out: matrices and sums over patches."""
    x = {name.removeprefix("cell."): p for name, p in task.upper.named_parameters()}
    if "A" in x and x["A"].ndim == 2:
        return torch.tanh(torch.einsum("nd,de->ne", h, x["A"]) + images.reshape(len(h), -1) @ x["B"] + x["c"])

    def convolve(kernel, maps):
        patches = unfold(maps, 3, padding=1).view(len(maps), -1, *maps.shape[-2:])
        return torch.einsum("npij,op->noij", patches, kernel.flatten(1))

    inputs = convolve(x["B"], images).view(len(h), 3, 4, 2, 4, 2).amax((3, 5))
    return torch.tanh(convolve(x["A"], h) + inputs + x["c"].view(1, -1, 1, 1))


def scores(task, h):
    if h.ndim == 4:
        h = h.view(len(h), 3, 2, 2, 2, 2).amax((3, 5))
    head = task.upper["head"]
    return h.reshape(len(h), -1) @ head.weight.T + head.bias


@kinds
def test_both_levels_by_hand(kind):
    task, batch = equilibrium(kind), data()
    problem, x, _ = bind(task, batch, tree.of(task.upper))
    h = torch.randn(SAMPLES, *task.cell.state_shape, dtype=torch.float64)
    images, labels = batch["lower"][0], batch["upper"]
    image = phi(task, h, images)
    torch.testing.assert_close(problem.fixed_point(x, {"h": h})["h"], image, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(problem.g(x, {"h": h}), 0.5 * (image - h).square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(problem.f(x, {"h": h}), cross_entropy(scores(task, h), labels), rtol=1e-12, atol=0)
    found = problem.evaluate("metrics", x, {"h": h})
    residual = [(i - j).norm() / i.norm() / 0.5 for i, j in zip(image, h, strict=True)]
    torch.testing.assert_close(found["opt_metric"], torch.stack(residual), rtol=1e-12, atol=0)
    torch.testing.assert_close(found["accuracy"], (scores(task, h).argmax(1) == labels).double())
    torch.testing.assert_close(found["upper_loss"].mean(), problem.f(x, {"h": h}))


def by_hand(task, batch, steps):
    """The gradient of f at the states after some steps from zero, by autograd through all of them."""
    h = torch.zeros(len(batch["upper"]), *task.cell.state_shape, dtype=torch.float64)
    for _ in range(steps):
        h = phi(task, h, batch["lower"][0])
    x = tree.of(task.upper)
    return tree.grad(cross_entropy(scores(task, h), batch["upper"]), x)[0]


def distance(a, b):
    return float(tree.norm(tree.axpy(-1.0, b, a)) / tree.norm(b))


@kinds
def test_hypergradients(kind):
    """Unrolled is autograd's of the same steps; implicit is that of the fixed point, and agrees with T = K = 20."""
    task, batch = equilibrium(kind), data()
    settings = {"batch": batch, "dynamics": FixedPoint()}
    for steps in (3, 20):
        unrolled = hypergradient(task, method=RHG, lower_steps=steps, **settings)
        assert distance(unrolled, by_hand(task, batch, steps)) < 1e-12
    implicit = hypergradient(task, method=AIDNeumann, lower_steps=20, linear_solver=Neumann(20), **settings)
    assert 0 < distance(implicit, unrolled) <= 1e-5
    limit = by_hand(task, batch, 80)
    exact = hypergradient(task, method=AIDNeumann, lower_steps=80, linear_solver=Neumann(80), **settings)
    assert distance(exact, limit) < 1e-12
    short = hypergradient(task, method=AIDNeumann, lower_steps=3, linear_solver=Neumann(3), **settings)
    assert 1e-6 < distance(short, limit) < 0.2


def test_hypergradient_by_finite_differences():
    task, batch = equilibrium(), data()
    gradient = hypergradient(task, method=RHG, batch=batch, dynamics=FixedPoint(), lower_steps=30)
    x = tree.clone(tree.of(task.upper))
    u = {name: torch.randn_like(t) for name, t in x.items()}

    @torch.no_grad()
    def value(shift):
        tree.assign(task.upper, tree.axpy(shift, u, x))
        h = torch.zeros(SAMPLES, 6, dtype=torch.float64)
        for _ in range(30):
            h = phi(task, h, batch["lower"][0])
        return float(cross_entropy(scores(task, h), batch["upper"]))

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    assert abs(float(tree.dot(gradient, u)) - slope) < 1e-8 * (1 + abs(slope))


def test_anderson_reaches_a_slow_fixed_point_sooner():
    task, batch = equilibrium(radius=0.95), data()
    with torch.no_grad():
        task.upper["cell"].A.mul_(10)
    tree.assign(task.upper, task.project_upper(tree.clone(tree.of(task.upper))))
    errors = []
    for dynamics in (FixedPoint(), Anderson()):
        module = AIDNeumann(task=task, dynamics=dynamics, lower_steps=1, evaluation_steps=12)
        *_, y = module.solved(batch)[2]
        errors.append(float((phi(task, y["h"], batch["lower"][0]) - y["h"]).detach().norm()))
    assert errors[1] < 0.1 * errors[0]


# The contraction.


def operator(kernel, side):
    """The matrix of the zero-padded convolution on maps of side ``side``."""
    maps = torch.eye(kernel.shape[1] * side**2, dtype=kernel.dtype).view(-1, kernel.shape[1], side, side)
    return torch.nn.functional.conv2d(maps, kernel, padding=kernel.shape[-1] // 2).flatten(1)


def large(task):
    return {name: 3 * torch.randn_like(t) for name, t in tree.of(task.upper).items()}


@kinds
@pytest.mark.parametrize("radius", [0.3, 0.9])
def test_projected_weights_contract(kind, radius):
    task = equilibrium(kind, radius=radius)
    before = large(task)
    once = task.project_upper(tree.clone(before))
    matrix = once["cell.A"] if kind == "dense" else operator(once["cell.A"], 4)
    assert 0.5 * radius < torch.linalg.matrix_norm(matrix, 2) <= radius * (1 + 1e-12)
    again = task.project_upper(tree.clone(once))
    assert max(float((again[n] - once[n]).abs().max()) for n in once) < 1e-12
    torch.testing.assert_close(once["head.weight"], before["head.weight"].clamp(-1, 1))
    assert torch.equal(once["cell.B"], before["cell.B"])
    tree.assign(task.upper, once)
    h, k = torch.randn(2, 5, *task.cell.state_shape, dtype=torch.float64)
    images = data(5)["lower"][0]
    assert (phi(task, h, images) - phi(task, k, images)).norm() <= radius * (h - k).norm()


def test_weights_contract_from_the_beginning():
    torch.manual_seed(0)
    task = Equilibrium(DenseCell(SHAPE, units=50, std=1.0), radius=0.4)
    assert torch.linalg.matrix_norm(task.cell.A, 2) <= 0.4 * (1 + 1e-4)  # of 14, in float32
    assert task.upper["head"].weight.abs().max() < 0.1
    assert not task.upper["head"].bias.any()


# Warm start and the training loop.


def learner(task, algorithm=AIDNeumann, lr=0.5, **settings):
    if algorithm is AIDNeumann:
        settings = {"linear_solver": Neumann(3), **settings}
    sgd = lambda params: torch.optim.SGD(params, lr=lr)
    return algorithm(task=task, dynamics=FixedPoint(), lower_steps=3, upper_optimizer=sgd, **settings)


def part(batch, index):
    index = torch.tensor(index)
    return {"lower": (batch["lower"][0][index], index), "upper": batch["upper"][index]}


class Parts(LightningDataModule):
    """Minibatches of given samples."""

    image_shape, classes, train_samples = SHAPE, 4, SAMPLES

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def loader(self):
        return Given(part(data(), p) for p in self.parts)

    train_dataloader = loader


class Chunks(Parts):
    val_dataloader = Parts.loader


def test_states_are_stored_by_sample_and_are_the_next_start():
    task, first, second = equilibrium(stored_states=SAMPLES), [0, 3, 4], [3, 7]
    x = copy.deepcopy(task)
    trainer(2).fit(learner(task), datamodule=Parts([first, second]))
    h = torch.zeros(3, 6, dtype=torch.float64)
    want = torch.zeros(SAMPLES, 6, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            h = phi(x, h, data()["lower"][0][first])
        want[first] = h
        trainer(1).fit(learner(x), datamodule=Parts([first]))  # the second iteration's x
        h = want[second]
        assert h[0].abs().min() > 1e-3
        assert not h[1].any()
        for _ in range(3):
            h = phi(x, h, data()["lower"][0][second])
        want[second] = h
    torch.testing.assert_close(task.stored, want, rtol=1e-12, atol=1e-14)
    assert not task.stored[[1, 2, 5, 6, 8, 9, 10, 11]].any()
    assert not task.eval().episode_lower({}, part(data(), first))["h"].any()


def test_a_warm_started_run_is_resumed_bit_for_bit(tmp_path):
    """Seven iterations, of which three begin the second visit of the samples, in one run and in two."""
    digits = lambda: DigitsEquilibrium(batch_size=250, epoch_length=3)
    whole, second = (Equilibrium(DenseCell(SHAPE, units=8), stored_states=1000) for _ in range(2))
    first = copy.deepcopy(whole)
    trainer(7).fit(learner(whole), datamodule=digits())
    run = trainer(5)
    run.fit(learner(first), datamodule=digits())
    run.save_checkpoint(tmp_path / "half.ckpt")
    trainer(7).fit(learner(second), datamodule=digits(), ckpt_path=tmp_path / "half.ckpt")
    assert not torch.equal(first.stored, whole.stored)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_evaluation_in_chunks_is_that_of_the_whole():
    task, module_of = equilibrium(), lambda task: learner(task, evaluation_steps=20)
    found = []
    for chunks in ([range(12)], [range(5), range(5, 10), range(10, 12)], [[i] for i in range(12)]):
        run = trainer(1)
        (values,) = run.validate(module_of(task), datamodule=Chunks([list(c) for c in chunks]), verbose=False)
        found.append(values)
    for key in ("upper_loss", "accuracy", "opt_metric", "hg_norm", "prox_map_norm", "accuracy_ci95"):
        for values in found[1:]:
            assert abs(values[f"val/{key}"] - found[0][f"val/{key}"]) < 1e-6 * (1 + abs(found[0][f"val/{key}"])), key
    gradient = by_hand(task, data(), 60)
    x = tree.detach(tree.of(task.upper))
    moved = task.project_upper(tree.axpy(-1.0, gradient, x))
    assert found[0]["val/hg_norm"] == pytest.approx(float(tree.norm(gradient) ** 2), rel=1e-4)
    assert found[0]["val/prox_map_norm"] == pytest.approx(float(tree.norm(tree.axpy(-1.0, moved, x)) ** 2), rel=1e-4)


@pytest.mark.parametrize("algorithm", [AIDNeumann, TRHG])
def test_digits_are_learnt(algorithm):
    torch.manual_seed(0)
    task = Equilibrium(DenseCell(SHAPE, units=30), stored_states=1000)
    settings = {"truncation": 2} if algorithm is TRHG else {}
    run = trainer(120)
    run.fit(learner(task, algorithm, evaluation_steps=20, **settings), datamodule=DigitsEquilibrium(epoch_length=120))
    assert run.callback_metrics["val/accuracy"] > 0.85
    assert run.callback_metrics["val/opt_metric"] < 1e-4
    assert torch.linalg.matrix_norm(task.cell.A, 2) <= 0.5 * (1 + 1e-5)
    assert task.stored.abs().amax(1).all()  # an epoch visits every sample


def test_predictions():
    task, batch = equilibrium(), data()
    (columns,) = trainer(1).predict(learner(task, evaluation_steps=60), Given([batch]))
    h = torch.zeros(SAMPLES, 6, dtype=torch.float64)
    for _ in range(60):
        h = phi(task, h, batch["lower"][0])
    assert torch.equal(columns["predicted"], scores(task, h).argmax(1))
    assert torch.equal(columns["index"], batch["lower"][1])
    assert torch.equal(columns["label"], batch["upper"])


# Errors.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 1.0}, r"radius must be in \(0, 1\)"),
        ({"stored_states": -1}, "stored_states"),
        ({"weight_bound": 0.0}, "weight_bound"),
        ({"classes": 0}, "classes"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        Equilibrium(DenseCell(SHAPE), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_shape": (1, 6, 8)}, "divisible by 4"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"channels": 0}, "channels"),
    ],
)
def test_impossible_cells(settings, message):
    with pytest.raises(BilevelError, match=message):
        ConvolutionalCell(**settings)


def test_data_that_do_not_fit():
    for task, message in (
        (equilibrium(stored_states=5), "set task.stored_states"),
        (Equilibrium(DenseCell(SHAPE)), "set task.classes"),
        (Equilibrium(DenseCell((1, 4, 4)), classes=4), "set its image_shape"),
        (Equilibrium(ConvolutionalCell((1, 16, 16), channels=2), classes=4), "set its image_shape"),
    ):
        with pytest.raises(BilevelError, match=message):
            trainer(1).fit(learner(task), datamodule=Parts([[0]]))
