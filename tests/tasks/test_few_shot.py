"""The few-shot task: which variables are whose, its regularisers, its evaluation, and what evaluation leaves alone."""

import copy
from functools import partial

import pytest
import torch
from episodic import (
    SHAPE,
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
    network,
    parameters,
    path,
    train,
)
from loops import trainer
from pytorch_lightning import LightningDataModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bilevel_lightning import (
    ANIL,
    BDA,
    BSGM,
    FOMAML,
    IAPTTGM,
    IMAML,
    MAML,
    MEHA,
    RHG,
    AggregatedDescent,
    BilevelError,
    GradientDescent,
    MetaSGD,
    Reptile,
    tree,
)
from bilevel_lightning.datamodules import Sinusoid
from bilevel_lightning.models import RegressionMLP
from bilevel_lightning.tasks import FewShot, FewShotRegression

sgd = lambda lr: lambda params: torch.optim.SGD(params, lr=lr)


def task(adapt="all", norm="transductive", steps=1, **settings):
    part = body(norm, **({"steps": steps} if norm == "per_step" else {}))
    return FewShot(part, head(part.features), adapt=adapt, **settings)


def names(module):
    return set(tree.of(module))


BODY = {f"body.{n}" for n in tree.of(body())}
HEAD = {"weight", "bias"}


@pytest.mark.parametrize(
    ("settings", "upper", "lower"),
    [
        ({"adapt": "head", "start": "fixed"}, BODY, HEAD),
        ({"adapt": "head"}, BODY | {f"head.{n}" for n in HEAD}, HEAD),
        ({"adapt": None}, BODY | {f"head.{n}" for n in HEAD}, HEAD),
        ({"adapt": "all"}, BODY | {f"head.{n}" for n in HEAD}, BODY | {f"head.{n}" for n in HEAD}),
    ],
)
def test_variables_of_the_structures(settings, upper, lower):
    found = task(**settings)
    assert names(found.upper) == upper
    assert names(found.lower) == lower
    x = tree.of(found.upper)
    start = found.initial_lower(x)
    assert {n: t.shape for n, t in start.items()} == {n: t.shape for n, t in tree.of(found.lower).items()}
    if settings.get("start") == "fixed":
        assert all(torch.equal(t, tree.of(found.lower)[n]) for n, t in start.items())
    else:
        prefix = "" if settings["adapt"] == "all" else "head."
        assert all(t is x[prefix + n] for n, t in start.items())
    assert not {id(p) for p in x.values()} & {id(p) for p in tree.of(found.lower).values()}


def test_without_a_head_the_body_is_the_network():
    whole = nn.Sequential(body(), head(16))
    found = FewShot(whole)
    assert found.adapt == "all"
    exact = by_hand(nn.ModuleDict({"body": whole})["body"], images(2), 0.3, 1)
    got = gradient(MAML(task=found, dynamics=GradientDescent(0.3)), images(2))
    close(got, {f"body.{n}": t for n, t in exact.items()})


PENALTIES = {
    "ridge": lambda y, y0: sum(t.square().sum() for t in y.values()),
    "distance": lambda y, y0: sum((t - y0[n]).square().sum() for n, t in y.items()),
    "p_norm": lambda y, y0: sum(
        (t.square().sum().sqrt() + (0.1 * torch.ones_like(t)).square().sum().sqrt()) ** (0.5 / 2) for t in y.values()
    ),
}


@pytest.mark.parametrize("adapt", ["all", "head"])
@pytest.mark.parametrize("name", PENALTIES)
def test_regularisers_are_their_formulas(name, adapt):
    part = task(adapt, regularizer=name, regularization=0.35)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in part.lower.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    y, start = tree.of(part.lower), part.initial_lower(tree.of(part.upper))
    episode = part.episodes(images(1))[0]
    support = part.prepare(episode)["support"]
    exact = cross_entropy(part.output(support[0]), support[1]) + 0.35 * PENALTIES[name](y, start)
    assert float(part.lower_loss(support).detach()) == pytest.approx(float(exact.detach()), rel=1e-12)
    assert float((exact - cross_entropy(part.output(support[0]), support[1])).detach()) > 1e-2


@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_with_regularisers(name):
    """Through the dependence of ``distance`` on y_0(x) too."""
    batch, net = images(2), network()
    w = parameters(net)
    total = 0.0
    for e in range(2):
        support, query = ((part[0][e], part[1][e]) for part in (batch["support"], batch["query"]))
        penalty = lambda y: 0.35 * PENALTIES[name](y, w)
        end = path(net, w, support, 0.2, 3, "head", penalty=penalty)[-1]
        total = total + cross_entropy(functional_call(net, end, (query[0],)), query[1]) / 2
    exact = dict(zip(w, torch.autograd.grad(total, [*w.values()]), strict=True))
    module = ANIL(
        task=task("head", regularizer=name, regularization=0.35), dynamics=GradientDescent(0.2), lower_steps=3
    )
    close(gradient(module, batch), exact)


