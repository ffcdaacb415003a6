"""Every stochastic method, with the step sizes of the benchmark, comes near the closed form of a small quadratic."""

import importlib.util
from pathlib import Path

import pytest

from bilevel_lightning import BSGM, algorithms
from bilevel_lightning.algorithms.estimated import Estimated

PATH = Path(__file__).parents[2] / "benchmarks" / "quadratic.py"
SMALL = {"lower_samples": 512, "upper_samples": 256, "lower_dim": 8, "upper_dim": 4}

GAPS = {  # samples touched, in thousands, and the bound on (F(x) - F*) / (F(x_0) - F*) then
    "BSGM": (80, 0.02),
    "StocBiO": (80, 0.015),
    "AmIGO": (80, 0.01),
    "ALSET": (160, 0.03),
    "BSA": (80, 0.03),
    "TTSA": (80, 0.07),
    "SOBA": (80, 5e-3),
    "MASOBA": (80, 5e-3),
    "FSLA": (80, 0.015),
    "SABA": (80, 2e-4),
    "SRBA": (160, 3e-3),
    "MRBO": (160, 0.05),
    "SUSTAIN": (80, 0.06),
    "VRBO": (160, 0.04),
}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("quadratic", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", GAPS)
def test_minibatches_lead_to_the_closed_form(benchmark, name):
    thousands, bound = GAPS[name]
    curve = benchmark.run(benchmark.ROWS[name], 1e3 * thousands, **SMALL)
    assert curve.last < bound


def test_all_stochastic_methods_are_among_them(benchmark):
    found = [getattr(algorithms, name) for name in algorithms.__all__]
    stochastic = {a.__name__ for a in found if issubclass(a, (BSGM, Estimated)) and a.__name__ != "BAMM"}
    assert {*benchmark.ROWS} == {*GAPS} == stochastic
