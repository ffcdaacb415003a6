"""Minibatches evaluated in parts: the same steps, in the memory of a part."""

import pytest
import torch
from loops import trainer
from problems import relative
from torch import nn

from bilevel_lightning import BilevelError, BilevelTask, GradientDescent, Minibatches, algorithms, tree
from bilevel_lightning.binding import bind

SECOND = {"RHG", "ITD", "AID", "AIDCG", "AIDNeumann", "AIDFP", "GPBGD", "SOBA", "StocBiO", "IAPTTGM"}
FIRST = {"MEHA", "F2SA", "VPBGD", "BOME", "BVFSM", "DARTS", "SAMA", "PZOBO"}


class Weighted(BilevelTask):
    """A small network on weighted samples; it remembers how many samples its losses have seen at once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.upper = nn.Embedding(40, 1, dtype=torch.float64)
        self.lower = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.seen = []

    def upper_loss(self, batch):
        inputs, targets = batch
        self.seen.append(len(inputs))
        return (self.lower(inputs) - targets).square().mean() + 0.01 * self.upper.weight.square().sum()

    def lower_loss(self, batch):
        inputs, targets, index, scale = batch
        self.seen.append(len(inputs))
        weights = torch.sigmoid(self.upper(index))
        ridge = torch.stack([p.square().sum() for p in self.lower.parameters()]).sum()
        return (weights * (self.lower(inputs) - targets).square()).mean() * scale[0] + 0.1 * ridge


class Prepared(Weighted):
    """The inputs of both levels depend on x."""

    def prepare(self, batch):
        scale = 1 + torch.tanh(self.upper.weight[:3].sum())
        return {k: Minibatches([(scale * part[0], *part[1:]) for part in v]) for k, v in batch.items()}


def batch(lower=(17, 12), upper=(11, 16)):
    torch.manual_seed(1)
    draw = lambda n: (torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64))
    scale = torch.tensor([1.5, 2.0], dtype=torch.float64)  # not a tensor of samples: it is not cut
    lowers = Minibatches([(*draw(n), torch.randint(40, (n,)), scale) for n in lower])
    return {"lower": lowers, "upper": Minibatches([draw(n) for n in upper])}


def one(name, samples_at_once, task=Weighted, **settings):
    """One step of an algorithm: direction, y, values; and the largest number of samples that a loss saw."""
    moves = {"lower_steps": 3} if name == "SAMA" else {"dynamics": GradientDescent(0.1), "lower_steps": 3}
    moves = {} if name in ("GPBGD", "SOBA") else moves  # they have a step size of their own
    task = task()
    module = getattr(algorithms, name)(task=task, **moves, **settings)
    module.configure_model()
    x, y = tree.detach(module.upper_parameters()), tree.detach(tree.of(task.lower))
    problem, x, pull_back = bind(task, batch(), x, samples_at_once=samples_at_once)
    torch.manual_seed(2)
    step = module.bilevel_step(problem, x, y)
    lower = step.lower(problem, x) if callable(step.lower) else step.lower
    return {**pull_back(step.upper_grad), **lower, **step.logs}, problem.counts, max(task.seen)


@pytest.mark.parametrize("name", sorted(FIRST))
def test_the_step_is_that_of_the_whole_minibatches(name):
    whole, counts, seen = one(name, None)
    assert seen == 17
    for size, most in ((5, 5), (16, 16), (17, 17), (100, 17)):
        parts, again, seen = one(name, size)
        assert seen == most
        assert again == counts
        for key, value in whole.items():
            torch.testing.assert_close(parts[key], value, rtol=1e-11, atol=1e-13, msg=key)


@pytest.mark.parametrize("name", ["F2SA", "MEHA", "SAMA"])
def test_what_was_prepared_comes_in_parts_too(name):
    whole, _, _ = one(name, None, Prepared)
    parts, _, seen = one(name, 5, Prepared)
    assert seen == 5
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-11, atol=1e-13, msg=key)
    assert (whole["weight"] - one(name, None)[0]["weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("name", sorted(SECOND & set(algorithms.__all__)))
def test_second_derivatives_are_refused(name):
    with pytest.raises(BilevelError, match="samples_at_once is for methods without second derivatives"):
        one(name, 5)


@pytest.mark.parametrize("memory", ["graph", "recompute", "mixed"])
def test_second_derivatives_are_refused_by_every_rule(memory):
    with pytest.raises(BilevelError, match="samples_at_once is for methods without second derivatives"):
        one("RHG", 5, memory=memory)


class OneBatch:
    def __len__(self):
        return 3

    def __iter__(self):
        return iter([batch()] * 3)


def test_a_run_takes_the_setting():
    found = []
    for size in (None, 4):
        task = Weighted()
        module = algorithms.F2SA(task=task, lower_steps=2, samples_at_once=size)
        run = trainer(3, precision="64-true")
        run.fit(module, OneBatch())
        assert max(task.seen) == (17 if size is None else 4)
        found.append({**tree.of(task), "value": run.callback_metrics["train/upper_loss"]})
    assert relative(torch.cat([t.flatten() for t in found[1].values()]),
                    torch.cat([t.flatten() for t in found[0].values()])) < 1e-7  # fmt: skip
    assert not torch.equal(found[1]["lower.0.weight"], Weighted().lower[0].weight)


def test_settings_that_do_not_fit():
    with pytest.raises(BilevelError, match="samples_at_once must be a positive number, got 0"):
        algorithms.F2SA(task=Weighted(), samples_at_once=0)
    task = Weighted()
    task.persistent_lower = False
    with pytest.raises(BilevelError, match="set episodes_at_once instead"):
        trainer(1).fit(algorithms.F2SA(task=task, samples_at_once=4), OneBatch())
