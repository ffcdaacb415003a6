"""What a check found: the numbers, and what they mean."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from rich.table import Table

TOLERANCE = 0.1  # relative error up to which a hypergradient is trusted
RIGHT_WAY = 0.9  # cosine from which on it at least points the right way
SETTLED = 0.01  # change of the reference over a doubling of its steps that ends the doubling
AGREES = 0.01  # deviation from finite differences that a derivative may have
PRODUCTS = 500  # most steps of the linear solver that are tried


class Report(NamedTuple):
    """What `check` found. Errors are relative; the reference is the derivative through ``reference_steps`` lower steps.

    Attributes:
        method: name of the algorithm.
        steps: T.
        kept: K: differentiated steps, or steps of the linear solver; None: it has no such setting.
        error: of the hypergradient from the reference, without learnt settings of the dynamics.
        cosine: of the angle between the two.
        stopped_error: of the hypergradient from the derivative of f(x, y_T(x)) through all T steps.
        unrolled_error: of that derivative from the reference.
        solved_error: of an implicit method's hypergradient at the reference's y; None for other methods.
        differences: deviation of the hypergradient from finite differences of f(x, y_T(x)).
        derivative: that of the derivative through all T steps; if it is not small, autograd does not see all of a loss.
        reference_steps: lower steps of the reference.
        change: of its part that comes through y, over the last doubling of its steps: how far it is from settled.
        stationarity: ``|g_y|``, or the norm of the gradient mapping, at y_0, y_T and the reference's y.
        residual: of the linear system, relative; None for other methods.
        suggested_steps: T from which on the error is within the tolerance; None: none found.
        suggested_kept: K from which on it is, with that T or, where there is none, as the derivative of f(x, y_T(x));
            of linear solvers, at the reference's y.
        stops: whether f(x, y_T(x)) is what the run descends: no warm start, or y_0 depends on x.
        remarks: warnings that the algorithm gave.
    """

    method: str
    steps: int
    kept: int | None
    error: float
    cosine: float
    stopped_error: float
    unrolled_error: float
    solved_error: float | None
    differences: float
    derivative: float
    reference_steps: int
    change: float
    stationarity: tuple[float, float, float]
    residual: float | None
    suggested_steps: int | None
    suggested_kept: int | None
    stops: bool
    remarks: tuple[str, ...]

    @property
    def finite(self) -> bool:
        """Whether neither the hypergradient nor the reference has diverged."""
        return math.isfinite(self.error + self.stopped_error + self.derivative + self.change)

    @property
    def trusted(self) -> bool:
        """Whether the derivatives are right, and error and remaining change of the reference within the tolerance."""
        return self.finite and self.derivative <= AGREES and self.error + self.change <= TOLERANCE

    def words(self) -> list[str]:
        """Returns the verdict, the reasons with what to change, and the algorithm's warnings."""
        if not self.finite:
            verdict = "cannot be trusted: it or the reference is not finite. Lower dynamics.lr."
        elif self.derivative > AGREES:
            verdict = "cannot be trusted: autograd and finite differences of your losses disagree."
        else:
            verdict = "can be trusted: it is" if self.trusted else "cannot be trusted: it is"
            if not self.trusted and self.change > SETTLED and self.error - self.change <= TOLERANCE:
                verdict = "cannot be judged, since the reference has not settled: it is"
            elif not self.trusted and self.cosine >= RIGHT_WAY:
                verdict = "points the right way, but is"
            verdict += f" {self.error:.1%} off that of {self.reference_steps} lower steps, cosine {self.cosine:.3f}."
        return [f"The hypergradient {verdict}", *(self._reasons() if self.finite else []), *self.remarks]

    def _reasons(self) -> Iterator[str]:
        """What to do where everything is finite."""
        steps, least, kept = self.steps, self.suggested_steps, self.suggested_kept
        implicit = self.solved_error is not None
        first, last, rest = self.stationarity
        would = f"no T below {self.reference_steps} would do"
        if least is not None:
            would = f"T = {least}{f' with K = {kept}' if kept and (implicit or kept < least) else ''} would do"
        if self.derivative > AGREES:
            yield (
                f"The derivative through all steps is {self.derivative:.1%} off. Look in the losses for detach(), "
                "item(), .data, no_grad, rounding and argmax, and for a y_0(x) without persistent_lower = False. "
                "Kinks, and Adam where g_y is nearly zero, do it too."
            )
            return
        if self.trusted:
            if least is not None and least < steps:
                yield f"{would} as well."
            return
        if self.stopped_error <= TOLERANCE:
            so = "This is what the run descends." if self.stops else "With warm_start, later iterations go on from y_T."
            yield (
                f"As the gradient of f(x, y_T(x)), of a lower level that stops after T = {steps} steps, it can be "
                f"trusted: it is {self.stopped_error:.1%} off. {so}"
            )
        if self.change > SETTLED:
            yield (
                f"The reference still changed by {self.change:.1%} over the last doubling of its steps: the lower "
                "level converges slowly, or not at all. A regulariser, momentum or a larger dynamics.lr would help."
            )
        if self.solved_error is not None and self.solved_error > TOLERANCE:
            remedy = f"raise linear_solver.steps; K = {kept} would do" if kept else f"no K up to {PRODUCTS} would do"
            yield f"With the reference's y it is {self.solved_error:.1%} off, by the linear system alone: {remedy}."
        if (least is None or least > steps) if implicit else self.unrolled_error > TOLERANCE:
            diverges = last >= first and rest >= first  # |g_y| may rise on the way where g is not convex
            remedy = "this diverges; lower dynamics.lr" if diverges else f"raise lower_steps; {would}"
            yield f"T = {steps} steps take |g_y| from {first:.2g} to {last:.2g} (reference: {rest:.2g}): {remedy}."
        if not implicit and self.stopped_error > TOLERANCE:
            if least in (None, steps):
                would = f"K = {kept} would do" + " for this" * (least is None)
            remedy = "it is an approximation of it, RHG is not" if self.kept is None else f"raise truncation; {would}"
            yield f"{self.method} is {self.stopped_error:.1%} off the derivative through all {steps} steps: {remedy}."

    def table(self) -> Table:
        """Returns the numbers, for `rich`."""
        rows = {
            "relative error": self.error,
            "  if all T steps were differentiated": self.unrolled_error,
            "  if y were solved: of the linear system": self.solved_error,
            "cosine": self.cosine,
            "relative error for f(x, y_T(x))": self.stopped_error,
            "  by finite differences": self.differences,
            "  of autograd itself, by finite differences": self.derivative,
            "lower stationarity at y_0": self.stationarity[0],
            "  at y_T": self.stationarity[1],
            "  at the reference's y": self.stationarity[2],
            "residual of the linear system": self.residual,
            "lower steps of the reference": self.reference_steps,
            "  change over their last doubling": self.change,
            "T": self.steps,
            "  suggested T": self.suggested_steps,
            "K": self.kept,
            "  suggested K" + " for f(x, y_T(x))" * (self.suggested_steps is None): self.suggested_kept,
        }
        table = Table("hypergradient of", self.method)
        for name, value in rows.items():
            if value is not None:
                table.add_row(name, f"{value:.2g}" if isinstance(value, float) else str(value))
        return table
