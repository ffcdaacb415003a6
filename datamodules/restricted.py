"""Pickles of arrays, dictionaries, lists, strings and numbers, read without running any code that a pickle names."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from bilevel_lightning.errors import BilevelError


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes the bytes of an array; the codec is not the pickle's to choose."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_ARRAY = np.zeros(1)
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}
for _package in ("numpy.core", "numpy._core"):  # before and after numpy 2
    _ALLOWED[_package + ".multiarray", "_reconstruct"] = _ARRAY.__reduce__()[0]  # type: ignore[assignment]
    _ALLOWED[_package + ".multiarray", "scalar"] = _ARRAY[0].__reduce__()[0]
    _ALLOWED[_package + ".numeric", "_frombuffer"] = _ARRAY.__reduce_ex__(5)[0]  # type: ignore[assignment]


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not an array, dict, list, str or number")
        return _ALLOWED[module, name]


def load(path: Path) -> Any:
    """Returns what a pickle of arrays and builtin containers holds, also one written by Python 2.

    Raises:
        BilevelError: if it names anything else, which is then not called, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError,
            MemoryError) as error:  # fmt: skip
        raise BilevelError(
            f"{path} was not read: {error}. Fetch it again from a source that you trust, or write what it holds with "
            "numpy arrays, dicts, lists, strings and numbers only."
        ) from error
