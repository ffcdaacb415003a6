"""MAML and its relatives against loops written out by hand, and episodes side by side against one after the other."""

import warnings
from functools import partial

import pytest
import torch
from episodic import (
    WAYS,
    Given,
    Record,
    body,
    by_hand,
    close,
    curves,
    gradient,
    head,
    images,
    mean_query_loss,
    network,
    parameters,
    path,
    train,
)
from loops import trainer
from problems import FromX, Vector, central_differences
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from bilevel_lightning import (
    ANIL,
    BDA,
    FOMAML,
    IAPTTGM,
    IMAML,
    MAML,
    RHG,
    AggregatedDescent,
    BilevelError,
    BilevelTask,
    GradientDescent,
    MetaSGD,
    Reptile,
    algorithms,
    tree,
)
from bilevel_lightning.linear_solvers import ConjugateGradient, NormalConjugateGradient
from bilevel_lightning.tasks import FewShot, FewShotRegression

sgd = lambda lr: lambda params: torch.optim.SGD(params, lr=lr)


def task(adapt="all", norm="transductive", **settings):
    part = body(norm)
    return FewShot(part, head(part.features), adapt=adapt, **settings)


def regression(**settings):
    torch.manual_seed(3)
    return FewShotRegression(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double(), **settings)


class Plain(nn.Module):
    """The network of `regression`, with its names."""

    def __init__(self):
        super().__init__()
        self.body = regression().upper["body"]

    def forward(self, x):
        return self.body(x)


def through_higher(net, batch, lr, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import higher

        total = 0.0
        for e in range(len(batch["support"][0])):
            (x, y), (x_q, y_q) = ((part[0][e], part[1][e]) for part in (batch["support"], batch["query"]))
            optimizer = torch.optim.SGD(net.parameters(), lr=lr)
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(steps):
                    inner.step(cross_entropy(fast(x), y))
                total = total + cross_entropy(fast(x_q), y_q)
        names, values = zip(*net.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(total / len(batch["support"][0]), values), strict=True))


@pytest.mark.parametrize("memory", ["graph", "recompute", "mixed"])
@pytest.mark.parametrize("steps", [1, 5])
def test_maml_is_a_loop_by_hand_and_higher(steps, memory):
    batch = images(4)
    found = gradient(MAML(task=task(), dynamics=GradientDescent(0.3), lower_steps=steps, memory=memory), batch)
    exact = by_hand(network(), batch, 0.3, steps)
    close(found, exact)
    close(through_higher(network(), batch, 0.3, steps), exact)
    assert min(float(t.abs().max()) for name, t in exact.items() if name.startswith(("body.1", "head"))) > 1e-4


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_first_order_is_the_query_gradient_at_the_end(adapt):
    batch, net = images(3), network()
    found = gradient(FOMAML(task=task(adapt), dynamics=GradientDescent(0.3), lower_steps=3), batch)
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for e in range(3):
        support, query = ((part[0][e], part[1][e]) for part in (batch["support"], batch["query"]))
        end = tree.leaf(path(net, parameters(net), support, 0.3, 3, "" if adapt == "all" else "head", track=False)[-1])
        value = cross_entropy(functional_call(net, end, (query[0],)), query[1])
        total = tree.axpy(1 / 3, dict(zip(end, torch.autograd.grad(value, [*end.values()]), strict=True)), total)
    close(found, total)


def test_anil_is_maml_whose_body_does_not_adapt():
    batch = images(3)
    settings = {"dynamics": GradientDescent(0.4), "lower_steps": 5}
    exact = by_hand(network(), batch, 0.4, 5, adapted="head")
    close(gradient(ANIL(task=task("head"), **settings), batch), exact)
    close(gradient(MAML(task=task("head"), **settings), batch), exact)
    other = gradient(MAML(task=task("all"), **settings), batch)
    assert float((other["body.0.weight"] - exact["body.0.weight"]).abs().max()) > 1e-3


def test_anil_refuses_a_whole_network():
    for at_once in (None, 2):
        with pytest.raises(BilevelError, match="ANIL adapts a part of the network: use FewShot with adapt 'head'"):
            gradient(ANIL(task=task("all"), episodes_at_once=at_once), images(2))


