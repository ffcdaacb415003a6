"""What ``bilevel-fit`` makes of its arguments, and of errors."""

import itertools
import json
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb

import torch
from jsonargparse import set_parsing_settings
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningCLI

from bilevel_lightning import (
    algorithms,
    callbacks,
    datamodules,
    dynamics,
    linear_solvers,
    models,
    tasks,
)
from bilevel_lightning.errors import BilevelError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT = "hyper_cleaning/digits_trhg"
CHECKPOINT_WORDS = ("last", "best", "hpc")
PACKAGES = ("bilevel_lightning", "pytorch_lightning", "torch", "torchmetrics", "torchvision")
LOADERS = [
    f"torch.{name}"
    for name in (
        "distributed.elastic",
        "hub",
        "load",
        "multiprocessing",
        "package",
        "serialization",
        "utils.cpp_extension",
    )
]  # what runs code or files that it is given


UNKNOWN = re.compile(
    r".*class_path '(?:bilevel_lightning\.(?:\w+\.)*)?([\w.]+)': "
    r"(?:Option '(\w+)' is not accepted|unrecognized arguments: --([\w.]+))",
)
MISSPELT = re.compile(r"Expected a dot import path string: ([A-Z]\w*)\s*$", re.MULTILINE)
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
NAMED = (algorithms, callbacks, datamodules, dynamics, linear_solvers, models, tasks)
_allowed: set[str] = set()  # by earlier calls in this process


def shipped_configs() -> list[str]:
    """Returns the names of the configs that come with the package, such as ``hyper_cleaning/mnist_trhg``."""
    names = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("search/"))  # those are spaces of bilevel-search


def config_path(name: str) -> str:
    """Returns the path of a config file or of a shipped config.

    Raises:
        BilevelError: if it is neither.
    """
    shipped = CONFIGS / f"{name.removesuffix('.yaml')}.yaml"
    if Path(name).is_file():
        return name
    if shipped.is_file():
        return str(shipped)
    raise BilevelError(
        f"--config {name} is neither a file nor a shipped config; shipped are {', '.join(shipped_configs())}."
    )


def complete(args: list[str]) -> list[str]:
    """Makes the subcommand explicit, finds shipped configs and puts a checkpoint's settings before the user's."""
    command, *rest = args if args and args[0] in LightningCLI.subcommands() else ["fit", *args]
    equals = ("--config=", "-c=", "--ckpt_path=")
    tokens = [part for token in rest for part in (token.split("=", 1) if token.startswith(equals) else [token])]
    for i, option in enumerate(tokens[:-1]):
        if option in ("--config", "-c"):
            tokens[i + 1] = config_path(tokens[i + 1])
    checkpoints = [value for option, value in itertools.pairwise(tokens) if option == "--ckpt_path"]
    named = {token.partition("=")[0] for token in tokens}
    if checkpoints and checkpoints[-1] not in CHECKPOINT_WORDS:
        stored = checkpoint_settings(checkpoints[-1])
        if "--data" not in stored and not {"--config", "-c", "--data"} & named:
            raise BilevelError(
                f"--ckpt_path {checkpoints[-1]} holds no settings of the data, as checkpoints of runs from Python: add "
                "the --config of the run, or --data."
            )
        tokens = [*stored, *tokens]
    elif not {"--config", "-c", "--data"} & named:
        tokens = ["--config", config_path(DEFAULT), *tokens]
    return [command, *tokens]


def restrict(args: Sequence[str]) -> None:
    """Restricts what configs and checkpoints may import, for this process (SECURITY.md).

    That is `PACKAGES`, the packages in the environment variable ``BILEVEL_ALLOW`` (separated by commas), and those of
    the dotted names in ``args``, which a person has typed; a module of Python itself counts only in the variable. Named
    packages may lie in the working folder.
    """
    values = (token.rpartition("=")[2] for token in args)
    typed = {value.partition(".")[0] for value in values if NAME.fullmatch(value) and not Path(value).exists()}
    named = {name.strip() for name in os.environ.get("BILEVEL_ALLOW", "").split(",") if name.strip()}
    given = (typed - sys.stdlib_module_names - {"jsonargparse"}) | named
    set_parsing_settings(
        import_path_denylist=["*", *LOADERS, *sorted(_allowed - given)],
        import_path_allowlist=[*PACKAGES, *sorted(given)],
    )
    _allowed.update(given)
    if given and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where a person's own modules lie; after all others


