"""One y divided between two processes: what one process gives, half of the memory, and refusals."""

import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from contract import CASES, PROBLEMS, Patches, Save, ended, made, trained
from pytorch_lightning import Callback
from torch import nn

from bilevel_lightning import RHG, BilevelError, algorithms, dynamics, tree
from bilevel_lightning.datamodules.cleaning import CleaningData
from bilevel_lightning.models import LinearNet
from bilevel_lightning.sharding import FIRST_ORDER, check
from bilevel_lightning.tasks import HyperCleaning

FIRST = [case for case, (name, _) in CASES.items() if getattr(algorithms, name).divisible]
PAIR = {"strategy": "sharded", "devices": 2}
LEARN = dynamics.GradientDescent(0.05, learn_lr=True)


class Normalised(nn.Module):
    """Batch normalisation, tied weights, an entry without dimensions, and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.7))
        self.first.bias.requires_grad = False

    def forward(self, images):
        return self.last(self.second(self.first(self.norm(images).flatten(1)).tanh())) * self.scale


class Balls(HyperCleaning):
    """y lies in a ball, whose projection needs all of it, and has a nonsmooth term that depends on x."""

    @staticmethod
    def size(lower):
        return torch.linalg.vector_norm(torch.cat([t.reshape(-1) for t in lower.values()]))

    def nonsmooth_lower(self, upper, lower):
        return 0.01 * upper["logits"].sigmoid().mean() * self.size(lower)

    def prox_lower(self, upper, lower, step):
        shrink = (1 - step * 0.01 * upper["logits"].sigmoid().mean() / self.size(lower)).clamp(min=0)
        factor = shrink * (0.4 / (shrink * self.size(lower))).clamp(max=1)
        return {name: factor * t for name, t in lower.items()}


class Anew(HyperCleaning):
    """Each upper iteration starts from zero."""

    def initial_lower(self, upper):
        return {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in self.lower.named_parameters()}


class Wrong(RHG):
    """Says that it takes no second derivatives, and does."""

    divisible = True


def cleaning(task=HyperCleaning, model=None, name="F2SA", **settings):
    torch.manual_seed(0)
    task = task(LinearNet((1, 2, 2), 3) if model is None else model(), samples=24, l2=0.01)
    task.callbacks = list
    return (Wrong if name == "Wrong" else getattr(algorithms, name))(task=task, lower_steps=2, **settings)


VARIANTS = {
    **{name: partial(cleaning, dynamics=getattr(dynamics, name)(0.05))
       for name in ("Accelerated", "Adam", "AggregatedDescent", "HeavyBall")},
    "Anderson": partial(cleaning, dynamics=dynamics.Anderson(dynamics.GradientDescent(0.05), history=2)),
    "HigherDynamics": partial(cleaning, dynamics=dynamics.HigherDynamics(partial(torch.optim.SGD, lr=0.05))),
    "Adam differentiated": partial(cleaning, name="DARTS", dynamics=dynamics.Adam(0.05)),
    "normalised": partial(cleaning, model=Normalised),
    "normalised, cold start": partial(cleaning, model=Normalised, name="SAMA", warm_start=False),
    "projected": partial(cleaning, Balls, name="MEHA"),
    "projected, differentiated": partial(cleaning, Balls, name="DARTS"),
    "in parts, clipped": partial(cleaning, samples_at_once=4, accumulate=2, upper_clip_norm=0.01),
    "from zero": partial(cleaning, Anew, name="VPBGD"),
    "step size learnt": partial(cleaning, name="DARTS", dynamics=LEARN),
    "wrong": partial(cleaning, name="Wrong"),
}  # fmt: skip


SECOND = (
    "trainer.strategy sharded divides one y that persists among processes, for methods without second derivatives: set "
    f"it to ddp, or take {FIRST_ORDER} in place of {{}}."
)
EPISODES = (
    "trainer.strategy sharded divides one y that persists among processes, and here each of them solves y for its own "
    "episodes: set it to ddp."
)
KIND = (
    "trainer.strategy sharded does not divide what {}: set it to ddp, or dynamics to GradientDescent, its relatives or "
    "Adam without learnt settings."
)
REFUSED = {
    "Anderson": KIND.format("Anderson does"),
    "HigherDynamics": KIND.format("HigherDynamics does"),
    "step size learnt": KIND.format("GradientDescent learns"),
    "wrong": f"A divided y has no second derivatives: set trainer.strategy to ddp, or take {FIRST_ORDER}.",
}


class Validated(Patches):
    """With validations; and on the second process, from the fourth iteration on, not a number where asked for."""

    val_dataloader = CleaningData.val_dataloader

    def __init__(self, broken=False):
        super().__init__()
        self.broken = broken

    def train_dataloader(self):
        loader = super().train_dataloader()
        batch = loader.batch

        def spoilt(k):
            found = batch(k)
            if self.broken and k >= 3 and self.trainer.global_rank == 1:
                found["lower"][0][0].fill_(float("nan"))
            return found

        loader.batch = spoilt
        return loader


class Watch(Callback):
    """What a process holds of y and of what is kept beside it; validations; and the whole y at the end of training."""

    def __init__(self):
        self.losses, self.scores = [], None

    def on_train_batch_end(self, trainer, module, *args):
        held = [*tree.of(module.hooks.lower).values(), *module.states.buffers()]
        local = [t.to_local() if tree.divided(t) else t for t in held]
        self.entries = [t.numel() for t in local]
        self.bytes = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())

    def on_validation_end(self, trainer, module):
        self.losses.append(trainer.callback_metrics["val/upper_loss"])

    def on_train_end(self, trainer, module):
        if trainer.is_global_zero:  # as reports do it, which evaluate the task with its own parameters
            self.scores = module.hooks.lower(trainer.datamodule.val[0].to(module.dtype)).detach()


def run(case, **settings):
    """Five upper iterations of few lower steps on hyper-cleaning."""
    module = made(case, "cleaning")
    module.lower_steps = min(module.lower_steps, 3)
    return ended(module, Patches(), steps=5, **settings)


def worker(rank, folder):
    """One of two processes."""
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for case in FIRST:
        path = Path(folder) / f"{case}.ckpt"
        results["whole", case] = run(case, callbacks=[Save(path)], **PAIR)
        results["resumed", case] = run(case, ckpt_path=path, **PAIR)
    results["refused"] = [trained("RHG", "cleaning", **PAIR), trained("F2SA", "episodes", **PAIR)]
    for name, variant in VARIANTS.items():
        results[name] = ended(variant(), Patches(), steps=3, **PAIR)
        if "normalised" in name:  # by the samples of each process
            results[name, "ddp"] = ended(variant(), Patches(), steps=3, strategy="ddp", devices=2)
    for strategy in ("ddp", "sharded"):
        watch = Watch()
        ended(cleaning(), Validated(), callbacks=[watch], strategy=strategy, devices=2)
        results["watch", strategy] = {key: vars(watch)[key] for key in ("losses", "scores", "entries", "bytes")}
    results["broken"] = ended(cleaning(), Validated(broken=True), **PAIR)
    torch.save(results, Path(folder) / f"results {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What both processes found, and where their checkpoints lie."""
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"results {rank}.pt", weights_only=True) for rank in (0, 1)], folder


