"""The search for settings of V-PBGD, G-PBGD and BOME on hyper-cleaning, without test images (docs/hyper_cleaning.md).

    python benchmarks/cleaning.py [--only NAME ...] [--root DIR]

Each run, seed 1 of data and network, is judged by the cross-entropy, on the clean images of the upper level, of a model
trained from scratch on the learnt weights: 200 steps of SGD with step size 0.1 and momentum 0.9. All take 25 minutes of
one core.
"""

import argparse
import copy
import logging
import os
import time
import warnings
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from torch.nn.functional import cross_entropy

from bilevel_lightning import BOME, GPBGD, VPBGD, BilevelModule, GradientDescent
from bilevel_lightning.datamodules import FashionMNISTCleaning, MNISTCleaning
from bilevel_lightning.models import LinearNet, MLPNet
from bilevel_lightning.tasks import HyperCleaning


def twin(lr: float, steps: int, gamma: float | None = None, lower_lr: float | None = None) -> dict[str, Any]:
    """Returns settings of V-PBGD, or without gamma of BOME; y has the step size of the dynamics or ``lower_lr``."""
    settings = {"lower_lr": lower_lr or lr, "dynamics": GradientDescent(lr), "lower_steps": steps}
    return settings if gamma is None else {**settings, "gamma": gamma}


def gradient_norm(lower_lr: float, gamma: float) -> dict[str, Any]:
    """Returns settings of G-PBGD."""
    return {"lower_lr": lower_lr, "gamma": gamma}


G = gradient_norm
RUNS: dict[str, list[tuple[type[BilevelModule], float, int, dict[str, Any]]]] = {  # Adam's step, iterations, settings
    "fashionmnist_gpbgd": [
        *((GPBGD, 0.05, 800, G(0.1, gamma)) for gamma in (10.0, 3.0, 1.0, 0.3, 0.1)),
        *((GPBGD, 0.05, 800, G(0.3, gamma)) for gamma in (10.0, 3.0, 1.0)),
        *((GPBGD, 0.1, 800, G(*pair)) for pair in ((0.1, 1.0), (0.3, 1.0), (0.3, 3.0))),
        (GPBGD, 0.02, 800, G(0.1, 10.0)),
        *((GPBGD, 0.05, 1600, G(lr, 1.0)) for lr in (0.1, 0.03)),
    ],
    "fashionmnist_vpbgd": [(VPBGD, 0.1, 500, twin(0.1, 3, gamma)) for gamma in (1.0, 3.0)],
    "fashionmnist_bome": [(BOME, 0.1, 500, twin(0.1, 3))],
    "mnist_gpbgd": [(GPBGD, 0.05, 600, G(0.5, gamma)) for gamma in (3.0, 1.0, 0.3)],
    "mnist_mlp_gpbgd": [
        (GPBGD, 0.1, 200, G(*pair)) for pair in ((0.1, 10.0), (0.1, 3.0), (0.3, 3.0), (0.3, 1.0), (0.3, 0.3))
    ],
    "mnist_mlp_vpbgd": [(VPBGD, 0.15, 150, twin(0.3, 2, gamma)) for gamma in (1.0, 3.0)],
    "mnist_mlp_bome": [(BOME, 0.15, 150, twin(0.3, 2))],
    "fashionmnist_mlp_gpbgd": [
        (GPBGD, 0.1, 300, G(*pair)) for pair in ((0.1, 0.3), (0.1, 0.1), (0.05, 0.3), (0.05, 1.0))
    ],
    "fashionmnist_mlp_vpbgd": [(VPBGD, 0.15, 300, twin(0.2, 2, 1.0))],
    "fashionmnist_mlp_bome": [(BOME, 0.15, 300, twin(0.1, 4, lower_lr=0.05))],
}


class Cleaning(HyperCleaning):
    """The task without its report, which looks at test images."""

    def callbacks(self) -> list[Callback]:
        """Returns none."""
        return []


def judged(
    name: str, root: str | None, algorithm: type[BilevelModule], lr: float, steps: int, settings: dict[str, Any]
) -> str:
    """Returns a line about one run."""
    seed_everything(1, verbose=False)
    data = (FashionMNISTCleaning if name.startswith("fashion") else MNISTCleaning)(
        root=root, seed=1, epoch_length=steps
    )
    task = Cleaning(MLPNet(activation="relu") if "mlp" in name else LinearNet())
    model = copy.deepcopy(task.lower)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, log_every_n_steps=0, **off)
    start = time.process_time()
    trainer.fit(algorithm(task=task, upper_optimizer=partial(torch.optim.Adam, lr=lr), **settings), datamodule=data)
    taken = time.process_time() - start
    images, labels, index = data.train
    weights = task.upper(None, index).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (weights * cross_entropy(model(images), labels, reduction="none")).sum() / weights.sum()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = float(cross_entropy(model(data.val[0]), data.val[1]))
    shown = {k: vars(v)["lr"] if isinstance(v, GradientDescent) else v for k, v in settings.items()}
    return f"{name}, Adam {lr}, {steps} iterations, {shown}: {found:.4f} ({taken:.0f} s)"


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="only these configs")
    parser.add_argument("--root", default=os.environ.get("BILEVEL_DATA_DIR"), help="folder of the data")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in args.only:
        for run in RUNS[name]:
            print(judged(name, args.root, *run), flush=True)


if __name__ == "__main__":
    main()
