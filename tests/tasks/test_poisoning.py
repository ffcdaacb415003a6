import numpy as np
import pytest
import torch
from loops import trainer
from scipy.optimize import minimize
from torch.nn.functional import cross_entropy

from bilevel_lightning import TRHG, BilevelError, GradientDescent, Minibatches, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.datamodules import DigitsPoisoning
from bilevel_lightning.hypergradients import implicit, reverse
from bilevel_lightning.linear_solvers import Dense
from bilevel_lightning.models import LinearNet
from bilevel_lightning.tasks import Poisoning

NORMS = {"l2": 2.0, "l1": 1.0, "linf": float("inf")}


@pytest.fixture(scope="module")
def data():
    data = DigitsPoisoning(samples=120)
    data.setup()
    return data


def task_of(data, ridge=50.0, model=None, **settings):
    torch.manual_seed(0)
    model = model or LinearNet((1, 8, 8), bias=False)
    task = Poisoning(model, len(data.poisoned[2]), (1, 8, 8), ridge=ridge, **settings).double()
    task.check_data(data)
    with torch.no_grad():
        task.upper.delta.copy_(task.upper.project(torch.randn_like(task.upper.delta)))
    return task


def doubled(data):
    images, labels, index = data.train
    return {"lower": (images.double(), labels, index), "upper": (data.val[0].double(), data.val[1])}


def in_minibatches(batch, *sizes):
    parts, seed = Minibatches(), torch.Generator().manual_seed(1)
    for size in sizes:
        chosen = torch.randint(len(batch["lower"][1]), (size,), generator=seed)  # an image can be in it twice
        parts.append(tuple(t[chosen] for t in batch["lower"]))
    return {**batch, "lower": parts}


def poisoned(task, delta, part):
    """The images written out one by one."""
    images, labels, index = part
    changed = [image + delta[i] if i >= 0 else image for image, i in zip(images, index.tolist(), strict=True)]
    return torch.stack(changed), labels


def test_losses_are_the_formulas(data):
    task, batch = task_of(data, ridge=0.1), doubled(data)
    with torch.no_grad():
        images, labels = poisoned(task, task.upper.delta, batch["lower"])
        weight = task.lower[1].weight
        logits = images.flatten(1) @ weight.T
        picked = logits.log_softmax(1)[torch.arange(len(labels)), labels]
        expected = -picked.mean() + 0.1 * weight.square().sum() / 640
        torch.testing.assert_close(task.lower_loss(batch["lower"]), expected)
        torch.testing.assert_close(task.lower_loss(task.prepare(batch)["lower"]), expected)
        val, val_labels = batch["upper"]
        torch.testing.assert_close(task.upper_loss(batch["upper"]), -cross_entropy(task.lower(val), val_labels))
        several = in_minibatches(batch, 7, 5)
        for raw, prepared in zip(several["lower"], task.prepare(several)["lower"], strict=True):
            images, labels = poisoned(task, task.upper.delta, raw)
            expected = cross_entropy(task.lower(images), labels) + 0.1 * weight.square().mean()
            torch.testing.assert_close(task.lower_loss(prepared), expected)
            torch.testing.assert_close(task.lower_loss(raw), expected)


