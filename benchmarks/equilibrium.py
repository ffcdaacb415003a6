"""The equilibrium model of docs/equilibrium.md: its contraction, its hypergradients, and the time of an iteration.

    python benchmarks/equilibrium.py [--checkpoint FILE] [--channels C] [--samples 600] [--rounds 21]

On the first test images of MNIST (``BILEVEL_DATA_DIR``), at the weights of a checkpoint or at the initial ones:

* the norm of the linear map of the state;
* relative distances, in float64, of hypergradients from the one of 100 steps and products: implicit with K products
  after T = K steps, and unrolled through T steps; and of the two for T = K = 20;
* CPU milliseconds of the hypergradient (T = K = 3, float32) and of the projection, medians over the rounds, in which
  they take turns. At the initial weights the projection has nothing to do, so twice the weights are projected.
"""

import argparse
import time
from statistics import median

import torch
from hypergradients import seconds

from bilevel_lightning import AIDNeumann, FixedPoint, hypergradient, tree
from bilevel_lightning.datamodules import MNISTEquilibrium
from bilevel_lightning.linear_solvers import Neumann
from bilevel_lightning.models import ConvolutionalCell, DenseCell
from bilevel_lightning.projections import ConvolutionBall
from bilevel_lightning.tasks import Equilibrium
from bilevel_lightning.tree import Params


def distance(a: Params, b: Params) -> float:
    """Returns |a - b| / |b|."""
    return float(tree.norm(tree.axpy(-1.0, b, a)) / tree.norm(b))


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint")
    parser.add_argument("--channels", type=int, default=0, help="of a convolutional cell; 0: dense")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cell = ConvolutionalCell(channels=args.channels) if args.channels else DenseCell()
    task = Equilibrium(cell)
    if args.checkpoint:
        saved = torch.load(args.checkpoint, weights_only=True, map_location="cpu")["state_dict"]
        task.upper.load_state_dict({n.removeprefix("task.upper."): t for n, t in saved.items() if "task.upper." in n})
    size = tuple(n + 1 for n in cell.state_shape[1:])
    matrix = cell.A.detach()
    norm = ConvolutionBall(1.0, size).norm(matrix) if args.channels else torch.linalg.matrix_norm(matrix, 2)
    print(f"norm of the state's linear map {float(norm):.7f}, bound {task.radius}")

    data = MNISTEquilibrium()
    data.prepare_data()
    data.setup()
    batch = data.take(data.test, torch.arange(args.samples))
    images, index = batch["lower"]
    single = {"lower": (images, index), "upper": batch["upper"]}
    double = {**single, "lower": (images.double(), index)}

    def implicit(t: int, batch: Params = double) -> Params:
        settings = {"dynamics": FixedPoint(), "lower_steps": t, "linear_solver": Neumann(t)}
        return hypergradient(task, method=AIDNeumann, batch=batch, **settings)

    def unrolled(t: int) -> Params:
        return hypergradient(task, method="RHG", batch=double, dynamics=FixedPoint(), lower_steps=t)

    task.double()
    exact = implicit(100)
    for t in (1, 3, 10, 20):
        print(f"T = K = {t}: implicit {distance(implicit(t), exact):.1e}, unrolled {distance(unrolled(t), exact):.1e}")
    print(f"implicit K = 20 against unrolled T = 20: {distance(implicit(20), unrolled(20)):.1e}")

    task.float()
    x = tree.clone(tree.of(task.upper))
    if not args.checkpoint:
        x["cell.A"] *= 2
    parts = {"hypergradient": lambda: implicit(3, single), "projection": lambda: task.project_upper(x)}
    times = [{name: 1e3 * seconds(time.process_time, part) for name, part in parts.items()} for _ in range(args.rounds)]
    print(", ".join(f"{name} {median(t[name] for t in times):.1f} ms" for name in parts))


if __name__ == "__main__":
    main()
