"""What the contract tests of several processes and of resuming run: all algorithms on two small problems, in float64.

A pair of processes runs all of it once, since starting a process takes longer than training a small problem.
"""

import os
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from loops import trainer
from pytorch_lightning import Callback, LightningDataModule
from torch import nn

from bilevel_lightning import BilevelError, GradientDescent, algorithms
from bilevel_lightning.datamodules import Sinusoid, SyntheticText
from bilevel_lightning.datamodules.cleaning import CleaningData
from bilevel_lightning.datamodules.images import Source
from bilevel_lightning.datamodules.iterations import Iterations
from bilevel_lightning.hypergradients.implicit import LinearSystemWarning
from bilevel_lightning.models import LinearHead, LinearNet, RegressionMLP
from bilevel_lightning.tasks import FewShot, FewShotRegression, HyperCleaning, PenaltySelection

STEPS, MIDDLE, EPOCH = 6, 3, 4  # the checkpoint is written in the middle of an epoch, and another epoch begins after it
PROBLEMS = ("cleaning", "episodes")

# Each algorithm with its defaults, and settings that keep something from one iteration to the next, or do not.
CASES = {name: (name, {}) for name in algorithms.__all__} | {
    "RHG, cold start": ("RHG", {"warm_start": False}),
    "RHG, step size learnt": ("RHG", {"dynamics": GradientDescent(0.1, learn_lr=True)}),
    "AIDCG, linear system warm": ("AIDCG", {"warm_start_linear": True}),
    "VPBGD, twin kept": ("VPBGD", {"twin": "persistent"}),
    "IAPTTGM, warm start": ("IAPTTGM", {"auxiliary": False, "warm_start": True}),
    "DARTS, first order": ("DARTS", {"order": 1}),
    "RHG, several iterations a batch": ("RHG", {"upper_iterations": 3}),
}


class Patches(CleaningData):
    """Hyper-cleaning of images of four pixels, three classes, in minibatches or as a whole."""

    image_shape, classes = (1, 2, 2), 3

    def __init__(self, whole=False):
        lower, upper = (None, None) if whole else (12, 6)
        super().__init__(
            train_samples=24, val_samples=12, test_split="train", lower_batch_size=lower, upper_batch_size=upper,
            epoch_length=EPOCH,
        )  # fmt: skip

    def source(self, train):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 60)
        images = np.clip(80 * labels[:, None, None] + rng.integers(0, 60, (60, 2, 2)), 0, 255)
        return Source(images.astype(np.uint8), torch.from_numpy(labels))

    val_dataloader = None


