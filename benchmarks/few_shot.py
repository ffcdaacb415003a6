"""Few-shot learning beside its peers: MAML through a ConvNet-4, head-only adaptation, episodes side by side, loading.

    python benchmarks/few_shot.py [--case maml|head|sinusoid|loading] [--episodes 16] [--rounds 5]

Seconds are CPU seconds on one thread (wall-clock seconds on a GPU, synchronised), medians over rounds in which all rows
take turns; ratios are medians of each round's. Hypergradients of rows that should be equal are compared. Images are
random numbers in Omniglot's shape, 5 ways, 1 shot, 15 queries, except for `loading`, which reads Omniglot.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from bilevel_lightning import ANIL, IAPTTGM, MAML, BilevelModule, GradientDescent, tree
from bilevel_lightning.datamodules import Omniglot, Sinusoid
from bilevel_lightning.models import ConvNetBody, LinearHead, RegressionMLP
from bilevel_lightning.tasks import FewShot, FewShotRegression
from bilevel_lightning.tree import Params

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import higher

WAYS, QUERIES, LR = 5, 15, 0.1
Batch = dict[str, tuple[Tensor, Tensor]]
Row = Callable[[], Params]


def clock(device: torch.device) -> float:
    """Returns seconds: of the CPU's work, or of the wall once a GPU has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(rows: dict[str, Row], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Runs all rows once, then each once a round; prints how far the hypergradients are from the first row's."""
    first = next(iter(rows.values()))()
    for name, row in rows.items():
        found = row()
        if found.keys() == first.keys():
            error = float(tree.norm(tree.axpy(-1.0, first, found)) / tree.norm(first))
            print(f"  {name}: relative difference from the first row {error:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            start = clock(device)
            row()
            seconds[name].append(clock(device) - start)
    return seconds


def show(title: str, seconds: dict[str, list[float]]) -> None:
    """Prints a table of medians and ratios to the first row."""
    print(f"\n{title}\n\n| row | seconds | / {next(iter(seconds))} |\n| --- | --- | --- |")
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = median(v / f for v, f in zip(values, first, strict=True))
        print(f"| {name} | {median(values):.4f} | {ratio:.2f} |")


def data(episodes: int, device: torch.device) -> Batch:
    """Returns random episodes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(WAYS).repeat(episodes, 1)
    support = torch.rand(episodes, WAYS, 1, 28, 28, generator=generator)
    query = torch.rand(episodes, WAYS * QUERIES, 1, 28, 28, generator=generator)
    batch = {"support": (support, labels), "query": (query, labels.repeat_interleave(QUERIES, 1))}
    return {name: (x.to(device), y.to(device)) for name, (x, y) in batch.items()}


def network() -> tuple[ConvNetBody, LinearHead]:
    """Returns ConvNet-4 with 64 channels and batch normalisation by the batch at hand."""
    torch.manual_seed(0)
    body = ConvNetBody(width=64, norm="transductive", order="relu_pool_norm")
    return body, LinearHead(64, WAYS)


def ours(
    algorithm: type[BilevelModule],
    adapt: Any,
    batch: Batch,
    steps: int,
    at_once: int,
    task: FewShot | None = None,
    **settings: Any,
) -> Row:
    """Returns the mean hypergradient through this package; default task: the ConvNet-4."""
    task = task or FewShot(*network(), adapt=adapt)
    module = algorithm(
        task=task, dynamics=GradientDescent(LR), lower_steps=steps, episodes_at_once=at_once, **settings
    ).to(batch["support"][0].device)
    module.configure_model()

    def row() -> Params:
        x = tree.detach(module.upper_parameters())
        groups = module._groups(task.episodes(batch))
        found = [module._iterate(x, module._starts(x, e, n), e, n)[2].upper_grad for e, n in groups]
        return tree.mean(found, [n or 1 for _, n in groups])

    return row


class Whole(nn.Module):
    """Body and head, with the names of the task's upper variables."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network()

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits."""
        logits: Tensor = self.head(self.body(images))
        return logits