@pytest.mark.parametrize("at_once", [1, 2])
def test_reptile_puts_the_start_at_the_mean_end(at_once):
    batch, net, module = images(3), network(), Reptile(task=task(), lower_steps=4, episodes_at_once=at_once)
    train(module, [batch])
    ends = []
    for e in range(3):
        support = batch["support"][0][e], batch["support"][1][e]
        ends.append(tree.detach(path(net, parameters(net), support, 0.1, 4, track=False)[-1]))
    close(tree.detach(module.upper_parameters()), tree.mean(ends))


def test_reptile_does_not_read_queries():
    batch = images(2)
    first = gradient(Reptile(task=task()), batch)
    batch["query"] = (torch.randn_like(batch["query"][0]), batch["query"][1])
    close(gradient(Reptile(task=task()), batch), first, 0.0)


def learnt(module, batch, learnable):
    """The hypergradient with the learnable settings at given values."""
    module.configure_model()
    with torch.no_grad():
        for name, t in learnable.items():
            module.upper_parameters()[name].copy_(t)
    return gradient(module, batch)


def test_step_sizes_of_metasgd_by_finite_differences():
    batch, net = curves(3), Plain()
    w = parameters(net)
    generator = torch.Generator().manual_seed(5)
    theta = {f"theta {n}": 0.5 * torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in w.items()}
    value = lambda v: mean_query_loss(
        net, {n: v[n] for n in w}, batch, lambda t, n: 0.2 * v[f"theta {n}"].exp(), 3, loss=mse_loss
    )
    exact = central_differences(lambda v: value({n: t.requires_grad_() for n, t in v.items()}).detach(), {**w, **theta})
    module = MetaSGD(task=regression(), dynamics=GradientDescent(0.2, learn_lr="per_parameter"), lower_steps=3)
    rename = lambda n: n.replace("theta ", "dynamics/log_lr_factors/")
    found = learnt(module, batch, {rename(n): t for n, t in theta.items()})
    close(found, {rename(n): t for n, t in exact.items()}, 1e-6)
    assert min(float(found[rename(n)].abs().max()) for n in theta) > 1e-4


@pytest.mark.parametrize("learn", [True, "per_step"])
def test_learnt_step_sizes_by_finite_differences(learn):
    batch, net = curves(3), Plain()
    w = parameters(net)
    theta = torch.tensor([0.3, -0.2, 0.5] if learn == "per_step" else 0.3, dtype=torch.float64)
    rate = lambda v, t: 0.2 * (v[t] if v.ndim else v).exp()
    value = lambda v: mean_query_loss(net, w, batch, lambda t, n: rate(v["theta"], t), 3, loss=mse_loss)
    exact = central_differences(lambda v: value(v).detach(), {"theta": theta})["theta"]
    module = MAML(task=regression(), dynamics=GradientDescent(0.2, learn_lr=learn), lower_steps=3)
    found = learnt(module, batch, {"dynamics/log_lr_factor": theta})["dynamics/log_lr_factor"]
    close({"": found}, {"": exact}, 1e-6)


def test_weights_of_the_multi_step_loss():
    module = MAML(task=regression(), multi_step=10, lower_steps=4)
    assert module.weights(0) == pytest.approx([0.25] * 4, abs=1e-15)
    for k in range(30):
        assert sum(module.weights(k)) == pytest.approx(1.0, abs=1e-14)
    assert module.weights(5) == pytest.approx([0.125] * 3 + [0.625], abs=1e-15)
    assert module.weights(10) == module.weights(1000) == pytest.approx([0.0075] * 3 + [1 - 0.0225], abs=1e-15)
    assert MAML(task=regression(), multi_step=3).weights(1) == [1.0]