def episode(number):
    """Returns support and query of a classification whose size depends on its number."""
    rng = np.random.default_rng([7, number])
    centers = rng.normal(size=(2, 3))
    out = {}
    for part, shots in (("support", 2 + number % 3), ("query", 3 + number // 3 % 2)):
        labels = np.repeat([0, 1], shots)
        out[part] = (
            torch.from_numpy(centers[labels] + rng.normal(size=(len(labels), 3))).float(),
            torch.from_numpy(labels),
        )
    return out


def uneven(rank, world, k):
    """Returns upper iteration k: three episodes of different sizes, of which the first process of two gets one."""
    own = {(0, 1): range(3), (0, 2): range(1), (1, 2): range(1, 3)}[rank, world]
    drawn = [episode(3 * k + i) for i in own]
    return {part: ([e[part][0] for e in drawn], [e[part][1] for e in drawn]) for part in ("support", "query")}


class Uneven(LightningDataModule):
    def __init__(self, num_workers=0):
        super().__init__()
        self.num_workers, self.loader = num_workers, None

    def train_dataloader(self):
        batch = partial(uneven, self.trainer.global_rank, self.trainer.world_size)
        self.loader = Iterations(batch, EPOCH, self.trainer, self.num_workers)
        return self.loader

    def teardown(self, stage):
        self.loader.close()


class Save(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == MIDDLE:
            trainer.save_checkpoint(self.path)


def made(case, problem):
    """Returns the algorithm on a new task."""
    name, settings = CASES[case]
    torch.manual_seed(0)
    if problem == "cleaning":
        task = HyperCleaning(LinearNet((1, 2, 2), 3), samples=24, l2=0.01)
    else:
        task = FewShot(
            nn.Sequential(nn.Linear(3, 8), nn.Tanh()), LinearHead(8, 2), regularizer="ridge", regularization=0.1
        )
    task.callbacks = list
    scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    return getattr(algorithms, name)(task=task, upper_scheduler=scheduler, **settings)


def trained(case, problem, *, ckpt_path=None, workers=0, steps=STEPS, precision="64-true", **settings):
    """Trains; returns all that a checkpoint holds of the module, whether random numbers were drawn, or the refusal."""
    module = made(case, problem)
    data = Patches(whole=module.upper_iterations > 1) if problem == "cleaning" else Uneven(workers)
    return ended(module, data, ckpt_path=ckpt_path, steps=steps, precision=precision, **settings)


def ended(module, data, *, ckpt_path=None, steps=STEPS, precision="64-true", **settings):
    """Trains a module on data; returns what `trained` does."""
    run = trainer(steps * module.upper_iterations, precision=precision, **settings)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinearSystemWarning)  # solved badly, it is to be the same system all the same
        warnings.filterwarnings("ignore", message=r"\|g_y\| is")  # as defaults that do not suit the problem
        try:
            run.fit(module, datamodule=data, ckpt_path=ckpt_path)
        except BilevelError as error:
            return {"refused": str(error)}
    return {
        "state": module.state_dict(),
        "optimizer": module.optimizers().state_dict()["state"],
        "lr": [group["lr"] for group in module.optimizers().param_groups],
        "drawn": not torch.equal(before, torch.get_rng_state()),
        "steps": run.global_step,
    }


# What a task or data keep by episode, or deliver sparse; each: the module and the data of one of ``world`` processes.
EXTRAS = ("heads of the last batch", "heads of each task", "twins of each task", "sparse text", "sparse minibatches")


def extra(name, world, **settings):
    """Trains one of ``EXTRAS``; two processes have half a batch each."""
    torch.manual_seed(0)
    if name.startswith("sparse"):
        sizes = (None, None) if name == "sparse text" else (12, 8)
        data = SyntheticText(
            3, 24, 16, 6, vocabulary=40, words=10, lower_batch_size=sizes[0], upper_batch_size=sizes[1]
        )
        task = PenaltySelection(40, "multinomial", 3, initial=-3.0)
        module = algorithms.AIDCG(task=task, dynamics=GradientDescent(0.5), lower_steps=4, warm_start_linear=True)
    else:
        tasks = 12 if name.endswith("of each task") else None
        sizes = {"episodes_per_batch": 4 // world, "val_episodes": 2, "test_episodes": 2, "epoch_length": EPOCH}
        data = Sinusoid(shots=3, queries=4, train_episodes=tasks, **sizes)
        body = nn.Sequential(nn.Linear(1, 5), nn.Tanh())
        task = FewShotRegression(
            body, LinearHead(5, 1), start="fixed", regularizer="ridge", regularization=0.1, stored_heads=tasks or 4
        )
        algorithm = algorithms.MEHA if name == "twins of each task" else algorithms.BSGM
        module = algorithm(task=task, dynamics=GradientDescent(0.05), lower_steps=3)
    task.callbacks = list
    return ended(module, data, limit_val_batches=0, **settings)


def file(folder, case, problem):
    return Path(folder) / f"{problem} {case}.ckpt"


class Seen(Callback):
    """The first support point of each episode that reached training: it tells them apart."""

    def __init__(self):
        self.points = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.points += batch["support"][0][:, 0, 0].tolist()


def episodes_seen(**settings):
    """Returns which episodes of the shipped data module a process trains on."""
    seen, data = Seen(), Sinusoid(episodes_per_batch=settings.pop("size"), val_episodes=2, epoch_length=3, shots=2)
    task = FewShotRegression(RegressionMLP(hidden=[3]))
    task.callbacks = list
    trainer(4, callbacks=[seen], limit_val_batches=0, **settings).fit(
        algorithms.MAML(task=task, dynamics=GradientDescent(0.01)), datamodule=data
    )
    return seen.points


def worker(rank, folder):
    """One of two processes: resumes in a new process first, then trains with the other one."""
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)  # of another test: strategies of several processes would seed anew with it
    torch.multiprocessing.set_start_method("fork", force=True)  # of loader workers; else a new Python for each
    results = {}
    problem = PROBLEMS[rank]
    for case in CASES:
        if (path := file(folder, case, problem)).is_file():
            workers = 2 if problem == "episodes" else 0
            results["resumed", case, problem] = trained(case, problem, ckpt_path=path, workers=workers)
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    pair = {"strategy": "ddp", "devices": 2}
    for problem in PROBLEMS:
        for case in CASES:
            results["pair", case, problem] = trained(case, problem, **pair)
    for name in EXTRAS:
        results["pair", name] = extra(name, 2, **pair)
    results["seen"] = episodes_seen(size=2, **pair)
    torch.save(results, Path(folder) / f"results {rank}.pt")
    dist.destroy_process_group()
