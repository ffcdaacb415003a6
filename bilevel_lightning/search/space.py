"""What a search varies, and what it looks for: a small YAML file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from optuna import Trial

from bilevel_lightning.errors import BilevelError

SPACES = Path(__file__).resolve().parent.parent / "configs" / "search"
KINDS = ("uniform", "log_uniform", "int_uniform", "int_log_uniform", "choice", "tied")
PARTS = ("config", "objective", "report", "set", "settings")


def shipped_spaces() -> list[str]:
    """Returns the names of the spaces that come with the package."""
    return sorted(path.relative_to(SPACES).with_suffix("").as_posix() for path in SPACES.rglob("*.yaml"))


@dataclass(frozen=True)
class Range:
    """The values of one setting.

    Attributes:
        kind: ``uniform``, ``log_uniform``, ``int_uniform`` and ``int_log_uniform``: between two ends, both included;
            ``choice``: one of several values; ``tied``: that of another setting.
        values: the two ends, the choices, or the name of the other setting.
    """

    kind: str
    values: Any

    @classmethod
    def read(cls, name: str, given: Any) -> "Range":
        """Reads what stands behind a setting's name, such as ``{log_uniform: [0.001, 1]}``.

        Raises:
            BilevelError: if it is no range.
        """
        if not isinstance(given, Mapping) or len(given) != 1 or next(iter(given)) not in KINDS:
            raise BilevelError(f"{name} must have one of {', '.join(KINDS)}, got {given}.")
        ((kind, values),) = given.items()
        if kind == "tied":
            return cls(kind, str(values))
        if not isinstance(values, list) or not values:
            raise BilevelError(f"{name}: {kind} needs a list, got {values}.")
        if kind == "choice":  # what is no scalar is stored and given on as JSON
            scalars = [v if v is None or isinstance(v, str | int | float) else json.dumps(v) for v in values]
            return cls(kind, tuple(scalars))
        number = int if kind.startswith("int_") else float
        try:
            low, high = (number(v) for v in values)  # YAML reads 1e-3 as a string
            whole = all(float(v) == number(v) for v in values)
        except (TypeError, ValueError):
            whole = False
        if not whole:
            raise BilevelError(f"{name}: {kind} needs two {'whole ' * (number is int)}numbers, got {values}.")
        if not (low < high and float("-inf") < low and high < float("inf")):
            raise BilevelError(f"{name}: {kind} needs a lower and then a higher finite end, got {values}.")
        if "log" in kind and low <= 0:
            raise BilevelError(f"{name}: {kind} needs positive ends, got {values}.")
        return cls(kind, (low, high))

    def suggest(self, trial: Trial, name: str) -> Any:
        """Returns the trial's value."""
        if self.kind == "choice":
            return trial.suggest_categorical(name, self.values)
        suggest = trial.suggest_int if self.kind.startswith("int_") else trial.suggest_float
        return suggest(name, *self.values, log="log" in self.kind)


@dataclass(frozen=True)
class Space:
    """A search space and its objective (docs/search.md).

    Attributes:
        name: file name without its ending.
        metric: name of the logged value that is optimised, at the end of a run.
        direction: ``minimize`` or ``maximize``.
        settings: the ranges by the settings' dotted names, as on the command line.
        config: the config that the space is for; None: to be named with ``--config``.
        fixed: values of settings that all trials share (``set`` in the file).
        report: further logged values for the table.
    """

    name: str
    metric: str
    direction: Literal["minimize", "maximize"]
    settings: Mapping[str, Range]
    config: str | None
    fixed: Mapping[str, Any]
    report: tuple[str, ...]

    @classmethod
    def load(cls, name: str) -> "Space":
        """Reads a file or a shipped space.

        Raises:
            BilevelError: if there is none of that name, or it is wrong; the message names the setting.
        """
        shipped = SPACES / f"{name.removesuffix('.yaml')}.yaml"
        path = Path(name) if Path(name).is_file() else shipped
        if not path.is_file():
            raise BilevelError(
                f"--space {name} is neither a file nor a shipped space; shipped are {', '.join(shipped_spaces())}."
            )
        try:
            return cls.read(path.stem, yaml.safe_load(path.read_text()))
        except (BilevelError, yaml.YAMLError) as error:
            raise BilevelError(f"--space {name}: {error}") from error

    @classmethod
    def read(cls, name: str, given: Any) -> "Space":
        """Reads the content of a file.

        Raises:
            BilevelError: if it is wrong.
        """
        unknown = [*given] if not isinstance(given, Mapping) else [key for key in given if key not in PARTS]
        if unknown:
            raise BilevelError(f"a space has {', '.join(PARTS)}; there is no {unknown[0]}.")
        objective = given.get("objective")
        if not isinstance(objective, Mapping) or set(objective) != {"metric", "direction"}:
            raise BilevelError("objective must have metric, such as val/accuracy, and direction.")
        metric, direction = str(objective["metric"]), objective["direction"]
        if direction not in ("minimize", "maximize"):
            raise BilevelError(f"objective.direction must be minimize or maximize, got {direction}.")
        if metric.startswith("test/") or (metric.startswith("report/") and "/val_" not in metric):
            raise BilevelError(f"objective.metric {metric} is measured on test data, on which nothing may be selected.")
        settings = {key: Range.read(key, value) for key, value in (given.get("settings") or {}).items()}
        free = [key for key, values in settings.items() if values.kind != "tied"]
        if not free:
            raise BilevelError("settings must name at least one setting and its range.")
        for key, values in settings.items():
            if values.kind == "tied" and values.values not in free:
                raise BilevelError(f"{key} is tied to {values.values}, which has no range of its own.")
        report = tuple(map(str, given.get("report") or ()))
        return cls(name, metric, direction, settings, given.get("config"), given.get("set") or {}, report)

    def describe(self) -> dict[str, Any]:
        """Returns what makes two spaces the same, as plain values."""
        ranges = {name: {values.kind: values.values} for name, values in self.settings.items()}
        return {"metric": self.metric, "direction": self.direction, "settings": ranges}

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Returns the trial's value of every setting."""
        free = {name: r.suggest(trial, name) for name, r in self.settings.items() if r.kind != "tied"}
        return {name: free[r.values if r.kind == "tied" else name] for name, r in self.settings.items()}

    def example(self) -> dict[str, Any]:
        """Returns a value of every setting: the low end, or the first choice."""
        free = {name: r.values[0] for name, r in self.settings.items() if r.kind != "tied"}
        return {name: free[r.values if r.kind == "tied" else name] for name, r in self.settings.items()}


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Returns settings as arguments of a command line."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]