def newest(checkpoints: Sequence[Path]) -> Path | None:
    """Returns the checkpoint that was written last, or None where there is none."""
    return max(checkpoints, key=lambda path: path.stat().st_mtime_ns, default=None)


def checkpoint_settings(path: str) -> list[str]:
    """Returns the model's and the data's settings of a checkpoint as command-line arguments.

    Raises:
        BilevelError: if there is no checkpoint at ``path``.
    """
    if not Path(path).is_file():
        raise BilevelError(
            f"--ckpt_path {path} does not exist. A run's checkpoints lie in runs/<config>/version_<n>/checkpoints."
        )
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise BilevelError(
            f"--ckpt_path {path} is not a checkpoint that loads without running code: {str(error).splitlines()[0]}"
        ) from error
    args = []
    for option, key in (("--model", "hyper_parameters"), ("--data", "datamodule_hyper_parameters")):
        settings = {k: v for k, v in checkpoint.get(key, {}).items() if k != "_instantiator"}
        if "_class_path" in settings:
            args += [option, json.dumps({"class_path": settings.pop("_class_path"), "init_args": settings})]
    return args


def _of_lightning(error: BaseException) -> bool:
    """Whether Lightning found fault with what the command line gave it, no other code being between the two."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    others = [
        not name.startswith(("pytorch_lightning.", "lightning_fabric.", "lightning_utilities.")) for name in frames
    ]
    last = max((i for i, other in enumerate(others) if other), default=-1)
    return 0 <= last < len(frames) - 1 and frames[last].startswith("bilevel_lightning.cli.")


def explain(error: BaseException) -> str | None:
    """Returns what a person should read of an error, or None where it is not theirs to mend.

    The parser wraps what a constructor raises, and reports all it tried; only the reason is kept.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, BilevelError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return str(cause)
    if not isinstance(error, ArgumentError | MisconfigurationException) and not _of_lightning(error):
        return None
    text = str(error.args[0] if isinstance(error, KeyError) else getattr(error, "message", error))
    if denied := re.search(r"Importing '(([^.']+)[^']*)' is not allowed", text):
        return (
            f"The config or checkpoint names {denied[1]}, which is neither of this package nor of Lightning or torch. "
            "If you trust it, type the name on the command line, or set the environment variable "
            f"BILEVEL_ALLOW={denied[2]}."
        )
    if (misspelt := MISSPELT.search(text)) and "Expected a <class 'float'>" not in text:
        where = ".".join(re.findall(r'Parser key "([\w.]+)"', text))
        close = get_close_matches(misspelt[1], [name for part in NAMED for name in part.__all__], 1)
        said = f"did you mean {close[0]}?" if close else "only classes of this package and torch go by name alone."
        return f"--{where} {misspelt[1]} names no class: {said} One of your own is named with its module, mine.Name."
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip() for line in text.splitlines()]
    text = " ".join(line.removeprefix("- ") for line in lines if not line.startswith(noise))
    if unknown := UNKNOWN.match(text):
        name, setting = unknown[1], unknown[2] or unknown[3]
        loop = getattr(getattr(algorithms, name, None), "lower_loop", True)
        where = ".".join(re.findall(r'Parser key "([\w.]+)"', text))
        of_loop = setting.partition(".")[0] in ("dynamics", "lower_steps")
        why = "" if loop or not of_loop else ", since it has no lower loop: it moves y by steps of lower_lr"
        return f"{name} has no setting {setting}{why}. bilevel-fit --{where}.help {name} lists its settings."
    return text
