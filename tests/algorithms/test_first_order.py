"""The first-order methods against formulas of their own, and the published problems of MEHA."""

import pytest
import torch
from loops import Batches, fit, trainer
from problems import Nonlinear, Quadratic, Vector
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint

from bilevel_lightning import BilevelError, BilevelTask, GradientDescent, tree
from bilevel_lightning.algorithms import BOME, BVFSM, F2SA, GPBGD, MEHA, RHG, VPBGD
from bilevel_lightning.binding import bind
from bilevel_lightning.schedules import Linear, Power


def sgd(lr):
    return lambda params: torch.optim.SGD(params, lr=lr)


def one(module, batch=None):
    """One `bilevel_step` at the module's variables, with the y that it leads to."""
    module.configure_model()
    x, y = tree.detach(module.upper_parameters()), tree.detach(tree.of(module.hooks.lower))
    problem, x, _ = bind(module.hooks, batch, x)
    step = module.bilevel_step(problem, x, y)
    return step._replace(lower=step.lower(problem, x) if callable(step.lower) else step.lower), problem


class Formulas:
    """f, g and their derivatives of `Quadratic`, by hand."""

    def __init__(self, task):
        self.task, self.x, self.y = task, task.upper.x.detach(), task.y().detach()

    def f_x(self, y):
        return self.task.rho * self.x

    def f_y(self, y):
        return y - self.task.c

    def g(self, y):
        return 0.5 * y @ self.task.A @ y - y @ self.task.B @ self.x

    def g_x(self, y):
        return -self.task.B.T @ y

    def g_y(self, y):
        return self.task.A @ y - self.task.B @ self.x

    def descend(self, y, lr, steps, more=lambda y: 0.0):
        for _ in range(steps):
            y = y - lr * (self.g_y(y) + more(y))
        return y


def vector(lower):
    return torch.cat([lower["first"].flatten(), lower["rest"]])