def test_p_norm_at_a_head_of_zeros():
    """The norm has no derivative there; what is computed must be finite."""
    part = body()
    for at_once in (1, 2):
        module = RHG(
            task=FewShot(part, head(part.features, init="zero"), start="fixed", regularizer="p_norm"),
            lower_steps=3, episodes_at_once=at_once,
        )  # fmt: skip
        found = gradient(module, images(2))
        assert all(torch.isfinite(t).all() for t in found.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": None, "adapt": "head"}, "adapt 'head' needs a head"),
        ({"start": "fixed", "adapt": "all"}, "start 'fixed' leaves nothing to learn"),
        ({"start": "fixed", "regularizer": "distance"}, "start 'fixed' leaves nothing to learn"),
        ({"head": None, "start": "fixed"}, "start 'fixed' leaves nothing to learn"),
        ({"regularization": -0.1}, "FewShot.regularization must not be negative, got -0.1"),
        ({"stored_heads": -1, "start": "fixed"}, "FewShot.stored_heads must not be negative, got -1"),
        ({"stored_heads": 2}, "FewShot.stored_heads would replace the start that is learned"),
    ],
)
def test_impossible_settings(settings, message):
    part = body()
    with pytest.raises(BilevelError, match=message):
        FewShot(part, **{"head": head(part.features), **settings})


@pytest.mark.parametrize("setting", ["adapt", "start", "regularizer"])
def test_misspelt_choices(setting):
    part = body()
    with pytest.raises(BilevelError, match=setting):
        FewShot(part, head(part.features), **{setting: "nonsense"})


def test_a_frozen_layer_of_the_network():
    part = body()
    for p in part[0].parameters():
        p.requires_grad_(False)
    found = gradient(MAML(task=FewShot(part, head(part.features), adapt="all")), images(1))
    assert "body.0.weight" not in found


class Fake(LightningDataModule):
    def __init__(self, ways=WAYS, image_shape=SHAPE):
        super().__init__()
        self.ways, self.image_shape = ways, image_shape

    def train_dataloader(self):
        return Given([images(1, ways=self.ways, shape=self.image_shape)])


@pytest.mark.parametrize("settings", [{"adapt": "all"}, {"adapt": "head"}, {"adapt": "head", "start": "fixed"}])
def test_data_that_do_not_fit(settings):
    fit = lambda data: trainer(1).fit(RHG(task=task(**settings)), datamodule=data)
    fit(Fake())
    with pytest.raises(
        BilevelError,
        match=r"returns shape \(3,\) for an image and the data have 5 ways: set data.ways and the head's ways",
    ):
        fit(Fake(ways=5))
    with pytest.raises(BilevelError, match=r"does not accept images of shape \(3, 8, 8\) .*set body.image_shape"):
        fit(Fake(image_shape=(3, 8, 8)))
    with pytest.raises(
        BilevelError,
        match=r"does not accept images of shape \(1, 16, 16\) .*set body.image_shape and the head's features",
    ):
        fit(Fake(image_shape=(1, 16, 16)))


def test_checking_data_changes_nothing():
    for norm in ("frozen", "per_step"):
        part = task(norm=norm)
        before, state = copy.deepcopy(part.state_dict()), torch.get_rng_state()
        part.check_data(Fake())
        assert part.training
        assert all(m.training for m in part.modules())
        assert all(torch.equal(t, before[n]) for n, t in part.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)


def test_keys_of_torchmeta_are_the_same():
    batch = images(2)
    other = {"train": batch["support"], "test": batch["query"]}
    for at_once in (1, 2):
        make = lambda n=at_once: MAML(task=task(), lower_steps=2, episodes_at_once=n)
        close(gradient(make(), other), gradient(make(), batch), 0.0)
        found = [trainer(1).validate(make(), Given([b]), verbose=False)[0] for b in (batch, other)]
        assert found[0] == found[1]


def test_prediction_has_episode_label_and_class():
    module, batch = MAML(task=task(), dynamics=GradientDescent(0.3), lower_steps=2), images(3)
    (found,) = trainer(1).predict(module, Given([batch]))
    assert set(found) == {"batch", "episode", "label", "predicted"}
    number = batch["query"][1].shape[1]
    assert found["episode"].tolist() == [e for e in range(3) for _ in range(number)]
    assert found["label"].tolist() == batch["query"][1].flatten().tolist()
    net, want = network(), []
    for e in range(3):
        end = path(net, parameters(net), (batch["support"][0][e], batch["support"][1][e]), 0.3, 2, track=False)[-1]
        want += functional_call(net, end, (batch["query"][0][e],)).argmax(1).tolist()
    assert found["predicted"].tolist() == want