def test_clean_images_carry_no_perturbation(data):
    """A minibatch holds its own poisoned images' perturbations and no others."""
    task, batch = task_of(data), in_minibatches(doubled(data), 9, 1, 12)
    clean = tuple(t[data.train[2] < 0][:4] for t in doubled(data)["lower"])
    batch["lower"].append(clean)
    for raw, (*part, where, delta) in zip(batch["lower"], task.prepare(batch)["lower"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(raw, part, strict=True))
        assert len(where) == len(delta) == int((raw[2] >= 0).sum())
        assert torch.equal(delta, task.upper.delta[raw[2][where]])
    assert len(delta) == 0


def gradient_of(task, batch, x):
    problem, z, pull_back = bind(task, batch, x)
    y = tree.detach(tree.of(task.lower))
    found, _ = reverse(problem, GradientDescent(0.3), z, y, 6)
    return pull_back(found)["delta"]


@pytest.mark.parametrize("several", [False, True])
def test_hypergradients_against_finite_differences(data, several):
    """Of a perturbation's pixel that is in no minibatch it is zero, of others the finite difference."""
    task, batch = task_of(data), doubled(data)
    batch = in_minibatches(batch, 6, 9, 4) if several else batch
    x = tree.detach(tree.of(task.upper))
    found = gradient_of(task, batch, x)

    def value(delta):
        y = tree.detach(tree.of(task.lower))
        parts = batch["lower"] if several else [batch["lower"]]
        for t in range(6):
            weight = y["1.weight"].requires_grad_()
            images, labels = poisoned(task, delta, parts[t % len(parts)])
            loss = cross_entropy(images.flatten(1) @ weight.T, labels) + 50 * weight.square().mean()
            (g_y,) = torch.autograd.grad(loss, weight)
            y = {"1.weight": (weight - 0.3 * g_y).detach()}
        return -float(cross_entropy(batch["upper"][0].flatten(1) @ y["1.weight"].T, batch["upper"][1]))

    generator, seen = torch.Generator().manual_seed(3), set()
    for part in batch["lower"] if several else [batch["lower"]]:
        seen |= set(part[2].tolist())
    for i in range(len(x["delta"])):
        if i not in seen:
            assert (found[i] == 0).all()
            continue
        row, column = torch.randint(8, (2,), generator=generator).tolist()
        values = []
        for shift in (1e-4, -1e-4):
            moved = x["delta"].clone()
            moved[i, 0, row, column] += shift
            values.append(value(moved))
        difference = (values[0] - values[1]) / 2e-4
        assert float(found[i, 0, row, column]) == pytest.approx(difference, rel=1e-5, abs=1e-10)
    assert len(seen) > 5


def test_implicit_hypergradient_of_the_solved_problem(data):
    """By the closed form of the linear model's derivatives: f_y g_yy^-1 g_xy, for one image's perturbation."""
    task, batch = task_of(data, ridge=640.0), doubled(data)
    x = tree.detach(tree.of(task.upper))
    problem, z, pull_back = bind(task, batch, x)
    y = tree.detach(tree.of(task.lower))
    for _ in range(300):
        y = tree.axpy(-0.4, problem.grad_g(z, y), y)
    assert float(tree.norm(problem.grad_g(z, y))) < 1e-12
    gradient, _ = implicit(problem, GradientDescent(0.4), z, y, Dense())
    found = pull_back(gradient)["delta"].flatten(1)

    images, labels = poisoned(task, x["delta"], batch["lower"])
    a, w, n = images.flatten(1), y["1.weight"], len(labels)
    p = (a @ w.T).softmax(1)
    hessian = sum(torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(u, u)) for u, q in zip(a, p, strict=True))
    hessian = hessian / n + 2 * torch.eye(640, dtype=torch.float64)  # ridge 640 / 640 entries
    val, val_labels = batch["upper"][0].flatten(1), batch["upper"][1]
    error = (val @ w.T).softmax(1) - torch.eye(10, dtype=torch.float64)[val_labels]
    v = torch.linalg.solve(hessian, -(error.T @ val).flatten() / len(val)).view(10, 64)
    for i in range(len(found)):
        k = int((batch["lower"][2] == i).nonzero())
        u, q, r = a[k], p[k], p[k] - torch.eye(10, dtype=torch.float64)[labels[k]]
        cross = r @ v + ((torch.diag(q) - torch.outer(q, q)) @ (v @ u)) @ w
        torch.testing.assert_close(found[i], -cross / n, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("norm", "radius"), [("l2", 0.9), ("l1", 3.0), ("linf", 0.15)])
