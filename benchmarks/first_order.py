"""Seconds of one upper iteration of V-PBGD and G-PBGD on linear data hyper-cleaning, beside a loop written by hand."""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bilevel_lightning import GPBGD, VPBGD, BilevelModule, GradientDescent, tree
from bilevel_lightning.binding import bind
from bilevel_lightning.models import LinearNet
from bilevel_lightning.tasks import HyperCleaning

SAMPLES, TARGET_SECONDS, TARGET_RATIO = 5000, 0.035, 1.15
UPPER_LR, LOWER_LR, TWIN_LR, GAMMA = 0.1, 0.1, 0.01, 0.5


class ByHand:
    """The two methods in plain autograd, with the steps of the released code: SGD on x and y, a persistent twin."""

    def __init__(self, model: nn.Linear, batch: dict[str, tuple[Tensor, ...]]) -> None:
        self.x = torch.zeros(SAMPLES, requires_grad=True)
        self.y = [p.detach().clone().requires_grad_() for p in model.parameters()]
        self.twin = [p.detach().clone().requires_grad_() for p in model.parameters()]
        (self.images, self.labels, _), (self.val_images, self.val_labels) = batch["lower"], batch["upper"]
        self.images, self.val_images = self.images.flatten(1), self.val_images.flatten(1)

    def lower(self, x: Tensor, y: list[Tensor]) -> Tensor:
        """Returns g."""
        losses = cross_entropy(nn.functional.linear(self.images, *y), self.labels, reduction="none")
        return (torch.sigmoid(x) * losses).mean()

    def upper(self, y: list[Tensor]) -> Tensor:
        """Returns f."""
        return cross_entropy(nn.functional.linear(self.val_images, *y), self.val_labels)

    def descend(self, loss: Tensor) -> None:
        """Steps x and y."""
        gradients = torch.autograd.grad(loss, [self.x, *self.y])
        with torch.no_grad():
            for t, g, lr in zip([self.x, *self.y], gradients, [UPPER_LR, LOWER_LR, LOWER_LR], strict=True):
                t.sub_(g, alpha=lr)

    def vpbgd(self) -> None:
        """One iteration of V-PBGD."""
        gradients = torch.autograd.grad(self.lower(self.x.detach(), self.twin), self.twin)
        with torch.no_grad():
            for t, g in zip(self.twin, gradients, strict=True):
                t.sub_(g, alpha=TWIN_LR)
        gap = self.lower(self.x, self.y) - self.lower(self.x, [t.detach() for t in self.twin])
        self.descend(self.upper(self.y) + GAMMA * gap)

    def gpbgd(self) -> None:
        """One iteration of G-PBGD."""
        gradients = torch.autograd.grad(self.lower(self.x, self.y), self.y, create_graph=True)
        self.descend(self.upper(self.y) + 0.5 * GAMMA * torch.stack([g.square().sum() for g in gradients]).sum())


class Ours:
    """The same with the library's `bilevel_step`, and plain steps of x, without a trainer."""

    def __init__(self, task: HyperCleaning, batch: dict[str, tuple[Tensor, ...]], module: BilevelModule) -> None:
        self.task, self.batch, self.module = task, batch, module
        self.y = tree.detach(tree.of(task.lower))
        module.task = task
        module.configure_model()

    def iteration(self) -> None:
        """One upper iteration."""
        problem, x, _ = bind(self.task, self.batch, tree.detach(tree.of(self.task.upper)))
        step = self.module.bilevel_step(problem, x, self.y)
        tree.assign(self.task.upper, tree.axpy(-UPPER_LR, step.upper_grad, x))
        self.y = step.lower
        for name, values in step.state.items():
            self.module.states[name].set(values)


def seconds(function: Callable[[], None], iterations: int) -> float:
    """Returns the processor time of one iteration, the mean of several."""
    start = time.process_time()
    for _ in range(iterations):
        function()
    return (time.process_time() - start) / iterations


def main() -> None:
    """Runs the benchmark: rounds that alternate between the two, and the median of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each pair (default 9)")
    parser.add_argument("--iterations", type=int, default=20, help="upper iterations a round (default 20)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = 0.3 * torch.rand(2, SAMPLES, 1, 28, 28), torch.randint(10, (2, SAMPLES))
    batch = {"lower": (images[0], labels[0], torch.arange(SAMPLES)), "upper": (images[1], labels[1])}
    twin = {"twin": "persistent", "dynamics": GradientDescent(TWIN_LR), "lower_steps": 1}
    modules = {
        "vpbgd": VPBGD(lower_lr=LOWER_LR, gamma=GAMMA, **twin),
        "gpbgd": GPBGD(lower_lr=LOWER_LR, gamma=GAMMA),
    }
    for name, module in modules.items():
        task = HyperCleaning(LinearNet(), SAMPLES)
        hand, ours = ByHand(task.lower[1], batch), Ours(task, batch, module)
        for function in (ours.iteration, getattr(hand, name)):
            seconds(function, 3)
        difference = max(float((a - b).norm()) for a, b in zip(ours.y.values(), hand.y, strict=True))
        if difference > 1e-4:
            raise RuntimeError(f"{name}: the two y differ by {difference:.1e} after three iterations.")
        pairs = [
            (seconds(ours.iteration, args.iterations), seconds(getattr(hand, name), args.iterations))
            for _ in range(args.rounds)
        ]
        taken, by_hand, ratio = (
            median(a for a, _ in pairs),
            median(b for _, b in pairs),
            median(a / b for a, b in pairs),
        )
        print(
            f"{name}: {taken:.4f} s an upper iteration (target <= {TARGET_SECONDS}), by hand {by_hand:.4f} s, "
            f"ratio {ratio:.2f} (target <= {TARGET_RATIO})"
        )


if __name__ == "__main__":
    main()