@pytest.mark.parametrize("memory", ["graph", "recompute"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_multi_step_loss_is_the_weighted_sum(at_once, memory):
    batches, weights = [images(3, seed) for seed in range(3)], [[1 / 3] * 3, [1 / 6, 1 / 6, 2 / 3], [0.01, 0.01, 0.98]]
    module = MAML(
        task=task(), upper_optimizer=sgd(1e-300), dynamics=GradientDescent(0.3), lower_steps=3, multi_step=2,
        episodes_at_once=at_once, memory=memory,
    )  # fmt: skip
    record, _ = train(module, batches)
    for found, batch, w in zip(record.gradients, batches, weights, strict=True):
        close(found, by_hand(network(), batch, 0.3, 3, weights=w))


@pytest.mark.parametrize(
    "settings", [{"multi_step": -1}, {"multi_step": 2, "truncation": 1}, {"multi_step": 2, "first_order": True}]
)
def test_impossible_multi_step(settings):
    with pytest.raises(BilevelError, match="multi_step must not be negative"):
        MAML(task=regression(), **settings)


@pytest.mark.parametrize("settings", [{"truncation": 1}, {"memory": "recompute"}])
def test_first_order_has_no_steps_to_keep(settings):
    with pytest.raises(BilevelError, match="leave truncation and memory out"):
        FOMAML(task=regression(), **settings)


@pytest.mark.parametrize("algorithm", [MAML, FOMAML, ANIL, MetaSGD, Reptile, IMAML])
def test_start_must_depend_on_x(algorithm):
    with pytest.raises(BilevelError, match="FewShot with start"):
        gradient(algorithm(task=task("head", start="fixed")), images(2))


class Proximal(BilevelTask):
    """Episodes (A, b, c): g = y'Ay/2 - b'y, f = |y - c|^2/2, y_0 = x in two tensors."""

    persistent_lower = False

    def __init__(self, n=5):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        x = self.draw(n)
        self.upper = Vector(p=x[:2].reshape(2, 1), q=x[2:])
        self.lower = Vector(**tree.zeros_like(tree.detach(tree.of(self.upper))))
        self.eye, self.data = torch.eye(n, dtype=torch.float64), []
        for _ in range(3):
            m = self.draw(n, n)
            self.data.append((m @ m.T / n + 0.1 * self.eye, self.draw(n), self.draw(n)))

    def episodes(self, batch):
        return [{"lower": e, "upper": e} for e in self.data]

    def initial_lower(self, upper):
        return dict(upper)

    def y(self):
        return torch.cat([self.lower.p.flatten(), self.lower.q])

    def lower_loss(self, episode):
        return 0.5 * self.y() @ episode[0] @ self.y() - episode[1] @ self.y()

    def upper_loss(self, episode):
        return 0.5 * (self.y() - episode[2]).square().sum()

    def metrics(self, episode):
        return {"error": self.upper_loss(episode["upper"])}


def test_imaml_is_its_closed_form():
    problem, s = Proximal(), 0.7
    x = torch.cat([p.detach().flatten() for p in problem.upper.parameters()])
    exact, ends = torch.zeros_like(x), []
    for a, b, c in problem.data:
        near = torch.linalg.inv(a + s * problem.eye)
        y = near @ (b + s * x)
        exact, ends = exact + s * near @ (y - c) / 3, [*ends, 0.5 * (y - c).square().sum()]
    module = IMAML(
        task=problem,
        strength=s,
        dynamics=GradientDescent(0.4),
        lower_steps=120,
        linear_solver=ConjugateGradient(12, 1e-14),
    )
    record, _ = train(module, [0])
    found = record.gradients[0]
    close({"": torch.cat([found["p"].flatten(), found["q"]])}, {"": exact})
    assert float(record.logs[0]["train/residual"]) < 1e-12

    problem = Proximal()
    module = IMAML(task=problem, strength=s, dynamics=GradientDescent(0.4), lower_steps=120)
    evaluated = train_nothing(module, [0])
    for (metrics,), value in zip([[m] for m in evaluated], ends, strict=True):
        assert float(metrics["error"]) == pytest.approx(float(value), rel=1e-10)


def train_nothing(module, batches):
    """What a validation finds, episode by episode."""
    record = Record(module)
    trainer(1).validate(module, Given(batches), verbose=False)
    return record.evaluated


@pytest.mark.parametrize("case", ["projection", "aggregated"])
def test_imaml_refuses_what_its_formula_does_not_cover(case):
    class Boxed(Proximal):
        def project_lower(self, upper, lower):
            return {name: t.clamp(-0.1, 0.1) for name, t in lower.items()}

    problem, dynamics = (
        (Boxed(), GradientDescent(0.2)) if case == "projection" else (Proximal(), AggregatedDescent(0.2))
    )
    with pytest.raises(BilevelError):  # conjugate gradient refuses them for another reason
        train(IMAML(task=problem, dynamics=dynamics, linear_solver=NormalConjugateGradient()), [0])


def test_imaml_on_a_network_tends_to_maml_with_the_proximal_term():
    """By unrolling to the end of the same proximal problem, written out by hand."""
    batch, net, s = curves(2), Plain(), 1.5
    w = parameters(net)
    total = 0.0
    for e in range(2):
        support, query = ((part[0][e], part[1][e]) for part in (batch["support"], batch["query"]))
        near = lambda v: 0.5 * s * sum((t - w[n]).square().sum() for n, t in v.items())
        end = path(net, w, support, 0.3, 60, loss=mse_loss, penalty=near)[-1]
        total = total + mse_loss(functional_call(net, end, (query[0],)), query[1]) / 2
    exact = dict(zip(w, torch.autograd.grad(total, [*w.values()]), strict=True))
    module = IMAML(
        task=regression(), strength=s, dynamics=GradientDescent(0.3), lower_steps=60,
        linear_solver=ConjugateGradient(30, 1e-14),
    )  # fmt: skip
    close(gradient(module, batch), exact, 1e-9)


# Episodes side by side.
SIDE = {
    "MAML": (partial(MAML, dynamics=GradientDescent(0.3), lower_steps=2), "all"),
    "FOMAML": (partial(FOMAML, dynamics=GradientDescent(0.3), lower_steps=2), "all"),
    "ANIL": (partial(ANIL, dynamics=GradientDescent(0.3), lower_steps=3), "head"),
    "MetaSGD": (partial(MetaSGD, lower_steps=2), "all"),
    "per_step": (partial(MAML, dynamics=GradientDescent(0.3, learn_lr="per_step"), lower_steps=2), "all"),
    "Reptile": (partial(Reptile, upper_optimizer=sgd(0.5), lower_steps=2), "all"),
    "RHG": (partial(RHG, dynamics=GradientDescent(0.3), lower_steps=3), "fixed"),
    "BDA": (partial(BDA, dynamics=AggregatedDescent(0.3, 0.2), lower_steps=3), "fixed"),
    "IAPTTGM": (partial(IAPTTGM, dynamics=GradientDescent(1.2), lower_steps=5), "fixed"),
    "IAPTTGM two passes": (partial(IAPTTGM, dynamics=GradientDescent(1.2), lower_steps=5, two_pass=True), "fixed"),
    "IAPTTGM learned": (partial(IAPTTGM, dynamics=GradientDescent(1.2), lower_steps=5), "head"),
    "IAPTTGM recompute": (partial(IAPTTGM, dynamics=GradientDescent(1.2), lower_steps=5, memory="recompute"), "fixed"),
}
ONE: dict[str, tuple] = {}


def outcome(name, at_once):
    """Directions, logs, validation metrics, weights and oracles of three iterations on five episodes."""
    algorithm, structure = SIDE[name]
    settings = {"adapt": "head", "start": "fixed"} if structure == "fixed" else {"adapt": structure}
    if name == "ANIL":
        settings.update(regularizer="distance")
    sizes = {} if name == "Reptile" else {"upper_optimizer": sgd(0.1)}  # Adam would make steps of rounding errors
    module = algorithm(task=task(**settings), episodes_at_once=at_once, **sizes)
    record, run = train(module, [images(5, seed) for seed in range(3)], val=[images(3, 10), images(2, 11)])
    state = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
    metrics = {n: v for n, v in run.callback_metrics.items() if not n.startswith("train/")}
    evaluated = {n: torch.cat([found[n].reshape(-1) for found in record.evaluated]) for n in record.evaluated[0]}
    return record.gradients, record.logs, evaluated, state, metrics, module.oracles.tolist()


MORE = ("IAPTTGM two passes", "IAPTTGM recompute")  # all episodes go to the largest k*: equal numbers, more oracles


@pytest.mark.parametrize(
    ("name", "at_once"), [(n, k) for n in SIDE for k in ((2, 3, 5) if n.isalpha() else (2,))] + [("MAML", 7)]
)
def test_episodes_side_by_side_are_those_one_after_the_other(name, at_once):
    if name not in ONE:
        ONE[name] = outcome(name, 1)
    gradients, logs, evaluated, state, metrics, oracles = outcome(name, at_once)
    want = ONE[name]
    for found, exact in zip(gradients, want[0], strict=True):
        close(found, exact)
    for found, exact in zip(logs, want[1], strict=True):
        for key in exact:
            close({"": found[key]}, {"": exact[key]})
    assert {"train/upper_loss", "train/lower_loss", "train/stationarity"} <= set(want[1][0])
    close(evaluated, want[2])
    close(state, want[3])
    if name in MORE:
        assert all(found >= exact for found, exact in zip(oracles, want[5], strict=True))
    else:
        assert oracles == want[5]
    assert metrics.keys() == want[4].keys()
    for key, value in want[4].items():
        assert (name in MORE and key.startswith("oracle/")) or float(metrics[key]) == pytest.approx(
            float(value), rel=1e-6
        ), key


@pytest.mark.parametrize("at_once", [1, 5])
def test_truncation_differs_between_the_episodes_that_were_compared(at_once):
    algorithm, _ = SIDE["IAPTTGM"]
    module, chosen = algorithm(task=task("head", start="fixed"), episodes_at_once=at_once), []
    inner = module.bilevel_step

    def noted(*args):
        step = inner(*args)
        chosen.extend(step.logs["train/truncation"].reshape(-1).tolist())
        return step

    object.__setattr__(module, "bilevel_step", noted)
    train(module, [images(5, 0)])
    assert len(set(chosen)) > 1, chosen


@pytest.mark.parametrize(
    "algorithm", [getattr(algorithms, n) for n in algorithms.__all__ if not getattr(algorithms, n).side_by_side]
)
def test_algorithms_that_take_one_episode_after_the_other_say_so(algorithm):
    with pytest.raises(
        BilevelError, match=f"{algorithm.__name__} solves one episode after the other: leave episodes_at_once"
    ):
        algorithm(task=FromX(), episodes_at_once=2)
    algorithm(task=FromX(), episodes_at_once=1)


def test_episodes_of_different_shapes():
    class Ragged(FewShot):
        def episodes(self, batch):
            first, *rest = super().episodes(batch)
            return [{"support": tuple(t[:-1] for t in first["support"]), "query": first["query"]}, *rest]

    make = lambda n: MAML(task=Ragged(body(), head(body().features), adapt="all"), episodes_at_once=n)
    gradient(make(1), images(3))
    with pytest.raises(
        BilevelError, match="Episodes of different shapes cannot be solved side by side: set episodes_at_once to 1"
    ):
        gradient(make(3), images(3))


@pytest.mark.parametrize(
    "norm",
    ["group", "transductive", "none", "frozen", "per_step"],
)
def test_every_normalisation_side_by_side(norm):
    make = lambda n: MAML(
        task=FewShot(
            body(norm, **({"steps": 3} if norm == "per_step" else {}), **({"order": "norm_relu_pool"})),
            head(16),
            adapt="all",
        )
        if norm != "group"
        else FewShot(wide(), head(32), adapt="all"),
        dynamics=GradientDescent(0.2),
        lower_steps=2,
        episodes_at_once=n,
    )
    close(gradient(make(2), images(3)), gradient(make(1), images(3)))


def wide():
    from bilevel_lightning.models import ConvNetBody

    torch.manual_seed(0)
    return ConvNetBody((1, 8, 8), width=8, blocks=2, norm="group").double()


def test_a_scalar_parameter_side_by_side():
    class Scaled(nn.Linear):
        def __init__(self, n):
            torch.manual_seed(1)
            super().__init__(n, WAYS, dtype=torch.float64)
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

        def forward(self, x):
            return self.scale * super().forward(x)

    make = lambda n: ANIL(task=FewShot(body(), Scaled(16)), lower_steps=2, episodes_at_once=n)
    close(gradient(make(3), images(3)), gradient(make(1), images(3)))


# Checkpoints.
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("name", ["MetaSGD", "per_step", "IAPTTGM", "IAPTTGM learned", "BDA", "Reptile"])
def test_resumed_in_the_middle_and_loaded(name, tmp_path):
    algorithm, structure = SIDE[name]
    settings = {"adapt": "head", "start": "fixed"} if structure == "fixed" else {"adapt": structure}
    adam = {} if name == "Reptile" else {"upper_optimizer": partial(torch.optim.Adam, lr=0.01)}
    make = lambda: algorithm(task=task(**settings), **adam)
    batches = [images(2, seed) for seed in range(6)]
    val = [images(2, 9)]
    whole = make()
    save = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    train(whole, batches, val, callbacks=[save], enable_checkpointing=True, logger=False)
    (path_,) = [p for p in tmp_path.iterdir() if p.name == "step=3.ckpt"]

    class Rest(Given):
        def __iter__(self):
            return iter(self.batches[3:])

    resumed = make()
    run = trainer(
        6,
        callbacks=[ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="again-{step}")],
        enable_checkpointing=True,
    )
    run.fit(resumed, Rest(batches), Given(val), ckpt_path=path_, weights_only=True)
    assert run.global_step == 6
    (last,) = [p for p in tmp_path.iterdir() if p.name == "step=6.ckpt"]
    loaded = type(whole).load_from_checkpoint(
        last,
        task=task(**settings),
        weights_only=True,
        **{k: v for k, v in algorithm.keywords.items() if k == "dynamics"},
    )
    for other in (resumed, loaded):
        assert whole.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in whole.state_dict().items())
        assert list(whole.upper_parameters()) == list(other.upper_parameters())
    assert whole.lower_steps == loaded.lower_steps
    found = [trainer(1).validate(m, Given(val), verbose=False)[0] for m in (whole, loaded)]
    assert found[0] == found[1]
    if name == "MetaSGD":
        assert "dynamics/log_lr_factors/body.0.weight" in loaded.upper_parameters()
        assert float(loaded.upper_parameters()["dynamics/log_lr_factors/head.weight"].detach().abs().max()) > 0
    if name == "IAPTTGM":
        assert not torch.equal(loaded.upper_parameters()["auxiliary/weight"], loaded.task.lower.weight)