def test_the_projection_is_the_nearest_point_by_a_quadratic_program(data, norm, radius):
    task = task_of(data, norm=norm, radius=radius)
    images = task.upper.images.flatten(1)
    point = torch.randn(images.shape, generator=torch.Generator().manual_seed(5)).double()
    found = task.project_upper({"delta": point.view_as(task.upper.delta)})["delta"].flatten(1)
    assert torch.equal(task.upper.project(found.view_as(task.upper.delta)).flatten(1), found)
    sizes = torch.linalg.vector_norm(found, NORMS[norm], 1)
    assert float(sizes.max()) <= radius * (1 + 1e-12)
    assert float((images + found).min()) >= 0
    assert float((images + found).max()) <= 1
    part = np.hstack([np.eye(64), -np.eye(64)])  # the point is a - b
    for p, u, q in zip(point[:10].numpy(), images.numpy(), found.numpy(), strict=False):
        # over a - b with a, b >= 0, so that all three norms are smooth: |a - b|_1 = sum(a + b) at the solution
        if norm == "linf":
            ends, size = (np.minimum(1 - u, radius), np.minimum(u, radius)), []
        else:
            ends = (1 - u, u)
            size = [
                {"type": "ineq", "fun": lambda z: radius - z.sum(), "jac": lambda z: -np.ones(128)}
                if norm == "l1"
                else {"type": "ineq", "fun": lambda z: radius**2 - z @ z, "jac": lambda z: -2 * z}
            ]
        solved = minimize(
            lambda z, p=p: 0.5 * np.sum((part @ z - p) ** 2),
            np.zeros(128),
            jac=lambda z, p=p: part.T @ (part @ z - p),
            bounds=[(0, high) for high in np.concatenate(ends)],
            constraints=size,
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 300},
        )
        np.testing.assert_allclose(part @ solved.x, q, rtol=0, atol=2e-6)


def test_rows_in_the_set_are_left_alone(data):
    task = task_of(data, radius=0.9)
    inside = task.upper.project(torch.randn_like(task.upper.delta))
    moved = inside.clone()
    moved[3] += 5
    moved[4] = -0.05  # of norm 0.4, but darker than black
    again = task.upper.project(moved)
    others = (torch.arange(len(moved)) < 3) | (torch.arange(len(moved)) > 4)
    assert torch.equal(again[others], inside[others])
    assert not torch.equal(again[3], inside[3])
    assert torch.equal(again[4], torch.full_like(again[4], -0.05).maximum(-task.upper.images[4]))
    assert float(task.upper.norms(again).max()) <= 0.9 * (1 + 1e-12)


def test_the_projection_of_the_released_code_is_feasible_but_not_the_nearest_point(data):
    nearest, other = task_of(data, radius=0.9), task_of(data, radius=0.9, projection="ball_then_box")
    images = other.upper.images
    point = torch.randn(images.shape, generator=torch.Generator().manual_seed(5)).double()
    found = other.upper.project(point)
    for p, u, q in zip(point, images, found, strict=True):
        torch.testing.assert_close(q, (0.9 * p / p.norm()).clamp(-u, 1 - u))
    assert float(other.upper.norms(found).max()) < 0.9
    best = nearest.upper.project(point)
    assert float((best - point).square().sum()) < float((found - point).square().sum())
    assert float(other.upper.norms(best).min()) > 0.9 - 1e-9


def test_noise_is_feasible_and_large(data):
    task = task_of(data, radius=0.9)
    noise = task.upper.noise()
    changed = task.upper.images + noise
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert float(task.upper.norms(noise).min()) > 0.8
    assert torch.equal(noise, task.upper.noise(0))
    assert not torch.equal(noise, task.upper.noise(1))