def assert_close(found, want):
    assert found["steps"] == want["steps"]
    for name, value in want["state"].items():
        scale = 1.0 + value.double().abs().max()
        assert (found["state"][name] - value).abs().max() <= 1e-10 * scale, name


def assert_equal(found, want):
    assert found["steps"] == want["steps"]
    for name, value in want["state"].items():
        assert torch.equal(found["state"][name], value), name
    for i, state in want["optimizer"].items():
        assert all(torch.equal(found["optimizer"][i][name], value) for name, value in state.items())


@pytest.mark.parametrize("case", FIRST)
def test_a_divided_y_is_the_whole_one(pair, case):
    """Two processes with a part of y each end where one does on the union of their batches; so the checkpoints say."""
    ranks, folder = pair
    assert_equal(ranks[1]["whole", case], ranks[0]["whole", case])
    assert_close(ranks[0]["whole", case], run(case))
    assert_equal(ranks[0]["resumed", case], ranks[0]["whole", case])
    assert_close(run(case, ckpt_path=folder / f"{case}.ckpt"), ranks[0]["whole", case])


@pytest.mark.parametrize("name", VARIANTS)
def test_so_is_it_with_other_settings(pair, name):
    """Dynamics, batch normalisation, tied and frozen weights, constraints, and parts of minibatches."""
    (first, second), _ = pair
    if name in REFUSED:
        assert first[name]["refused"] == second[name]["refused"] == REFUSED[name]
        return
    want = first[name, "ddp"] if "normalised" in name else ended(VARIANTS[name](), Patches(), steps=3)
    assert_close(first[name], want)
    for key in want["state"]:
        if "norm" not in key:  # running statistics are each process's own
            assert torch.equal(first[name]["state"][key], second[name]["state"][key]), key
    assert any(not torch.equal(want["state"][key], t) for key, t in VARIANTS[name]().double().state_dict().items())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", CASES)
