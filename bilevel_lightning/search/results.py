"""What a search found: a table, a CSV file and pictures."""

import csv
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as plots
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bilevel_lightning.search.space import Space
from bilevel_lightning.search.study import counted, lost

SHOWN = 20  # rows on the terminal; the file has all


class Results:
    """The trials of a study, the best first, then those that were pruned and those that failed.

    Args:
        study: the study.
        space: its space.
    """

    def __init__(self, study: optuna.Study, space: Space) -> None:
        self.study, self.space = study, space
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]

        def key(trial: FrozenTrial) -> tuple[int, float, int]:
            value = sign * trial.value if trial.value is not None else 0.0
            return order.index(trial.state), value, trial.number

        self.trials = sorted(counted(study), key=key)
        self.lost = len(lost(study.get_trials(deepcopy=False)))

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each trial."""
        found = []
        for rank, trial in enumerate(self.trials, 1):
            complete, more = trial.state == TrialState.COMPLETE, trial.user_attrs
            settings = {
                name: trial.params.get(values.values if values.kind == "tied" else name, "")
                for name, values in self.space.settings.items()
            }
            ended = "its process ended" if trial.state == TrialState.FAIL else ""
            found.append(
                {
                    "rank": rank if complete else "",
                    "trial": trial.number,
                    "state": trial.state.name.lower(),
                    self.space.metric: "" if trial.value is None else trial.value,
                    **settings,
                    **{name: more.get("logged", {}).get(name, "") for name in self.space.report},
                    "iterations": more.get("iterations", ""),
                    "samples": more.get("samples", ""),
                    "seconds": more.get("seconds", ""),
                    "reason": more.get("reason", ended),
                    "folder": more.get("folder", ""),
                }
            )
        return found

    def table(self) -> Table:
        """Returns the table for the terminal, with the best trials."""
        found = Table(
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"{self.study.study_name}: {self.space.metric}, {self.space.direction}d",
        )
        rows = self.rows()
        left_out = ("rank", "iterations", "reason", "folder")
        names = [name for name in rows[0] if name not in left_out] if rows else []
        for name in names:
            short = name.split(".", 1)[-1] if name in self.space.settings else name
            width = max(len(_word(row[name])) for row in rows[:SHOWN])
            found.add_column(short, justify="left" if name == "state" else "right", overflow="fold", min_width=width)
        for row in rows[:SHOWN]:
            found.add_row(*(_word(row[name]) for name in names))
        states = [row["state"] for row in rows]
        counts = [
            f"{states.count(s)} {w}" for s, w in (("complete", "complete"), ("pruned", "pruned"), ("fail", "failed"))
        ]
        notes = [f"{len(rows)} trials: {', '.join(counts)}"]
        if len(rows) > SHOWN:
            notes.append(f"the first {SHOWN} are shown")
        if self.lost:
            notes.append(f"{self.lost} lost with their processes and done again")
        reasons = {row["reason"]: row["trial"] for row in reversed(rows) if row["state"] == "fail"}
        found.caption = Text(
            "\n".join(["; ".join(notes), *(f"trial {n}: {r}" for r, n in list(reasons.items())[::-1][:5])])
        )
        return found

    def write(self, folder: Path) -> list[str]:
        """Writes ``results.csv`` and the pictures, and returns what cannot be drawn and why."""
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "results.csv", self._csv)
        values = {trial.value for trial in self.trials if trial.state == TrialState.COMPLETE}
        if not values:
            return ["no pictures: no trial is complete"]
        name = self.space.metric
        pictures: dict[str, Callable[..., Any]] = {
            "history": plots.plot_optimization_history,
            "slices": plots.plot_slice,
        }
        if len(values) > 1:
            from optuna.importance import FanovaImportanceEvaluator  # with scikit-learn, half a second of each start

            importances = partial(plots.plot_param_importances, evaluator=FanovaImportanceEvaluator(seed=0))
            pictures["importances"] = importances
        plt.switch_backend("agg")
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental is all of it, and ranges of one value are widened
            for file, draw in pictures.items():
                _replace(folder / f"{file}.png", partial(_save, draw(self.study, target_name=name)))
        return [] if len(values) > 1 else ["no importances.png: it needs complete trials with different values"]

    def _csv(self, path: Path) -> None:
        rows = self.rows()
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0] if rows else ["rank"])
            writer.writeheader()
            writer.writerows(rows)


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) or (isinstance(value, int) and value >= 10_000) else str(value)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file in one go, since another worker may write it too."""
    part = path.with_name(f".{os.getpid()}_{path.name}")
    write(part)
    part.replace(path)


def _save(drawn: Any, path: Path) -> None:
    """Saves what Optuna drew: axes, or an array of them."""
    figure = np.ravel(drawn)[0].figure
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