@pytest.mark.parametrize(("gamma", "rescale", "c"), [(10.0, True, 0.1), (10.0, False, 1.0), (0.5, True, 1.0)])
@pytest.mark.parametrize("twin", ["restart", "persistent"])
def test_vpbgd_step_is_its_formula(gamma, rescale, c, twin):
    task = Quadratic()
    by_hand = Formulas(task)
    module = VPBGD(task=task, gamma=gamma, rescale=rescale, twin=twin, lower_steps=3, lower_lr=0.05)
    module.configure_model()
    start = by_hand.y
    if twin == "persistent":
        start = start + 1
        module.states["twin"].set({"first": start[:2].reshape(2, 1), "rest": start[2:]})
    step, problem = one(module)
    y, w = by_hand.y, by_hand.descend(start, 0.1, 3)
    d_x = c * (by_hand.f_x(y) + gamma * (by_hand.g_x(y) - by_hand.g_x(w)))
    d_y = c * (by_hand.f_y(y) + gamma * by_hand.g_y(y))
    torch.testing.assert_close(step.upper_grad["x"], d_x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vector(step.lower), y - 0.05 * d_y, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(step.logs["train/gap"], by_hand.g(y) - by_hand.g(w), rtol=1e-12, atol=1e-14)
    if twin == "persistent":
        torch.testing.assert_close(vector(step.state["twin"]), w, rtol=1e-12, atol=1e-14)
    assert problem.counts == {"lower_gradients": 5, "upper_gradients": 1, "samples": 0}


@pytest.mark.parametrize(("gamma", "rescale", "c"), [(37.0, True, 1 / 37), (0.5, True, 1.0), (4.0, False, 1.0)])
def test_gpbgd_step_is_its_formula(gamma, rescale, c):
    task = Quadratic()
    by_hand = Formulas(task)
    step, problem = one(GPBGD(task=task, gamma=gamma, rescale=rescale, lower_lr=0.05))
    y, r = by_hand.y, by_hand.g_y(by_hand.y)
    d_x, d_y = c * (by_hand.f_x(y) - gamma * task.B.T @ r), c * (by_hand.f_y(y) + gamma * task.A @ r)
    torch.testing.assert_close(step.upper_grad["x"], d_x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vector(step.lower), y - 0.05 * d_y, rtol=1e-12, atol=1e-14)
    assert problem.counts["hessian_products"] == problem.counts["cross_products"] == 1


def test_gpbgd_direction_is_the_derivative_of_its_penalty():
    """On a problem without closed form: autograd of f + gamma |g_y|^2 / 2."""
    task, gamma = Nonlinear(), 3.0
    step, _ = one(GPBGD(task=task, gamma=gamma, rescale=False, lower_lr=1.0))
    x, y = tree.of(task.upper), tree.of(task.lower)
    (g_y,) = tree.grad(task.lower_loss(None), y, create_graph=True)
    d_x, d_y = tree.grad(task.upper_loss(None) + 0.5 * gamma * tree.dot(g_y, g_y), x, y)
    for name, t in d_x.items():
        torch.testing.assert_close(step.upper_grad[name], t, rtol=1e-12, atol=1e-14)
    for name, t in d_y.items():
        torch.testing.assert_close(step.lower[name], y[name].detach() - t, rtol=1e-12, atol=1e-14)


def test_a_ramp_starts_at_its_first_value():
    """gamma = 0 at first: neither x's part of g nor the lower level moves anything."""
    task = Quadratic()
    by_hand = Formulas(task)
    for algorithm in (VPBGD, GPBGD):
        step, _ = one(algorithm(task=task, gamma=Linear(0.0, 0.2, 30000)))
        torch.testing.assert_close(step.upper_grad["x"], by_hand.f_x(None))
        assert step.logs["train/gamma"] == 0


@pytest.mark.parametrize("order", [1, 2])
def test_f2sa_step_is_its_formula(order):
    task, gamma = Quadratic(), 5.0
    by_hand = Formulas(task)
    step, _ = one(F2SA(task=task, gamma=gamma, order=order, lower_steps=7))
    y = by_hand.descend(by_hand.y, 0.1, 7, lambda y: by_hand.f_y(y) / gamma)
    z = by_hand.descend(by_hand.y, 0.1, 7, lambda y: (1 - order) * by_hand.f_y(y) / gamma)
    f_x = by_hand.f_x(y) if order == 1 else (by_hand.f_x(y) + by_hand.f_x(z)) / 2
    d_x = f_x + gamma / order * (by_hand.g_x(y) - by_hand.g_x(z))
    torch.testing.assert_close(step.upper_grad["x"], d_x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vector(step.lower), y, rtol=1e-12, atol=1e-14)
    assert step.logs["train/gamma"] == gamma


def test_f2sa_errors_fall_like_the_first_and_the_second_power_of_gamma():
    """With exact lower solves; order 2 is at least 30 times more accurate at gamma = 100."""
    task = Quadratic()
    exact, errors = task.hypergradient(task.upper.x.detach()), {}
    for order in (1, 2):
        for gamma in (10.0, 100.0, 1000.0):
            module = F2SA(task=task, gamma=gamma, order=order, lower_steps=160, dynamics=GradientDescent(0.4))
            errors[order, gamma] = float((one(module)[0].upper_grad["x"] - exact).norm() / exact.norm())
    assert errors[2, 100.0] * 30 < errors[1, 100.0]
    for order in (1, 2):
        slope = torch.log10(torch.tensor(errors[order, 100.0] / errors[order, 1000.0]))
        assert abs(slope - order) < 0.05


@pytest.mark.parametrize("algorithm", [VPBGD, GPBGD, F2SA])
def test_directions_at_gamma_100_point_along_the_hypergradient(algorithm):
    """With the levels solved at a fixed x, which many iterations with a zero step of x do."""
    task = Quadratic()
    exact = task.hypergradient(task.upper.x.detach())
    lr, steps = (0.05, 400) if algorithm is GPBGD else (0.4, 60)
    own = {} if algorithm is F2SA else {"lower_lr": lr, "upper_optimizer": sgd(0.0)}
    if algorithm is not GPBGD:
        own |= {"lower_steps": 100, "dynamics": GradientDescent(0.4)}
    module = algorithm(task=task, gamma=100.0, **own)
    if algorithm is not F2SA:
        fit(module, steps)
    d_x = one(module)[0].upper_grad["x"]
    assert torch.nn.functional.cosine_similarity(d_x, exact, dim=0) > 0.999


@pytest.mark.parametrize("barrier", ["gradient", "value"])
def test_bome_step_is_its_formula_and_keeps_its_promise(barrier):
    task, eta = Quadratic(), 0.5
    by_hand = Formulas(task)
    step, _ = one(BOME(task=task, eta=eta, barrier=barrier, lower_steps=10, lower_lr=0.05))
    y, w = by_hand.y, by_hand.descend(by_hand.y, 0.1, 10)
    q = torch.cat([by_hand.g_x(y) - by_hand.g_x(w), by_hand.g_y(y)])
    f = torch.cat([by_hand.f_x(y), by_hand.f_y(y)])
    phi = eta * (q @ q if barrier == "gradient" else by_hand.g(y) - by_hand.g(w))
    multiplier = max(float(phi - f @ q), 0.0) / float(q @ q)
    d = f + multiplier * q
    torch.testing.assert_close(step.upper_grad["x"], d[:4], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vector(step.lower), y - 0.05 * d[4:], rtol=1e-12, atol=1e-14)
    assert (multiplier > 0) == (barrier == "gradient")
    assert d @ q >= phi * (1 - 1e-12)  # q falls at the rate phi


def test_bome_at_a_solved_lower_level_follows_f():
    """There q and its gradient are zero; nothing is divided by zero."""
    task = Quadratic()
    y = torch.linalg.solve(task.A, task.B @ task.upper.x.detach())
    tree.assign(task.lower, {"first": y[:2].reshape(2, 1), "rest": y[2:]})
    step, _ = one(BOME(task=task, lower_lr=0.05))
    by_hand = Formulas(task)
    assert torch.isfinite(step.upper_grad["x"]).all()
    assert torch.isfinite(vector(step.lower)).all()
    assert (vector(step.lower) - y + 0.05 * by_hand.f_y(y)).norm() < 0.05 * by_hand.f_y(y).norm() * 1.5


@pytest.mark.parametrize("penalty", ["quadratic", "log"])
def test_bvfsm_solves_its_two_lower_levels(penalty):
    """z minimises g + mu |z|^2 / 2; y is stationary for f + theta |y|^2 / 2 + P(g - v); d_x is its derivative in x."""
    task, mu, theta, tau = Quadratic(), 0.1, 0.05, 0.02
    by_hand = Formulas(task)
    settings = {"mu": mu, "theta": theta, "tau": tau, "penalty": penalty}
    step, _ = one(BVFSM(task=task, lower_steps=3000, dynamics=GradientDescent(0.03), **settings))
    eye = torch.eye(6, dtype=torch.float64)
    z = torch.linalg.solve(task.A + mu * eye, task.B @ by_hand.x)
    torch.testing.assert_close(vector(step.state["z"]), z, rtol=1e-8, atol=1e-10)
    y = vector(step.lower).requires_grad_()
    v = by_hand.g(z) + mu * z @ z / 2 + mu
    gap = by_hand.g(y) - v
    penalised = gap.clamp(min=0) ** 2 / (2 * tau) if penalty == "quadratic" else -tau * torch.log(-gap)
    total = 0.5 * (y - task.c).square().sum() + theta * y @ y / 2 + penalised
    (slope,) = torch.autograd.grad(total, y)
    assert slope.norm() < 1e-6
    gap = gap.detach()
    w = float(gap.clamp(min=0) / tau if penalty == "quadratic" else tau / -gap)
    assert 0.1 < w < 1e3
    d_x = by_hand.f_x(y) + w * (by_hand.g_x(y) - by_hand.g_x(z))
    torch.testing.assert_close(step.upper_grad["x"], (d_x / (1 + w)).detach(), rtol=1e-5, atol=1e-8)


def test_bvfsm_outside_the_domain_of_the_logarithm_steps_on_g():
    task = Quadratic()
    by_hand = Formulas(task)
    step, _ = one(BVFSM(task=task, penalty="log", lower_steps=1, mu=1e-9, tau=1.0))
    torch.testing.assert_close(vector(step.lower), by_hand.descend(by_hand.y, 0.1, 1), rtol=1e-12, atol=1e-14)
    assert step.logs["train/share"] > 1 - 1e-6


class Sine(BilevelTask):
    """MEHA's problem (19): f = (x - 2)^2 + |y - 2 - c|^2, g = sum_i sin(x + y_i - c_i), c_i = 2."""

    def __init__(self, n=1, x=2.0, y=4.0):
        super().__init__()
        self.upper = Vector(x=torch.tensor(x, dtype=torch.float64))
        self.lower = Vector(y=torch.full((n,), y, dtype=torch.float64))

    def upper_loss(self, batch):
        return (self.upper.x - 2) ** 2 + (self.lower.y - 4).square().sum()

    def lower_loss(self, batch):
        return torch.sin(self.upper.x + self.lower.y - 2).sum()


@pytest.mark.parametrize(
    ("n", "c", "start", "rates", "steps", "x", "y", "theta"),
    [
        (1, 0.1, (2.0, 4.0, 4.1), (0.02, 0.02, 0.12), 1500, 2.00795197, 4.00795197, 4.20094635),
        (1, 1.0, (2.0, 4.0, 4.1), (0.2, 0.2, 0.2), 500, 2.07045159, 4.07045159, 4.23044326),
        (1, 10.0, (2.0, 4.0, 4.1), (0.2, 0.2, 0.2), 500, 2.26280966, 4.26280966, 4.31605917),
        (1, 100.0, (2.0, 4.0, 4.1), (0.5, 0.5, 0.2), 1000, 2.34414635, 4.34414635, 4.35103076),
        (1, 1.0, (-6.0, 0.0, 0.0), (0.05, 0.05, 0.12), 2000, 2.07045159, 4.07045159, 4.23044326),
        (10, 1.0, (2.0, 4.0, 4.1), (0.02, 0.2, 0.2), 500, 2.39037655, 4.03903766, 4.11949287),
        (10, 10.0, (2.0, 4.0, 4.1), (0.05, 0.2, 0.2), 500, 2.60885086, 4.06088509, 4.07307032),
    ],
)
def test_meha_rests_where_its_penalised_problem_does(n, c, start, rates, steps, x, y, theta):
    """Limits of a constant weight, from an independent solution; ``rates`` are the steps of x, y and theta."""
    task = Sine(n, *start[:2])
    module = MEHA(
        task=task,
        gamma=0.4,
        c=c,
        lower_lr=rates[1],
        dynamics=GradientDescent(rates[2]),
        upper_optimizer=sgd(rates[0]),
        upper_iterations=500,
    )
    module.configure_model()
    module.states["theta"].set({"y": torch.full((n,), start[2], dtype=torch.float64)})
    fit(module, steps)
    assert abs(task.upper.x.item() - x) < 1e-6
    assert (task.lower.y - y).abs().max() < 1e-6
    assert (module.kept("theta")["y"] - theta).abs().max() < 1e-6


class ManyStronglyConvex(BilevelTask):
    """MEHA's problem (77): f = |x - e|^2 / 2 + |y|^2 / 2, g = |y|^2 / 2 - x'y, from zeros."""

    def __init__(self, n=100):
        super().__init__()
        self.upper = Vector(x=torch.zeros(n, dtype=torch.float64))
        self.lower = Vector(y=torch.zeros(n, dtype=torch.float64))

    def upper_loss(self, batch):
        return 0.5 * (self.upper.x - 1).square().sum() + 0.5 * self.lower.y.square().sum()

    def lower_loss(self, batch):
        return 0.5 * self.lower.y.square().sum() - self.upper.x @ self.lower.y


def test_meha_goes_through_the_reference_trace():
    """x after 100, 500, 800, 2000 iterations in the paper's setting, which pins the order of the updates and c_k."""
    task = ManyStronglyConvex()
    module = MEHA(
        task=task,
        gamma=10.0,
        c=Power(33.3, 0.49),
        lower_lr=0.8,
        dynamics=GradientDescent(0.8),
        upper_optimizer=sgd(1.5),
        upper_iterations=100,
    )
    seen = {}

    class Note(Callback):
        def on_train_batch_end(self, trainer, *args):
            seen[trainer.global_step] = task.upper.x.detach().clone()

    fit(module, 2000, callbacks=[Note()])
    for k, value in {100: 0.39130, 500: 0.48604, 800: 0.49488, 2000: 0.49979}.items():
        assert (seen[k] - value).abs().max() < 1e-4


class Toward(Quadratic):
    """Each episode a lower problem of its own."""

    persistent_lower = False


@pytest.mark.parametrize("algorithm", [VPBGD, GPBGD, BOME, MEHA])
def test_methods_that_move_y_once_need_a_y_that_persists(algorithm):
    with pytest.raises(BilevelError, match=r"persist.*F2SA"):
        algorithm(task=Toward()).configure_model()


@pytest.mark.parametrize("algorithm", [F2SA, BVFSM])
def test_methods_that_solve_the_lower_level_take_episodes(algorithm):
    task = Toward()
    before = task.upper.x.detach().clone()
    fit(algorithm(task=task), 3)
    assert not torch.equal(task.upper.x.detach(), before)


class InBox(Quadratic):
    """y in [-0.1, 0.1]."""

    def project_lower(self, upper, lower):
        return {name: t.clamp(-0.1, 0.1) for name, t in lower.items()}


@pytest.mark.parametrize("algorithm", [GPBGD, BOME])
def test_methods_of_lower_gradients_alone_refuse_a_constrained_lower_level(algorithm):
    with pytest.raises(BilevelError, match=r"does not vanish.*VPBGD"):
        fit(algorithm(task=InBox()), 1)


@pytest.mark.parametrize("algorithm", [VPBGD, F2SA, BVFSM, MEHA])
def test_y_and_twins_stay_feasible(algorithm):
    task = InBox()
    module = algorithm(task=task, lower_steps=3)
    fit(module, 5)
    values = [tree.of(task.lower), *(state.get() for state in module.states.values())][:2]
    assert all(t.abs().max() <= 0.1 for tensors in values[:1] for t in tensors.values())
    if module.states:
        assert all(t.abs().max() <= 0.1 for t in values[1].values())


@pytest.mark.parametrize("algorithm", [VPBGD, GPBGD, F2SA, BOME, BVFSM, MEHA])
def test_resuming_is_exact_to_the_bit(tmp_path, algorithm):
    settings = {} if algorithm is GPBGD else {"lower_steps": 2}
    if algorithm is VPBGD:
        settings["twin"] = "persistent"

    class SaveAt4(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    def run(callbacks, path=None):
        module = algorithm(task=Quadratic(), **settings)
        trainer(8, callbacks=callbacks).fit(module, Batches(100), ckpt_path=path)
        return module.state_dict()

    whole, again = run([SaveAt4()]), run([], tmp_path / "4.ckpt")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("number", [1, 7, 50])
def test_several_upper_iterations_a_batch_change_nothing_but_the_batches(number):
    task = Quadratic()
    module = VPBGD(task=task, upper_iterations=number)
    assert fit(module, 30).global_step == 30
    plain = Quadratic()
    fit(VPBGD(task=plain), 30)
    assert torch.equal(task.upper.x, plain.upper.x)
    assert torch.equal(task.y(), plain.y())
    assert module.oracles[1] == 30 * 22  # twin, g and v


@pytest.mark.filterwarnings(r"ignore:\|g_y\| is")
def test_divergence_names_the_step_size_and_keeps_the_last_checkpoint(tmp_path):
    """MEHA's setting for its merely convex problem without annealing diverges slowly: the guard ends it."""
    task = Quadratic()
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="last")
    with pytest.raises(BilevelError, match=r"diverged.*lower_lr"):
        fit(VPBGD(task=task, lower_lr=1.0), 2000, callbacks=[keep], enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(t).all() for t in state.values())
    assert torch.isfinite(task.upper.x).all()
    assert torch.isfinite(task.y()).all()


def test_a_value_gap_that_is_clearly_negative_ends_the_run():
    """The twin's own step size is too large: its value rises above g(x, y)."""
    with pytest.raises(BilevelError, match=r"value gap.*cannot be negative.*dynamics.lr"):
        fit(VPBGD(task=Quadratic(), dynamics=GradientDescent(0.6), lower_steps=40), 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPBGD(gamma=-1.0), "gamma must be a positive number"),
        (lambda: VPBGD(twin="other"), "twin must be 'restart' or 'persistent'"),
        (lambda: VPBGD(lower_lr=0.0), "lower_lr must be a positive number"),
        (lambda: F2SA(order=3), "order must be 1 or 2"),
        (lambda: BOME(eta=0.0), "eta must be a positive number"),
        (lambda: BOME(barrier="other"), "barrier must be 'gradient' or 'value'"),
        (lambda: BVFSM(penalty="other"), "penalty must be 'quadratic' or 'log'"),
        (lambda: MEHA(gamma=0.0), "gamma must be a positive number"),
        (lambda: RHG(upper_iterations=0), "upper_iterations must be a positive number"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(BilevelError, match=message):
        make()