def test_prediction_of_a_regression():
    torch.manual_seed(0)
    module = MAML(task=FewShotRegression(RegressionMLP(hidden=(5,)).double()), lower_steps=2)
    (found,) = trainer(1).predict(module, Given([curves(2)]))
    assert set(found) == {"batch", "episode", "target", "predicted"}
    assert torch.equal(found["target"], curves(2)["query"][1].flatten())
    assert found["predicted"].shape == found["target"].shape


# `prepare`.
class Counting(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls, self.features = inner, 0, inner.features

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


class Recomputed(FewShot):
    """Evaluates the body in every step."""

    def prepare(self, batch):
        return batch

    def output(self, inputs):
        return self.lower(self.upper.get_submodule("body")(inputs))


HEADS = {
    "ANIL": (partial(ANIL, dynamics=GradientDescent(0.3), lower_steps=4), {}),
    "FOMAML": (partial(FOMAML, dynamics=GradientDescent(0.3), lower_steps=4), {}),
    "IMAML": (partial(IMAML, dynamics=GradientDescent(0.2), lower_steps=6), {}),
    "RHG": (partial(RHG, dynamics=GradientDescent(0.3), lower_steps=4), {"start": "fixed"}),
    "BDA": (partial(BDA, dynamics=AggregatedDescent(0.3, 0.2), lower_steps=4), {"start": "fixed"}),
    "IAPTTGM": (partial(IAPTTGM, dynamics=GradientDescent(1.2), lower_steps=4), {"start": "fixed"}),
}


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("name", HEADS)
def test_features_are_computed_once_and_the_gradient_is_that_of_recomputing_them(name, at_once):
    algorithm, settings = HEADS[name]
    if at_once == 2 and not algorithm.func.side_by_side:
        pytest.skip("one episode after the other")
    make = lambda kind: algorithm(
        task=kind(Counting(body()), head(16), **settings), **({} if at_once == 1 else {"episodes_at_once": at_once})
    )
    once, again = make(FewShot), make(Recomputed)
    batches = [images(4, seed) for seed in range(2)]
    for module in (once, again):
        module._checked = None
        module.configure_model()
        module._checked = True  # else the losses are looked at once, on the first episode
    found, want = (train(module, batches, log_every_n_steps=0)[0].gradients for module in (once, again))
    for left, right in zip(found, want, strict=True):
        close(left, right)
    calls = [module.task.upper["body"].calls for module in (once, again)]
    assert calls[0] == 2 * 2 * 4 // at_once  # support and query of each episode, or of each stack
    assert calls[1] >= 2 * 5 * 4 // at_once


# Evaluation.
def accuracy_by_hand(batch, lr, steps, adapted="", net=None):
    """The accuracies before and after adapting, and the query loss, of each episode."""
    net, out = net or network(), []
    for e in range(len(batch["support"][0])):
        support, query = ((part[0][e], part[1][e]) for part in (batch["support"], batch["query"]))
        ends = path(net, parameters(net), support, lr, steps, adapted, track=False)
        row = [
            float((functional_call(net, w, (query[0],)).argmax(1) == query[1]).double().mean())
            for w in (ends[0], ends[-1])
        ]
        out.append([*row, float(cross_entropy(functional_call(net, ends[-1], (query[0],)), query[1]).detach())])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_evaluation_adapts_with_its_own_settings_and_its_interval_is_over_all_episodes(stage, at_once):
    batches = [images(4, 1), images(4, 2), images(3, 3)]
    module = MAML(
        task=task(), dynamics=GradientDescent(0.1), lower_steps=1, evaluation_steps=4,
        evaluation_dynamics=GradientDescent(0.6),
        episodes_at_once=at_once,
    )  # fmt: skip
    run = trainer(1)
    (found,) = (run.validate if stage == "val" else run.test)(module, Given(batches), verbose=False)
    exact = torch.cat([accuracy_by_hand(batch, 0.6, 4) for batch in batches])
    before, after, loss = exact.T
    assert found[f"{stage}/accuracy"] == pytest.approx(float(after.mean()), rel=1e-6)
    assert found[f"{stage}/accuracy_before"] == pytest.approx(float(before.mean()), rel=1e-6)
    assert found[f"{stage}/upper_loss"] == pytest.approx(float(loss.mean()), rel=1e-6)
    for name, values in (("accuracy", after), ("accuracy_before", before)):
        assert values.std() > 0
        assert found[f"{stage}/{name}_ci95"] == pytest.approx(float(1.96 * values.std() / 11**0.5), rel=1e-5)
    assert f"{stage}/upper_loss_ci95" not in found
    again = (run.validate if stage == "val" else run.test)(module, Given(batches), verbose=False)[0]
    assert again == found


def test_evaluation_without_steps():
    module = MAML(task=task(), evaluation_steps=0)
    (found,) = trainer(1).validate(module, Given([images(3)]), verbose=False)
    assert "val/accuracy_before" not in found
    assert found["val/accuracy"] == pytest.approx(float(accuracy_by_hand(images(3), 0.1, 0)[:, 1].mean()), rel=1e-6)
    with pytest.raises(BilevelError, match="evaluation_steps must not be negative"):
        MAML(task=task(), evaluation_steps=-1)


def test_evaluation_dynamics_have_the_step_size_that_is_given():
    module = MAML(
        task=task(),
        dynamics=GradientDescent(0.1, learn_lr=True),
        evaluation_dynamics=GradientDescent(0.6),
        evaluation_steps=2,
    )
    module.configure_model()
    with torch.no_grad():
        module.upper_parameters()["dynamics/log_lr_factor"].fill_(-3.0)
    record = Record(module)
    trainer(1).validate(module, Given([images(1)]), verbose=False)
    assert float(record.evaluated[0]["upper_loss"]) == pytest.approx(
        float(accuracy_by_hand(images(1), 0.6, 2)[0, 2]), rel=1e-10
    )


ALL = {
    "MAML": MAML, "FOMAML": FOMAML, "MetaSGD": MetaSGD, "Reptile": Reptile, "IMAML": IMAML, "ANIL": ANIL, "RHG": RHG,
    "BDA": BDA, "IAPTTGM": IAPTTGM,
}  # fmt: skip


@pytest.mark.parametrize("norm", ["frozen", "per_step"])
@pytest.mark.parametrize("name", ALL)
def test_evaluation_changes_nothing(name, norm):
    structure = {"ANIL": {"adapt": "head"}, "IAPTTGM": {"adapt": "head", "start": "fixed"}}
    structure["RHG"] = structure["BDA"] = structure["IAPTTGM"]
    strong = {"strength": 50.0, "dynamics": GradientDescent(0.01)} if name == "IMAML" else {}
    module = ALL[name](task=task(norm=norm, steps=3, **structure.get(name, {})), lower_steps=2, **strong)
    train(module, [images(2)])
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    run = trainer(1)
    for evaluate in (run.validate, run.test):
        evaluate(module, Given([images(2, 1), images(1, 2)]), verbose=False)
    run.predict(module, Given([images(2, 1)]))
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())


