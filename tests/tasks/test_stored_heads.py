"""Heads that persist by task, for methods that move y once in an upper iteration and keep twins beside it."""

from functools import partial

import pytest
import torch
from episodic import Given, body, close, head, images, train
from loops import trainer
from torch import nn
from torch.nn.functional import cross_entropy, linear

from bilevel_lightning import (
    AIDCG,
    BAMM,
    BOME,
    BSGM,
    BVFSM,
    F2SA,
    FSLA,
    GPBGD,
    MEHA,
    SOBA,
    VPBGD,
    BilevelError,
    GradientDescent,
    tree,
)
from bilevel_lightning.datamodules import Sinusoid
from bilevel_lightning.estimators import Plain
from bilevel_lightning.task import Bilevel
from bilevel_lightning.tasks import FewShot, FewShotRegression

RIDGE = {"start": "fixed", "regularizer": "ridge", "regularization": 0.05}
sgd = lambda lr: lambda params: torch.optim.SGD(params, lr=lr)


class Whole(FewShot):
    """The lower problem of one episode whose head persists."""

    persistent_lower = True


def few(kind=FewShot, **settings):
    part = body(tanh=True)
    return kind(part, head(part.features), **RIDGE, **settings)


def numbered(rows, seed):
    """A batch of the tasks with these numbers, which are the same data whenever they come."""
    ones = [images(1, seed=100 * seed + row) for row in rows]
    return {
        **{key: tuple(torch.cat([one[key][i] for one in ones]) for i in (0, 1)) for key in ("support", "query")},
        "episode": torch.tensor(rows),
    }


KEEPING = {
    "MEHA": partial(MEHA, dynamics=GradientDescent(0.2), lower_steps=2),
    "VPBGD": VPBGD,
    "VPBGD, twin kept": partial(VPBGD, twin="persistent"),
    "GPBGD": GPBGD,
    "BOME": BOME,
    "BAMM": BAMM,
    "F2SA": F2SA,
    "BVFSM": BVFSM,
    "SOBA": SOBA,
    "FSLA": partial(FSLA, estimator=Plain()),
    "AIDCG, linear system warm": partial(AIDCG, warm_start_linear=True, lower_steps=4),
    "BSGM, linear system warm": partial(BSGM, warm_start=True, warm_start_linear=True, lower_steps=4),
}


@pytest.mark.parametrize("name", KEEPING)
def test_the_only_task_of_a_pool_is_one_whose_head_persists(name):
    """The same weights, head, and what is kept beside it."""
    batches = [numbered([0], 1)] * 5
    stored, whole = KEEPING[name](task=few(stored_heads=1)), KEEPING[name](task=few(Whole))
    plain = [{key: batch[key] for key in ("support", "query")} for batch in batches]
    found, want = train(stored, batches)[0], train(whole, plain)[0]
    for a, b in zip(found.gradients, want.gradients, strict=True):
        close(a, b, 1e-12)
    close({n: t[0] for n, t in stored.task.stored.get().items()}, tree.detach(tree.of(whole.task.lower)), 1e-12)
    assert set(stored.states) == set(whole.states)
    for kept in stored.states:
        close({n: t[0] for n, t in stored.states[kept].get().items()}, whole.kept(kept), 1e-12)
    start = tree.of(head(16))
    assert all(float((t[0] - start[n]).detach().abs().max()) > 1e-4 for n, t in stored.task.stored.get().items())


ETA, BETA, ALPHA, GAMMA, C = 0.3, 0.2, 0.4, 2.0, 3.0


def meha_by_hand(number, batches, steps):
    """MEHA on the joint problem, y and theta being all tasks' heads: g the sum of their losses, f the mean.

    c is C over the number of tasks in the batch, and so is the step of x.
    """
    part = body(tanh=True)
    start = tree.detach(tree.of(head(part.features)))
    y, theta = [dict(start) for _ in range(number)], [dict(start) for _ in range(number)]

    def g(i, heads, batch, at):
        x, labels = (part_[at] for part_ in batch["support"])
        loss = cross_entropy(linear(part(x), heads[i]["weight"], heads[i]["bias"]), labels)
        return loss + 0.05 * sum(t.square().sum() for t in heads[i].values())

    def f(i, heads, batch, at):
        x, labels = (part_[at] for part_ in batch["query"])
        return cross_entropy(linear(part(x), heads[i]["weight"], heads[i]["bias"]), labels)

    def total(loss, heads, batch):
        return sum(loss(i, heads, batch, at) for at, i in enumerate(batch["episode"].tolist()))

    def slopes(value, heads, rows):
        for_rows = [heads[i][name] for i in rows for name in start]
        flat = iter(torch.autograd.grad(value, for_rows))
        return [{name: next(flat) for name in start} for _ in rows]

    for batch in batches:
        rows, size = batch["episode"].tolist(), len(batch["episode"])
        c = C / size
        for _ in range(steps):
            leaves = {i: {n: t.detach().requires_grad_() for n, t in theta[i].items()} for i in rows}
            near = sum((leaves[i][n] - y[i][n]).square().sum() for i in rows for n in start) / (2 * GAMMA)
            d = slopes(total(g, leaves, batch) + near, leaves, rows)
            for i, slope in zip(rows, d, strict=True):
                theta[i] = {n: theta[i][n] - ETA * slope[n] for n in start}
        value = total(f, y, batch) / size / c + total(g, y, batch) - total(g, theta, batch)
        d_x = torch.autograd.grad(value, [*part.parameters()])
        with torch.no_grad():
            for p, slope in zip(part.parameters(), d_x, strict=True):
                p.sub_(ALPHA / size * slope)
        leaves = {i: {n: t.detach().requires_grad_() for n, t in y[i].items()} for i in rows}
        d_y = slopes(total(f, leaves, batch) / size / c + total(g, leaves, batch), leaves, rows)
        for i, slope in zip(rows, d_y, strict=True):
            y[i] = {n: y[i][n] - BETA * (slope[n] - (y[i][n] - theta[i][n]) / GAMMA) for n in start}
    return {n: p.detach() for n, p in part.named_parameters()}, y, theta


