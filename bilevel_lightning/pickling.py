"""Modules that can be given to new processes, although their default settings are lambdas."""

import inspect
from typing import Any, NamedTuple


class Default(NamedTuple):
    """Stands for the default of a parameter of ``owner.__init__``."""

    owner: type
    parameter: str


class Picklable:
    """A base whose attributes may be lambdas that are defaults of ``__init__``: they are pickled by where they stand.

    Lightning's ``ddp_spawn`` pickles the module for each process, and a lambda cannot be. Others than defaults still
    cannot: give ``functools.partial(torch.optim.SGD, lr=0.1)`` there.
    """

    def __getstate__(self) -> dict[str, Any]:
        places = {
            id(parameter.default): Default(owner, name)
            for owner in type(self).__mro__
            if "__init__" in vars(owner) and owner is not object
            for name, parameter in inspect.signature(vars(owner)["__init__"]).parameters.items()
            if inspect.isfunction(parameter.default)
        }
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        return {name: places.get(id(value), value) for name, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, Default):
                state[name] = inspect.signature(vars(value.owner)["__init__"]).parameters[value.parameter].default
        super().__setstate__(state)  # type: ignore[misc]