def test_bda_does_not_look_at_query_labels_when_evaluated():
    batch = images(2)
    flipped = {**batch, "query": (batch["query"][0], (batch["query"][1] + 1) % WAYS)}
    module = BDA(task=task("head", start="fixed"), dynamics=AggregatedDescent(0.3, 5.0, 0.5), lower_steps=4)
    found = [trainer(1).predict(module, Given([b]))[0]["predicted"] for b in (batch, flipped)]
    assert torch.equal(*found)
    record = Record(module)
    for b in (batch, flipped):
        trainer(1).validate(module, Given([b]), verbose=False)
    first, _, other, _ = (float(r["accuracy"]) for r in record.evaluated)
    assert first + other <= 1  # the same predictions against other labels
    seen = [gradient(module, b) for b in (batch, flipped)]
    assert float((seen[0]["body.0.weight"] - seen[1]["body.0.weight"]).abs().max()) > 1e-3  # training does look


# Running statistics.
def tracked(module):
    return {n: t.clone() for n, t in module.named_buffers() if n.endswith("num_batches_tracked")}


def test_frozen_statistics_advance_once_in_an_upper_iteration():
    """On the support set along the steps, y_0 to y_T, of each episode; of a shared body on both sets of the episode."""
    module = MAML(task=task(norm="frozen"), lower_steps=2, evaluation_steps=3)
    train(module, [images(2, 0), images(2, 1)], val=[images(3)])
    assert {int(t) for n, t in tracked(module).items() if ".lower." in n} == {2 * 2 * 4}
    assert {int(t) for n, t in tracked(module).items() if ".upper." in n} == {0}
    module = ANIL(task=task("head", norm="frozen"), lower_steps=2, evaluation_steps=3)
    train(module, [images(2, 0), images(2, 1)], val=[images(3)])
    assert {int(t) for t in tracked(module).values()} == {2 * 2 * 2}