# IAPTT-GM on both structures of the few-shot task.
def iaptt_by_hand(batch, lr, steps, truncate=True):
    """The gradient of f at its largest iterate in body and start of the head, and the k* of each episode."""
    net = network()
    w, total, chosen = parameters(net), 0.0, []
    for e in range(len(batch["support"][0])):
        support, query = ((part[0][e], part[1][e]) for part in (batch["support"], batch["query"]))
        iterates = path(net, w, support, lr, steps, "head")[1:]
        values = [cross_entropy(functional_call(net, at, (query[0],)), query[1]) for at in iterates]
        chosen.append(max(range(steps), key=lambda k: float(values[k].detach())) if truncate else steps - 1)
        total = total + values[chosen[-1]] / len(batch["support"][0])
    return dict(zip(w, torch.autograd.grad(total, [*w.values()]), strict=True)), chosen


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("start", ["fixed", "learned"])
def test_iapttgm_on_episodes_is_its_definition(start, at_once, two_pass):
    batch = images(5, 0)
    module = IAPTTGM(
        task=task("head", start=start), dynamics=GradientDescent(1.2), lower_steps=5, two_pass=two_pass,
        episodes_at_once=at_once,
    )  # fmt: skip
    record, _ = train(module, [batch])
    exact, chosen = iaptt_by_hand(batch, 1.2, 5)
    rename = lambda n: n if start == "learned" or n.startswith("body") else n.replace("head.", "auxiliary/")
    close(record.gradients[0], {rename(n): t for n, t in exact.items()})
    assert float(record.logs[0]["train/truncation"]) == pytest.approx(sum(chosen) / 5 + 1, abs=1e-12)