@pytest.mark.parametrize("projection", ["nearest", "ball_then_box"])
def test_a_random_start_is_feasible_and_taken_once(data, projection, tmp_path):
    def task():
        return Poisoning(
            LinearNet((1, 8, 8)), 18, (1, 8, 8), radius=0.9, ridge=0.0, projection=projection, random_start=3
        )

    started = task()
    assert not started.upper.delta.any()  # the images are not known yet
    started.check_data(data)
    start = started.upper.delta.detach().clone()
    assert torch.equal(start, started.upper.noise(3))
    changed = started.upper.images + start
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert 0.3 < float(started.upper.norms().min()) <= float(started.upper.norms().max()) <= 0.9 * (1 + 1e-6)
    module = TRHG(
        task=started, lower_steps=2, truncation=1, upper_optimizer=lambda params: torch.optim.SGD(params, lr=1e3)
    )
    run = trainer(1)
    run.fit(module, datamodule=DigitsPoisoning(samples=120, epoch_length=1))
    learnt = started.upper.delta.detach().clone()
    assert not torch.equal(learnt, start)
    run.save_checkpoint(tmp_path / "end.ckpt")
    run.validate(module, datamodule=DigitsPoisoning(samples=120), verbose=False)
    assert torch.equal(started.upper.delta, learnt)
    loaded = TRHG.load_from_checkpoint(tmp_path / "end.ckpt", task=task())
    trainer(1).validate(loaded, datamodule=DigitsPoisoning(samples=120), verbose=False)
    assert torch.equal(loaded.task.upper.delta, learnt)


@pytest.mark.parametrize("norm", list(NORMS))
def test_metrics_and_prediction_by_hand(data, norm):
    task, batch = task_of(data, norm=norm, radius=0.4), doubled(data)
    with torch.no_grad():
        task.upper.delta[5:] = 0
        found = {name: float(value) for name, value in task.metrics(batch).items()}
        logits = task.lower(batch["upper"][0])
        rows = task.upper.delta.flatten(1)
        norms = torch.stack([torch.linalg.vector_norm(row, NORMS[norm]) for row in rows])
        assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == batch["upper"][1]).float().mean()))
        assert found["cross_entropy"] == pytest.approx(float(cross_entropy(logits, batch["upper"][1])))
        assert found["norm"] == pytest.approx(float(norms.mean()))
        assert found["largest_norm"] == pytest.approx(float(norms.max())) == pytest.approx(0.4)
        assert found["moved"] == pytest.approx(5 / len(rows))
        images, labels, index = data.poisoned
        predicted = task.predict((images.double(), labels, index))
        assert list(predicted) == ["index", "label", "predicted_clean", "predicted", "norm"]
        torch.testing.assert_close(predicted["norm"], norms)
        changed = images.double() + task.upper.delta
        assert torch.equal(predicted["predicted"], task.lower(changed).argmax(1))
        assert torch.equal(predicted["predicted_clean"], task.lower(images.double()).argmax(1))


def test_without_images_there_is_no_projection():
    task = Poisoning(LinearNet((1, 8, 8)), 4, (1, 8, 8))
    with pytest.raises(BilevelError, match="does not know the images: train with a datamodule"):
        task.project_upper({"delta": torch.zeros(4, 1, 8, 8)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "Poisoning.samples must be a positive number, got 0"),
        ({"radius": 0.0}, "Poisoning.radius must be a positive number, got 0"),
        ({"norm": "l3"}, "Poisoning.norm must be one of l2, l1, linf, got l3"),
        ({"ridge": -1.0}, "Poisoning.ridge must not be negative, got -1"),
        ({"projection": "box"}, "Poisoning.projection must be nearest or ball_then_box, got box"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        Poisoning(LinearNet(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 17}, "The task has 17 perturbations but the data 18 poisoned images: set task.samples to 18"),
        ({"image_shape": (1, 4, 16)}, r"task.image_shape is \(1, 4, 16\) but the data's images have .*\(1, 8, 8\)"),
        ({"model": LinearNet((1, 9, 9))}, r"does not accept images of shape \(1, 8, 8\).*set its image_shape"),
        ({"model": LinearNet((1, 8, 8), classes=7)}, r"returns shape \(1, 7\) for one image instead of \(1, 10\)"),
    ],
)
def test_data_that_do_not_fit(data, settings, message):
    usual = {"model": LinearNet((1, 8, 8)), "samples": 18, "image_shape": (1, 8, 8)}
    with pytest.raises(BilevelError, match=message):
        Poisoning(**{**usual, **settings}).check_data(data)


def test_the_images_are_in_no_checkpoint(data):
    task = task_of(data)
    assert "upper.images" not in task.state_dict()
    assert "upper.delta" in task.state_dict()