def meha(stored, at_once=None, lr=ALPHA, steps=1):
    return MEHA(
        task=few(stored_heads=stored), dynamics=GradientDescent(ETA), lower_lr=BETA, gamma=GAMMA, c=C,
        upper_optimizer=sgd(lr), lower_steps=steps, episodes_at_once=at_once,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "steps"),
    [([[0, 1, 2, 3]] * 4, 1), ([[2, 0, 3, 1], [0, 1, 2, 3]], 3), ([[0, 1, 2], [3, 4, 5], [5, 0, 2], [1, 3, 4]], 1)],
)
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_meha_on_a_pool_of_tasks_is_meha_on_their_joint_problem(at_once, rows, steps):
    """With all tasks in every batch, and with some of them, whose parts of y and theta alone move."""
    number, batches = 1 + max(map(max, rows)), [numbered(part, 2) for part in rows]
    module = meha(number, at_once, steps=steps)
    record, _ = train(module, batches)
    x, y, theta = meha_by_hand(number, batches, steps)
    close({n.removeprefix("body."): t.detach() for n, t in tree.of(module.task.upper).items()}, x, 1e-12)
    stacked = lambda heads: {n: torch.stack([one[n] for one in heads]) for n in heads[0]}
    close(module.task.stored.get(), stacked(y), 1e-12)
    close(module.states["theta"].get(), stacked(theta), 1e-12)
    alone = train(meha(number, 1, steps=steps), batches)[0]
    for a, b in zip(record.logs, alone.logs, strict=True):
        assert "train/gap" in a
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    assert len({tuple(t.flatten().tolist()) for t in module.states["theta"].get()["weight"]}) == number


def test_evaluations_of_meha_adapt_the_head_as_it_was_made():
    """Also between iterations: the stored heads and twins have no part in them and stay as they are."""
    module = meha(2)
    train(module, [numbered([0, 1], 3)] * 2)
    before = {n: t.clone() for n, t in module.state_dict().items() if "stored" in n or "states" in n}
    (found,) = trainer(1).validate(module, Given([images(3, 7)]), verbose=False)
    fresh = meha(2)
    tree.assign(fresh.task.upper, tree.of(module.task.upper))
    assert trainer(1).validate(fresh, Given([images(3, 7)]), verbose=False)[0] == found
    assert len(before) == 4
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in before.items())


@pytest.mark.parametrize("algorithm", [MEHA, VPBGD, SOBA])
def test_single_loops_need_heads_that_persist(algorithm):
    with pytest.raises(BilevelError, match="so y must persist: .*store those of the episodes .FewShot.stored_heads"):
        train(algorithm(task=few()), [images(2)])


@pytest.mark.parametrize("tasks", [None, 6])
def test_single_loops_refuse_heads_of_other_tasks(tasks):
    """Heads of the places in a batch, which suit methods that solve the lower level."""
    module = MEHA(
        task=FewShotRegression(nn.Sequential(nn.Linear(1, 4), nn.Tanh()), nn.Linear(4, 1), stored_heads=2, **RIDGE)
    )
    data = Sinusoid(shots=2, queries=2, episodes_per_batch=2, val_episodes=2, epoch_length=1, train_episodes=tasks)
    with pytest.raises(BilevelError, match=f"the task stores 2, and data.train_episodes is {tasks}: set both"):
        trainer(1).fit(module, datamodule=data)


class Unprepared(FewShot):
    prepare = Bilevel.prepare


def test_estimators_that_compare_iterations_are_refused():
    with pytest.raises(BilevelError, match="STORM compares directions of successive iterations.* use Plain"):
        train(FSLA(task=few(Unprepared, stored_heads=2)), [numbered([0, 1], 4)])