def test_frozen_statistics_are_those_of_the_new_weights_along_the_steps():
    """The first layer's running mean, by hand, after one iteration."""
    batch = images(2)
    module = MAML(task=task(norm="frozen"), upper_optimizer=sgd(0.5), dynamics=GradientDescent(0.3), lower_steps=2)
    train(module, [batch])
    net, mean = network("frozen"), torch.zeros(4, dtype=torch.float64)
    w = {n: t.requires_grad_() for n, t in tree.detach(module.upper_parameters()).items()}
    for e in range(2):
        support = batch["support"][0][e], batch["support"][1][e]
        for at in path(net, w, support, 0.3, 2, track=False):
            maps = nn.functional.conv2d(support[0], at["body.0.weight"], at["body.0.bias"], padding=1)
            mean = 0.9 * mean + 0.1 * maps.mean((0, 2, 3)).detach()
    found = module.task.lower["body"][1].running_mean
    torch.testing.assert_close(found, mean, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("memory", ["graph", "recompute"])
def test_each_lower_step_has_statistics_of_its_own(memory):
    module = MAML(task=task(norm="per_step", steps=3), lower_steps=2, memory=memory)
    train(module, [images(2, 0), images(2, 1)])
    for n, t in tracked(module).items():
        assert t.tolist() == ([4, 4, 4] if ".lower." in n else [0, 0, 0]), n
    layer = module.task.lower["body"][1]
    assert len({float(t) for t in layer.running_mean[:, 0]}) == 3


class PerStepNetwork(nn.Module):
    """The network with per-step normalisation by the batch, at a given step; written with plain functions."""

    def __init__(self, t=0):
        super().__init__()
        self.t = t

    def run(self, w, x, t):
        for i, j in ((0, 1), (4, 5)):
            x = nn.functional.conv2d(x, w[f"body.{i}.weight"], w[f"body.{i}.bias"], padding=1)
            x = nn.functional.batch_norm(x, None, None, w[f"body.{j}.weight"][t], w[f"body.{j}.bias"][t], training=True)
            x = nn.functional.max_pool2d(x.relu(), 2)
        return nn.functional.linear(x.flatten(1), w["head.weight"], w["head.bias"])


def per_step_start(part):
    """Affine parameters that differ from step to step."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in part.modules():
            if hasattr(layer, "lower_step"):
                for p in layer.parameters():
                    p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return part


def per_step_by_hand(part, batch, lr, steps, weights):
    """The mean of sum_t w_t f(x, y_t), f always with the last set of the layers, g at step t with set t."""
    net, w, total = PerStepNetwork(), parameters(part.upper), 0.0
    for e in range(len(batch["support"][0])):
        support, query = ((p[0][e], p[1][e]) for p in (batch["support"], batch["query"]))
        at = w
        for t in range(steps):
            g = torch.autograd.grad(
                cross_entropy(net.run(at, support[0], t), support[1]), [*at.values()], create_graph=True
            )
            at = {n: v - lr * d for (n, v), d in zip(at.items(), g, strict=True)}
            total = total + weights[t] * cross_entropy(net.run(at, query[0], steps), query[1])
    return dict(zip(w, torch.autograd.grad(total / len(batch["support"][0]), [*w.values()]), strict=True))


@pytest.mark.parametrize("memory", ["graph", "recompute", "mixed"])
def test_lower_steps_use_their_own_normalisation(memory):
    make = lambda: per_step_start(task(norm="per_step", steps=4))
    module = MAML(task=make(), dynamics=GradientDescent(0.2), lower_steps=3, memory=memory)
    close(gradient(module, images(2)), per_step_by_hand(make(), images(2), 0.2, 3, [0, 0, 1]))


def hook_of_steps(part):
    calls = []
    inner = part.at_lower_step
    object.__setattr__(part, "at_lower_step", lambda t: (calls.append(t), inner(t))[1])
    return calls


def per_step_gradient(algorithm, structure, **settings):
    part = per_step_start(convolutional_head(**structure))
    return gradient(algorithm(task=part, **settings), images(2, 3))


def convolutional_head(**structure):
    from bilevel_lightning.models import ConvHead, ConvNetBody

    torch.manual_seed(0)
    part = ConvNetBody(SHAPE, width=4, blocks=1, norm="transductive")
    return FewShot(part.double(), ConvHead(part.shape, WAYS, width=4, norm="per_step", steps=6).double(), **structure)


def test_memory_makes_no_difference_for_aggregated_steps_with_normalisation_of_each_step():
    settings = {"dynamics": AggregatedDescent(0.2, 0.2, 0.3), "lower_steps": 4}
    found = [per_step_gradient(BDA, {"start": "fixed"}, memory=m, **settings) for m in ("graph", "recompute")]
    close(found[1], found[0])


def test_two_passes_are_one_with_normalisation_of_each_step():
    settings = {"dynamics": GradientDescent(1.5), "lower_steps": 5}
    found = [per_step_gradient(IAPTTGM, {"start": "fixed"}, two_pass=two, **settings) for two in (False, True)]
    close(found[1], found[0])


def test_prediction_and_validation_agree_with_normalisation_of_each_step():
    module = MAML(task=per_step_start(task(norm="per_step", steps=3)), dynamics=GradientDescent(0.4), lower_steps=2)
    entered = hook_of_steps(module.task)
    trainer(1).predict(module, Given([images(1)]))
    assert entered[-1] == 2


def test_before_has_the_normalisation_of_step_zero():
    module = MAML(task=per_step_start(task(norm="per_step", steps=3)), dynamics=GradientDescent(0.4), lower_steps=2)
    entered = hook_of_steps(module.task)
    inner, at = module.task.metrics, []
    object.__setattr__(module.task, "metrics", lambda batch: (at.append(entered[-1]), inner(batch))[1])
    trainer(1).validate(module, Given([images(1)]), verbose=False)
    assert sorted(at) == [0, 2]


def test_logged_upper_loss_is_that_of_the_step():
    part = per_step_start(task(norm="per_step", steps=4))
    batch = images(1)
    record, _ = train(MAML(task=part, dynamics=GradientDescent(0.2), lower_steps=3), [batch])
    part, net = per_step_start(task(norm="per_step", steps=4)), PerStepNetwork()
    at = parameters(part.upper)
    (x, y), (x_q, y_q) = ((p[0][0], p[1][0]) for p in (batch["support"], batch["query"]))
    for t in range(3):
        g = torch.autograd.grad(cross_entropy(net.run(at, x, t), y), [*at.values()])
        at = {n: v - 0.2 * d for (n, v), d in zip(at.items(), g, strict=True)}
    exact = float(cross_entropy(net.run(at, x_q, 3), y_q).detach())
    assert float(record.logs[0]["train/upper_loss"]) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_normalisation_is_reported(adapt):
    for norm in ("transductive", "frozen", "per_step"):
        assert task(adapt, norm=norm).normalization == norm
    assert task(adapt, norm="none").normalization == "no batch normalisation"


def test_normalisation_of_a_fixed_head_is_reported():
    assert "per_step" in convolutional_head(start="fixed").normalization


# A short real run.
class Sine(FewShotRegression):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(RegressionMLP(hidden=(8,)).double())


def sine(folder, steps, workers=0, resume=None, **settings):
    module = MAML(
        task=Sine(), dynamics=GradientDescent(0.01), upper_optimizer=lambda p: torch.optim.Adam(p, lr=0.01), **settings
    )
    data = Sinusoid(shots=4, queries=5, episodes_per_batch=3, epoch_length=4, val_episodes=5, num_workers=workers)
    save = ModelCheckpoint(dirpath=folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    run = trainer(steps, callbacks=[save], enable_checkpointing=True)
    run.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, run


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_workers_and_resuming_change_nothing(tmp_path):
    plain, run = sine(tmp_path / "plain", 10)
    assert run.global_step == 10
    workers, _ = sine(tmp_path / "workers", 10, workers=2)
    resumed, _ = sine(tmp_path / "plain", 10, resume=tmp_path / "plain" / "step=5.ckpt")
    start = Sine().state_dict()
    for other in (workers, resumed):
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in plain.state_dict().items())
    assert not torch.equal(plain.state_dict()["task.upper.body.0.weight"], start["upper.body.0.weight"])
    assert {"val/mse", "val/mse_before", "val/mse_ci95"} <= set(run.callback_metrics)
    side, _ = sine(tmp_path / "side", 10, episodes_at_once=2)
    for n, t in plain.state_dict().items():
        torch.testing.assert_close(side.state_dict()[n], t, rtol=1e-10, atol=1e-12)


# A start and a store for each episode.


class Remembered(FewShot):
    """Each of some tasks, whose ``number`` comes with the episode, starts where it last ended."""

    def __init__(self, tasks):
        super().__init__(body(), head(body().features), start="fixed")
        self.fresh = tree.clone(tree.of(self.lower))
        self.heads = [tree.clone(self.fresh) for _ in range(tasks)]
        self.calls = []

    def episode_lower(self, upper, episode):
        return self.heads[int(episode["number"])] if self.training else self.fresh

    def keep_lower(self, episode, lower):
        self.calls.append(int(episode["number"]))
        self.heads[int(episode["number"])] = tree.clone(lower)

    def episodes(self, batch):
        parts = super().episodes({key: batch[key] for key in ("support", "query")})
        return [{**part, "number": number} for part, number in zip(parts, batch["number"], strict=True)]

    def prepare(self, batch):
        return {**super().prepare({key: batch[key] for key in ("support", "query")}), "number": batch["number"]}


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_tasks_that_remember_their_heads(at_once):
    """The solution of each episode is kept, and is where it starts again, one by one or side by side."""
    numbers = [[4, 0, 2], [0, 1, 4]]
    batches = [{**images(3, seed=i), "number": torch.tensor(n)} for i, n in enumerate(numbers)]
    own = Remembered(5)
    module = RHG(
        task=own, dynamics=GradientDescent(0.1), lower_steps=3, episodes_at_once=at_once, upper_optimizer=sgd(0.0)
    )
    trainer(2).fit(module, Given(batches))
    assert own.calls == [4, 0, 2, 0, 1, 4]
    heads, net = [own.fresh] * 5, network()
    for batch in batches:
        for i, *support in zip(batch["number"], *batch["support"], strict=True):
            start = {**parameters(net), **{f"head.{name}": t.requires_grad_() for name, t in heads[i].items()}}
            end = path(net, start, support, 0.1, 3, adapted="head.")[-1]
            heads[i] = {name: end[f"head.{name}"].detach() for name in own.fresh}
    for found, want in zip(own.heads, heads, strict=True):
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)
    assert not torch.equal(own.heads[0]["weight"], own.heads[1]["weight"])


# Ridge softmax heads: implicit hypergradients, side by side, and warm starts.
RIDGE = {"start": "fixed", "regularizer": "ridge", "regularization": 0.05}


def ridge(at_once=None, stored=0, steps=4, lr=0.2, norm="transductive", **settings):
    part = body(norm, tanh=True)
    own = FewShot(part, head(part.features, init="zero"), stored_heads=stored, **RIDGE)
    dynamics = GradientDescent(lr)
    return BSGM(
        task=own, dynamics=dynamics, lower_steps=steps, episodes_at_once=at_once, upper_optimizer=sgd(0.5), **settings
    )


def test_implicit_hypergradient_of_ridge_heads_is_that_of_the_solved_heads():
    """Against differentiating through all steps of a lower level that is solved to rounding."""
    batch, found = images(2), ridge(steps=160, lr=0.5)
    unrolled = RHG(task=ridge().task, dynamics=GradientDescent(0.5), lower_steps=160)
    found.task.regularization = unrolled.task.regularization = 0.5
    close(gradient(found, batch), gradient(unrolled, batch))


@pytest.mark.parametrize("stored", [0, 5, 10])
@pytest.mark.parametrize("at_once", [2, 3, 5])
def test_implicit_results_do_not_depend_on_the_chunk(at_once, stored):
    batches = [{**images(5, seed=i), "episode": torch.arange(5) + 5 * (i % 2)} for i in range(3)]
    chunked, single = ridge(at_once, stored), ridge(1, stored)
    found, want = (train(module, batches)[0] for module in (chunked, single))
    for a, b in zip(found.gradients, want.gradients, strict=True):
        close(a, b)
    for a, b in zip(found.logs, want.logs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"train/residual"}:  # that of a chunk is of its linear systems as one
            torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    want = single.state_dict()
    for name, value in chunked.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=1e-10, atol=1e-12)
    assert torch.equal(chunked.oracles, single.oracles)


@pytest.mark.parametrize("at_once", [1, 4])
def test_hypergradient_of_a_batch_is_the_mean_of_its_episodes(at_once):
    batch = images(4)
    ones = [{key: (x[i : i + 1], y[i : i + 1]) for key, (x, y) in batch.items()} for i in range(4)]
    singles = [gradient(ridge(), one) for one in ones]
    assert max(float((a - b).abs().max()) for a, b in zip(singles[0].values(), singles[1].values(), strict=True)) > 1e-3
    close(gradient(ridge(at_once), batch), tree.mean(singles, [1] * 4))


def heads_by_hand(batches, rows, number, steps=4, lr=0.2):
    """The stored heads after descent from them, at the weights that x keeps."""
    part = body(tanh=True)
    heads = [tree.detach(tree.of(head(part.features, init="zero")))] * number
    for batch, numbers in zip(batches, rows, strict=True):
        for row, x, labels in zip(numbers, *batch["support"], strict=True):
            features, y = part(x).detach(), heads[row]
            for _ in range(steps):
                y = {name: t.requires_grad_() for name, t in y.items()}
                loss = cross_entropy(nn.functional.linear(features, y["weight"], y["bias"]), labels)
                loss = loss + 0.05 * sum(t.square().sum() for t in y.values())
                slopes = torch.autograd.grad(loss, [*y.values()])
                y = {name: (t - lr * g).detach() for (name, t), g in zip(y.items(), slopes, strict=True)}
            heads[row] = y
    return heads


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("start", ["naive", "full"])
def test_heads_start_where_those_of_the_place_or_of_the_task_ended(start, at_once):
    """Six tasks in batches of three, twice: the naive start is another task's head, the full one the task's own."""
    tasks = [{**images(3, seed=i), "episode": torch.arange(3 * i, 3 * i + 3)} for i in range(2)]
    batches, full = [*tasks, tasks[0]], [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    number, rows = (3, [[0, 1, 2]] * 3) if start == "naive" else (6, full)
    module = ridge(at_once, number)
    module.upper_optimizer = sgd(0.0)
    train(module, batches)
    want = heads_by_hand(batches, rows, number)
    for name, t in module.task.stored.get().items():
        torch.testing.assert_close(t, torch.stack([y[name] for y in want]), rtol=1e-12, atol=1e-14)
    assert {"task.stored.weight", "task.stored.bias"} <= set(module.state_dict())
    fresh, numbered = ridge(at_once, number), [{key: b[key] for key in ("support", "query")} for b in batches]
    fresh.upper_optimizer = sgd(0.0)
    train(fresh, numbered)  # without numbers: those of the places
    same = torch.equal(fresh.task.stored.get()["weight"], module.task.stored.get()["weight"])
    assert same == (start == "naive")


def test_evaluations_start_from_the_head_as_it_was_made():
    warm, cold = ridge(stored=2), ridge()
    train(warm, [images(2), images(2, 1)])
    tree.assign(cold.task.upper, tree.of(warm.task.upper))
    assert float(warm.task.stored.get()["weight"].abs().max()) > 1e-2
    records = [Record(module) for module in (warm, cold)]
    for module in (warm, cold):
        trainer(1).validate(module, Given([images(3, 7)]), verbose=False)
    for found, want in zip(records[0].evaluated, records[1].evaluated, strict=True):
        assert all(torch.equal(found[name], t) for name, t in want.items())


def test_rows_of_processes_are_their_own(monkeypatch):
    own = ridge(stored=6).task
    monkeypatch.setattr("bilevel_lightning.tasks.few_shot.processes", lambda: 2)
    monkeypatch.setattr("bilevel_lightning.tasks.few_shot.rank", lambda: 1)
    assert [int(part["episode"]) for part in own.episodes(images(3))] == [3, 4, 5]
    own.eval()
    assert all("episode" not in part for part in own.episodes(images(3)))


def test_more_episodes_than_stored_heads():
    with pytest.raises(BilevelError, match="FewShot.stored_heads=2 is less than the 3 episodes of a batch"):
        train(ridge(stored=2), [images(3)])


class Stored(LightningDataModule):
    def __init__(self, train_episodes):
        super().__init__()
        self.episodes_per_batch, self.train_episodes = 4, train_episodes


@pytest.mark.parametrize(("stored", "tasks"), [(0, None), (4, None), (4, 8), (8, 8), (0, 8)])
def test_stored_heads_that_fit_the_data(stored, tasks):
    ridge(stored=stored).task.check_data(Stored(tasks))


@pytest.mark.parametrize(("stored", "tasks"), [(8, None), (12, 8)])
def test_stored_heads_that_do_not_fit_the_data(stored, tasks):
    with pytest.raises(
        BilevelError, match=f"stores {stored} heads.*4 episodes.*train_episodes={tasks}: set task.store"
    ):
        ridge(stored=stored).task.check_data(Stored(tasks))


class RidgeSine(FewShotRegression):
    def __init__(self, stored):
        torch.manual_seed(0)
        network = RegressionMLP(hidden=(8,))
        super().__init__(nn.Sequential(*[*network][:-1]).double(), network[-1].double(), stored_heads=stored, **RIDGE)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("algorithm", [BSGM, partial(BSGM, warm_start_linear=True), MEHA])
def test_stored_heads_of_a_fixed_set_of_tasks_resume(algorithm, tmp_path):
    """Two passes over six waves; resumed in the middle, from the checkpoint's heads and what is kept beside them."""

    def run(folder, resume=None):
        module = algorithm(task=RidgeSine(6), lower_steps=3, dynamics=GradientDescent(0.05), upper_optimizer=sgd(0.01))
        data = Sinusoid(shots=4, queries=5, episodes_per_batch=3, epoch_length=2, val_episodes=2, train_episodes=6)
        save = ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        trainer(4, callbacks=[save], enable_checkpointing=True).fit(
            module, datamodule=data, ckpt_path=resume, weights_only=True
        )
        return module.state_dict()

    plain = run(tmp_path)
    resumed = run(tmp_path, tmp_path / "step=3.ckpt")
    assert all(torch.equal(t, resumed[name]) for name, t in plain.items())
    stored = [t for name, t in plain.items() if name.endswith("weight") and ("stored" in name or "states" in name)]
    assert len(stored) == (1 if algorithm is BSGM else 2)
    for heads in stored:
        assert len({tuple(row.flatten().tolist()) for row in heads}) == 6