def episodes_of(batch: Batch) -> list[list[Tensor]]:
    """Returns support images, support labels, query images, query labels of each episode."""
    (xs, ys), (xq, yq) = batch["support"], batch["query"]
    return [list(parts) for parts in zip(xs, ys, xq, yq, strict=True)]


def plain_adaptation(batch: Batch, steps: int) -> Row:
    """The lower steps alone, without a graph through them, and the query's loss."""
    net = Whole().to(batch["support"][0].device)

    def row() -> Params:
        for xs, ys, xq, yq in episodes_of(batch):
            y = tree.leaf(tree.of(net))
            for _ in range(steps):
                (gradient,) = tree.grad(cross_entropy(functional_call(net, y, (xs,)), ys), y)
                y = tree.leaf(tree.axpy(-LR, gradient, y))
            cross_entropy(functional_call(net, y, (xq,)), yq)
        return {}

    return row


def autograd_loop(batch: Batch, steps: int, adapted: str = "") -> Row:
    """MAML by hand: `functional_call`, `torch.autograd.grad` with a graph; ``adapted``: prefix of what is adapted."""
    net = Whole().to(batch["support"][0].device)

    def row() -> Params:
        total = tree.zeros_like(tree.of(net))
        for xs, ys, xq, yq in episodes_of(batch):
            x = tree.leaf(tree.of(net))
            y = {name: t for name, t in x.items() if name.startswith(adapted)}
            for _ in range(steps):
                loss = cross_entropy(functional_call(net, {**x, **y}, (xs,)), ys)
                (gradient,) = tree.grad(loss, y, create_graph=True)
                y = tree.axpy(-LR, gradient, y)
            (found,) = tree.grad(cross_entropy(functional_call(net, {**x, **y}, (xq,)), yq), x)
            total = tree.axpy(1 / len(batch["support"][0]), found, total)
        return total

    return row


def truncated_loop(batch: Batch, steps: int) -> Row:
    """IAPTT-GM on the head as its released code has it: the body and the upper loss, with graphs, in every step."""
    net = Whole().to(batch["support"][0].device)

    def row() -> Params:
        total = tree.zeros_like(tree.of(net))
        for xs, ys, xq, yq in episodes_of(batch):
            x = tree.leaf(tree.of(net))
            y, losses = {name: t for name, t in x.items() if name.startswith("head.")}, []
            for _ in range(steps):
                loss = cross_entropy(functional_call(net, {**x, **y}, (xs,)), ys)
                (gradient,) = tree.grad(loss, y, create_graph=True)
                y = tree.axpy(-LR, gradient, y)
                losses.append(cross_entropy(functional_call(net, {**x, **y}, (xq,)), yq))
            (found,) = tree.grad(losses[int(torch.stack(losses).argmax())], x)
            total = tree.axpy(1 / len(batch["support"][0]), found, total)
        return total

    return row


def higher_loop(batch: Batch, steps: int) -> Row:
    """MAML with the library `higher`."""
    net = Whole().to(batch["support"][0].device)

    def row() -> Params:
        total = tree.zeros_like(tree.of(net))
        for xs, ys, xq, yq in episodes_of(batch):
            optimizer = torch.optim.SGD(net.parameters(), lr=LR)
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(steps):
                    inner.step(cross_entropy(fast(xs), ys))
                (found,) = tree.grad(cross_entropy(fast(xq), yq), tree.of(net))
            total = tree.axpy(1 / len(batch["support"][0]), found, total)
        return tree.detach(total)

    return row


