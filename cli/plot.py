"""``bilevel-plot``: compares runs, in a picture and in a table, by what they logged."""

import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from jsonargparse import ArgumentParser
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from bilevel_lightning.cli.arguments import explain
from bilevel_lightning.errors import BilevelError

Array: TypeAlias = NDArray[np.float64]

AXES = {
    "iterations": "upper iterations",
    "oracles": "oracle calls: gradients and products",
    "samples": "samples touched by oracle calls",
    "seconds": "time in seconds",
}
PANELS = {**{name: [name] for name in AXES}, "all": ["iterations", "oracles", "seconds"]}
CALLS = ("_gradients", "_products", "_maps")
HIGHER_IS_BETTER = ("accuracy", "precision", "recall", "f1", "auroc")
# Okabe and Ito's colours, told apart by the colour-blind too, without the yellow that is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P", "X", "*", "<")
WIDE = 20  # a ratio of the longest run to the shortest from which on a linear axis would hide the shortest

DESCRIPTION = (
    "Draws what runs logged against upper iterations, oracle calls and time, into one picture, and prints a table. One "
    "gradient, one product with second derivatives and one fixed-point map are an oracle call each, by the logged "
    "counts oracle/...; values of a loss are none. Time is train/seconds where it is logged, else the clock since the "
    "run opened its log."
)


class Curve(NamedTuple):
    """What one run logged: n values, and where on each axis they lie; axes that it did not log are missing."""

    values: Array
    axes: dict[str, Array]


class Run(NamedTuple):
    """One line of the picture: a run, or one run for each of several seeds."""

    label: str
    curves: list[Curve]


def folders(run: str) -> list[Path]:
    """Returns the run's folders: of a path one, of a glob one for each match.

    Raises:
        BilevelError: if there is none, or one without event files.
    """
    path = Path(run)
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor))) if not path.exists() else [path]
    paths = sorted(match for match in matches if match.is_dir())
    if not paths:
        raise BilevelError(f"{run} does not exist. A run's folder is runs/<config>/version_<n>.")
    return [_newest(path) for path in paths]


def _newest(folder: Path) -> Path:
    """Returns the folder if it holds event files, else the newest version in it that does."""
    versions = {-1: folder, **{int(p.name[8:]): p for p in folder.glob("version_*") if p.name[8:].isdigit()}}
    logged = [n for n, path in versions.items() if any(path.glob("events.out.tfevents.*"))]
    if not logged:
        raise BilevelError(f"{folder} holds neither TensorBoard's event files nor a version_<n> that does.")
    return versions[-1 if -1 in logged else max(logged)]