def test_all_else_is_refused(case, problem):
    """Second derivatives, and y that are solved for each episode."""
    module = made(case, problem)
    try:
        module.configure_model()
    except BilevelError:  # for its structure, whatever the strategy
        return
    name = CASES[case][0]
    reason = SECOND.format(name) if case not in FIRST else EPISODES if problem == "episodes" else None
    if reason is None:
        check(module)
        return
    with pytest.raises(BilevelError) as error:
        check(module)
    assert str(error.value) == reason


def test_with_torch_2_4_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", ModuleType("torch.distributed.tensor"))
    with pytest.raises(BilevelError, match="needs torch 2.5 or later, and this is .*: set it to ddp"):
        check(made(FIRST[0], next(iter(PROBLEMS))))


def test_a_run_is_refused_before_it_begins(pair):
    for rank in pair[0]:
        assert [found["refused"] for found in rank["refused"]] == [SECOND.format("RHG"), EPISODES]


def test_the_list_of_methods_is_that_of_the_registry():
    first = sorted(name for name in algorithms.__all__ if getattr(algorithms, name).divisible)
    assert ", ".join(first[:-1]) + f" or {first[-1]}" == FIRST_ORDER
    with pytest.raises(BilevelError, match="in place of Linear"):
        check(nn.Linear(1, 1))


def test_each_process_holds_its_part(pair):
    """The entries of both add up to y and its twin (12 weights of 3 rows, 3 biases), and nothing else is kept alive."""
    (first, second), _ = pair
    (ddp, one), two = (first["watch", s] for s in ("ddp", "sharded")), second["watch", "sharded"]
    assert ddp["entries"] == [12, 3, 12, 3]
    assert one["entries"] == [8, 2, 8, 2]
    assert two["entries"] == [4, 1, 4, 1]
    assert [found["bytes"] for found in (ddp, one, two)] == [240, 160, 80]


def test_validations_and_reports_read_the_whole_y(pair):
    (first, second), _ = pair
    ddp, one, two = first["watch", "ddp"], first["watch", "sharded"], second["watch", "sharded"]
    assert len(ddp["losses"]) == len(one["losses"]) == 1
    torch.testing.assert_close(torch.stack(one["losses"]), torch.stack(ddp["losses"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(one["scores"], ddp["scores"], rtol=1e-10, atol=1e-12)
    assert two["scores"] is None


def test_a_broken_batch_of_one_process_ends_both(pair):
    """With the reason on the process that has it, and without either waiting for the other."""
    (first, second), _ = pair
    assert second["broken"]["refused"] == ("lower_loss is nan at upper iteration 3; look for NaN or Inf in the data.")
    assert first["broken"]["refused"].startswith("y is nan in norm at upper iteration 3: the run has diverged.")