def test_iapttgm_without_its_two_parts_is_unrolling_where_the_start_is_learned():
    batch, settings = images(2), {"dynamics": GradientDescent(0.3), "lower_steps": 3}
    found = gradient(IAPTTGM(task=task("head"), auxiliary=False, truncate=False, **settings), batch)
    close(found, gradient(RHG(task=task("head"), **settings), batch))


def test_auxiliary_step_size_without_an_auxiliary_variable():
    with pytest.raises(BilevelError):
        gradient(IAPTTGM(task=task("head"), auxiliary_lr=0.1), images(2))


def test_evaluation_starts_at_the_learnt_auxiliary_variable():
    part = task("head", start="fixed")
    module = IAPTTGM(task=part, dynamics=GradientDescent(0.3), lower_steps=2, evaluation_steps=0)
    train(module, [images(2)])
    (found,) = train_nothing(module, [images(1, 4)])
    x, labels = (t[0] for t in images(1, 4)["query"])
    z = {n.removeprefix("auxiliary/"): t.detach() for n, t in module.upper_parameters().items() if "/" in n}
    assert float((z["weight"] - part.lower.weight).detach().abs().max()) > 1e-4
    with torch.no_grad():
        logits = torch.nn.functional.linear(part.upper["body"].eval()(x), z["weight"], z["bias"])
    assert float(found["upper_loss"]) == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-12)