def load(folder: Path) -> EventAccumulator:
    """Reads all scalars of a run's event files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def tags(events: EventAccumulator) -> list[str]:
    """Returns the names of the logged scalars."""
    names: list[str] = events.Tags()["scalars"]
    return sorted(names)


def choose(runs: Sequence[EventAccumulator]) -> str:
    """Returns what to compare: ``train/error_x`` where all runs know their solution, else ``train/upper_loss``."""
    return "train/error_x" if all("train/error_x" in tags(events) for events in runs) else "train/upper_loss"


def read(events: EventAccumulator, y: str) -> Curve:
    """Returns the values of ``y``, at the counts that were logged last before or with each.

    Raises:
        BilevelError: if the run did not log ``y``; the message lists what it logged.
    """
    if y not in tags(events):
        raise BilevelError(f"--y {y} is not logged in {events.path}; it has {', '.join(tags(events))}.")
    logged = {event.step: event for event in events.Scalars(y)}
    steps = np.array(sorted(logged))

    def at(tag: str) -> Array:
        counts = {event.step: event.value for event in events.Scalars(tag)}
        known = np.array(sorted(counts))
        return np.array([0.0, *(counts[k] for k in known)])[np.searchsorted(known, steps, side="right")]

    settings = Path(events.path) / "hparams.yaml"
    found = re.search(r"^upper_iterations: (\d+)$", settings.read_text(), re.MULTILINE) if settings.is_file() else None
    axes = {"iterations": (steps + 1.0) * (int(found[1]) if found else 1)}  # Lightning numbers batches from 0
    oracles = [tag for tag in tags(events) if tag.startswith("oracle/") and tag.endswith(CALLS)]
    if oracles:
        axes["oracles"] = np.sum([at(tag) for tag in oracles], axis=0)
    if "oracle/samples" in tags(events):
        axes["samples"] = at("oracle/samples")
    if "train/seconds" in tags(events):
        axes["seconds"] = at("train/seconds")
    else:
        axes["seconds"] = np.array([logged[k].wall_time for k in steps]) - events.FirstEventTimestamp()
    return Curve(np.array([logged[k].value for k in steps]), axes)


def mean(run: Run, axis: str) -> tuple[Array, Array, Array, Array]:
    """Returns position, mean, minimum and maximum over the seeds, at the iterations that all of them logged.

    Raises:
        BilevelError: if a seed has no such axis, or no iteration is common to all.
    """
    if any(axis not in curve.axes for curve in run.curves):
        raise BilevelError(f"--x {axis} is not logged by {run.label}; --x iterations and --x seconds always are.")
    common = reduce(np.intersect1d, [curve.axes["iterations"] for curve in run.curves])
    if not len(common):
        raise BilevelError(f"The seeds of {run.label} have logged no iteration in common: give them one by one.")
    rows = [np.isin(curve.axes["iterations"], common) for curve in run.curves]
    x = np.mean([curve.axes[axis][row] for curve, row in zip(run.curves, rows, strict=True)], axis=0)
    values = np.stack([curve.values[row] for curve, row in zip(run.curves, rows, strict=True)])
    with np.errstate(invalid="ignore"):  # inf - inf
        return x, values.mean(0), values.min(0), values.max(0)


def draw(runs: Sequence[Run], y: str, panels: Sequence[str], log: bool | None = None) -> Figure:
    """Draws one panel for each axis, with the range of several seeds as a band.

    Args:
        runs: the lines.
        y: name of the values.
        panels: keys of `AXES`.
        log: logarithmic values; None: if none is negative nor all are zero, and none an accuracy. Zeros leave gaps.
    """
    curves = [mean(run, panels[0]) for run in runs]
    finite = np.concatenate([part[np.isfinite(middle)] for _, middle, low, _ in curves for part in (low, middle)])
    if log and not (finite > 0).any():
        raise BilevelError(f"--log: {y} is nowhere positive.")
    if log is None:
        log = not _higher_is_better(y) and bool((finite > 0).any()) and bool((finite >= 0).all())
    figure = Figure(figsize=(4 * len(panels) if len(panels) > 1 else 6, 4.4), dpi=150, layout="constrained")
    handles: list[Line2D] = []
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        handles, ends = [], []
        for i, run in enumerate(runs):
            x, middle, low, high = mean(run, panel)
            colour, every = COLOURS[i % len(COLOURS)], max(len(x) // 8, 1)
            style = {"color": colour, "ls": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]}
            (line,) = axes.plot(x, middle, lw=1.8, ms=5, markevery=(i * every // len(runs), every), **style)
            shown = np.flatnonzero(np.isfinite(middle))
            if len(run.curves) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            if len(shown) < len(x):
                axes.plot(x[shown[-1:]], middle[shown[-1:]], "x", color=colour, ms=11, mew=2.5)
            handles.append(line)
            ends.append(x[-1])
        axes.set_xlabel(AXES[panel])
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        if min(ends) > 0 and max(ends) > WIDE * min(ends):
            axes.set_xscale("log")
        if log:
            axes.set_yscale("log", nonpositive="mask")
            if finite.max() < 30 * finite[finite > 0].min():
                axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    figure.axes[0].set_ylabel(y)
    names = [_name(run) for run in runs]
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(runs), 3), frameon=False)
    return figure


def _diverged(run: Run) -> list[float]:
    """Returns the first iteration at which the value is not finite, of each seed that has one."""
    broken = [(curve.axes["iterations"], ~np.isfinite(curve.values)) for curve in run.curves]
    return [float(iterations[where][0]) for iterations, where in broken if where.any()]


def _name(run: Run) -> str:
    seeds = f", {len(run.curves)} seeds" if len(run.curves) > 1 else ""
    return f"{run.label}{seeds}{' (diverged)' if _diverged(run) else ''}"


def _note(run: Run) -> str:
    first = _diverged(run)
    seeds = f" ({len(first)} of {len(run.curves)} seeds)" if len(run.curves) > 1 else ""
    return f"{run.label}: not finite from iteration {min(first):,.0f}{seeds}"


def _higher_is_better(y: str) -> bool:
    return y.rsplit("/", 1)[-1] in HIGHER_IS_BETTER


def table(runs: Sequence[Run], y: str) -> Table:
    """Returns the table: one row a run, with the mean and the range of several seeds."""
    highest = _higher_is_better(y)
    found = Table(title=y)
    found.add_column("run", overflow="fold")
    for name in ("last", "highest" if highest else "lowest", "iterations", "oracle calls", "seconds"):
        found.add_column(name, justify="right")
    for run in runs:
        ends = [(c.values[-1], c.values[np.isfinite(c.values)], c.axes) for c in run.curves]
        best = [(f.max() if highest else f.min()) if len(f) else np.nan for _, f, _ in ends]
        counts = [[axes[name][-1] for _, _, axes in ends if name in axes] for name in PANELS["all"]]
        found.add_row(
            Text(run.label if len(ends) == 1 else f"{run.label}\n{len(ends)} seeds: mean, range"),
            _words([last for last, _, _ in ends], "{:.3g}"),
            _words(best, "{:.3g}"),
            *(_words(values, form) for values, form in zip(counts, ("{:,.0f}", "{:,.0f}", "{:,.2f}"), strict=True)),
        )
    found.caption = Text("\n".join(_note(run) for run in runs if _diverged(run)))
    return found


def _words(numbers: Sequence[float], form: str) -> str:
    """Returns one number, or the mean and the range of several."""
    words = [form.format(n) for n in numbers]
    if len(set(words)) < 2:
        return words[0] if words else "-"
    return "{}\n{} to {}".format(*(form.format(f(numbers)) for f in (np.mean, np.min, np.max)))


def labels(runs: Sequence[str], found: Sequence[Sequence[Path]], given: Sequence[str] | None) -> list[str]:
    """Returns the given labels, or the names of the configs, or where these are equal the runs as they were given.

    Raises:
        BilevelError: if not one label is given for each run.
    """
    if given is not None:
        if len(given) != len(runs):
            raise BilevelError(f"--labels has {len(given)} labels for {len(runs)} runs; a glob in quotes is one run.")
        return list(given)
    names = [paths[0].parent.name if paths[0].name.startswith("version_") else paths[0].name for paths in found]
    return names if len(set(names)) == len(names) else list(runs)


def arguments() -> ArgumentParser:
    """Returns the parser of ``bilevel-plot``."""
    parser = ArgumentParser(
        prog="bilevel-plot",
        usage="bilevel-plot RUN [RUN ...] [options]",
        description=DESCRIPTION,
        exit_on_error=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, runs/<config>/version_<n>; or runs/<config>, for its newest version; or a glob in "
        "quotes, 'runs/<config>/version_*', for seeds of one config: drawn are their mean and, as a band, their "
        "minimum and maximum, at the iterations that all of them logged",
    )
    parser.add_argument(
        "--y", help="the logged value; default: train/error_x if all runs have it, else train/upper_loss"
    )
    parser.add_argument("--x", choices=[*PANELS], default="all", help="all: iterations, oracles and seconds")
    parser.add_argument("--output", metavar="FILE", default="comparison.png", help="the picture: .png, .pdf or .svg")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="one for each run; default: the configs' names")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--log", action="store_true", help="logarithmic values; the default where none is negative, but for accuracies"
    )
    scale.add_argument("--linear", action="store_true", help="linear values")
    return parser


def plot(args: list[str] | None = None) -> None:
    """Runs ``bilevel-plot``; ends the process with status 2 and one message where a person has to mend something.

    Args:
        args: arguments; None: those of the process.
    """
    try:
        given = arguments().parse_args(args)
        output = Path(given.output)
        if output.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
            raise BilevelError(f"--output {output} must end in .png, .pdf or .svg.")
        found = [folders(run) for run in given.runs]
        names = labels(given.runs, found, given.labels)
        events = [[load(folder) for folder in paths] for paths in found]
        y = given.y or choose([seed for seeds in events for seed in seeds])
        runs = [Run(name, [read(e, y) for e in seeds]) for name, seeds in zip(names, events, strict=True)]
        figure = draw(runs, y, PANELS[given.x], True if given.log else False if given.linear else None)
        try:
            figure.savefig(output)
        except OSError as error:
            raise BilevelError(f"Cannot write --output {output}: {error.strerror}.") from error
    except (BilevelError, ArgumentError) as error:
        print(f"bilevel-plot: error: {explain(error)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    console = Console(highlight=False)
    console.print(table(runs, y))
    console.print(f"Picture: {output}", markup=False, soft_wrap=True)