def func_loop(batch: Batch, steps: int, side_by_side: bool) -> Row:
    """MAML with `torch.func`: one episode after the other, or under `vmap`."""
    net = Whole().to(batch["support"][0].device)

    def loss(y: Params, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(functional_call(net, y, (images,)), labels)

    def outer(x: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        y = x
        for _ in range(steps):
            y = tree.axpy(-LR, grad(loss)(y, xs, ys), y)
        return loss(y, xq, yq)

    def row() -> Params:
        x = tree.detach(tree.of(net))
        if side_by_side:
            parts = (*batch["support"], *batch["query"])
            return grad(lambda x: vmap(partial(outer, x))(*parts).mean())(x)  # type: ignore[no-any-return]
        return tree.mean([grad(outer)(x, *parts) for parts in episodes_of(batch)])

    return row


def maml(episodes: int, rounds: int, device: torch.device) -> None:
    """Full-network MAML for 1 and 5 lower steps."""
    batch = data(episodes, device)
    for steps in (1, 5):
        rows = {
            "autograd loop": autograd_loop(batch, steps),
            "adaptation alone": plain_adaptation(batch, steps),
            "higher": higher_loop(batch, steps),
            "torch.func loop": func_loop(batch, steps, False),
            "torch.func vmap": func_loop(batch, steps, True),
            "**MAML**": ours(MAML, "all", batch, steps, 1),
            "**MAML, recompute**": ours(MAML, "all", batch, steps, 1, memory="recompute"),
            "**MAML, side by side**": ours(MAML, "all", batch, steps, episodes),
        }
        show(f"MAML, ConvNet-4, {episodes} episodes, {steps} lower steps", measure(rows, device, rounds))


def head(episodes: int, rounds: int, device: torch.device) -> None:
    """Ten lower steps of the head alone."""
    batch = data(episodes, device)
    rows = {
        "IAPTT-GM, body in every step": truncated_loop(batch, 10),
        "**IAPTTGM**": ours(IAPTTGM, "head", batch, 10, 1),
        "**IAPTTGM, side by side**": ours(IAPTTGM, "head", batch, 10, episodes),
    }
    show(f"IAPTT-GM, head of a ConvNet-4, {episodes} episodes, 10 lower steps", measure(rows, device, rounds))
    rows = {
        "ANIL, body in every step": autograd_loop(batch, 10, adapted="head."),
        "**ANIL**": ours(ANIL, "head", batch, 10, 1),
        "**ANIL, side by side**": ours(ANIL, "head", batch, 10, episodes),
    }
    show(f"ANIL, head of a ConvNet-4, {episodes} episodes, 10 lower steps", measure(rows, device, rounds))


def sinusoid(episodes: int, rounds: int, device: torch.device) -> None:
    """MAML on the network of the sinusoids, 5 points and 10 queries, one lower step."""
    datamodule = Sinusoid(queries=10)
    datamodule.setup("fit")
    batch = {
        name: (x.to(device), y.to(device)) for name, (x, y) in datamodule.episodes["train"].batch(range(25)).items()
    }
    torch.manual_seed(0)
    network = RegressionMLP()
    rows = {
        name: ours(MAML, "all", batch, 1, at_once, task=FewShotRegression(network))
        for name, at_once in (("**MAML**, one after the other", 1), ("**MAML**, side by side", 25))
    }
    show("MAML, sinusoid, MLP 1-40-40-1, 25 episodes, 1 lower step", measure(rows, device, rounds))


def loading(episodes: int, rounds: int, device: torch.device) -> None:
    """The share of a training run that waits for data."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    datamodule = Omniglot(episodes_per_batch=episodes, queries=QUERIES)
    datamodule.setup("fit")
    seconds, waiting = [], []
    for b in range(rounds):
        start = time.perf_counter()
        raw = datamodule.episodes["train"].batch(range(b * episodes, (b + 1) * episodes))
        waiting.append(time.perf_counter() - start)
        batch = {name: (x.to(device).float() / 255, y.to(device)) for name, (x, y) in raw.items()}
        start = clock(device)
        ours(ANIL, "head", batch, 5, 1)()
        seconds.append(clock(device) - start)
    share = median(w / (w + s) for w, s in zip(waiting, seconds, strict=True))
    print(
        f"loading: {1e3 * median(waiting):.1f} ms a batch of {episodes} episodes, "
        f"{100 * share:.2f} % of an iteration of ANIL"
    )


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = {"maml": maml, "head": head, "sinusoid": sinusoid, "loading": loading}
    parser.add_argument("--case", choices=[*cases], help="default: all")
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
    for name, case in cases.items():
        if arguments.case in (None, name):
            case(arguments.episodes, arguments.rounds, torch.device(arguments.device))


if __name__ == "__main__":
    main()
