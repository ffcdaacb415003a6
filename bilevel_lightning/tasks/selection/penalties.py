"""Penalties of linear models, learnt such that the fit predicts held-out data."""

from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from typing_extensions import override

from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.sparse import Inputs, matmul
from bilevel_lightning.task import BilevelTask


class LinearModel(nn.Module):
    """Scores ``inputs weight`` without bias, zero at the beginning.

    Args:
        features: entries of a sample.
        outputs: scores of a sample.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features, outputs))

    @override
    def forward(self, inputs: Inputs) -> Tensor:
        """Returns the scores of ``inputs``, dense or `Sparse`, shape ``(samples, outputs)``."""
        return matmul(inputs, self.weight)


class PenaltySelection(BilevelTask):
    r"""Quadratic penalties of a linear model, learnt on validation data.

    Upper: f(y) = mean over the validation samples of l(a^T y, b).
    Lower: g(x, y) = mean over the training samples of l(a^T y, b) + 1/2 sum_ij exp(x_ij) y_ij^2,

    where x_ij is x_i with a penalty for each feature, x_j with one for each output (class), or x with a single one. a
    is a sample, dense or `Sparse`, b its label. The losses l, of the scores s = a^T y:

    - ``logistic``: log(1 + exp(s)) - b s, with b in {0, 1}; one output.
    - ``multinomial``: log sum_j exp(s_j) - s_b, with b in {0, ..., outputs - 1}.
    - ``squared``: (s - b)^2 / 2, summed over the outputs.

    y has shape ``(features, outputs)`` and starts at zero. Since exp(x) > 0 the lower level is strongly convex.
    Batches are ``(inputs, labels)`` at both levels. The metrics are ``accuracy`` (not of ``squared``) and, with
    ``report_solution``, ``value``, f(y*(x)), and ``lower_distance``, |y - y*(x)|, where y*(x) is found by L-BFGS: for
    reporting only.

    Args:
        features: entries of a sample.
        loss: see above. Default ``logistic``.
        outputs: scores of a sample: the classes of ``multinomial``, 1 for ``logistic``. Default 1.
        penalty: ``per_feature`` (default), ``per_class`` (one for each output), or ``single``.
        initial: x at the beginning, the logarithm of the penalty. Default 0.
        report_solution: solve the lower level at each validation and test. Default False.

    Raises:
        BilevelError: if a setting is impossible, or features, classes or labels of the data do not fit the task.

    References:
        R. Grazzi, L. Franceschi, M. Pontil, S. Salzo. On the Iteration Complexity of Hypergradient Computation. ICML
        2020 (per feature). M. Dagreou, P. Ablin, S. Vaiter, T. Moreau. A Framework for Bilevel Optimization That
        Enables Stochastic and Global Variance Reduction Algorithms. NeurIPS 2022 (per feature and per class).
    """

    def __init__(
        self,
        features: int,
        loss: Literal["logistic", "multinomial", "squared"] = "logistic",
        outputs: int = 1,
        penalty: Literal["per_feature", "per_class", "single"] = "per_feature",
        initial: float = 0.0,
        report_solution: bool = False,
    ) -> None:
        super().__init__()
        positive("PenaltySelection.features", features)
        positive("PenaltySelection.outputs", outputs)
        if loss not in ("logistic", "multinomial", "squared"):
            raise BilevelError(f"PenaltySelection.loss must be logistic, multinomial or squared, got {loss!r}.")
        if (loss == "logistic" and outputs != 1) or (loss == "multinomial" and outputs < 2):
            raise BilevelError(
                f"PenaltySelection.outputs must be 1 for logistic and the number of classes for multinomial, got "
                f"{outputs} for {loss}."
            )
        shapes = {"per_feature": (features, 1), "per_class": (1, outputs), "single": (1, 1)}
        if penalty not in shapes:
            raise BilevelError(f"PenaltySelection.penalty must be one of {', '.join(shapes)}, got {penalty!r}.")
        self.loss, self.report_solution = loss, report_solution
        self.upper: nn.ParameterDict = nn.ParameterDict({"log_penalty": torch.full(shapes[penalty], float(initial))})
        self.lower: LinearModel = LinearModel(features, outputs)

    @override
    def upper_loss(self, batch: tuple[Inputs, Tensor]) -> Tensor:
        return self._mean_loss(self.lower.weight, *batch)

    @override
    def lower_loss(self, batch: tuple[Inputs, Tensor]) -> Tensor:
        return self._penalised(self.lower.weight, *batch)

    def _mean_loss(self, y: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        scores = matmul(inputs, y)
        if self.loss == "multinomial":
            return cross_entropy(scores, labels)
        if self.loss == "logistic":
            return binary_cross_entropy_with_logits(scores.squeeze(1), labels.to(scores))
        residuals: Tensor = scores - labels.to(scores).view_as(scores)
        return 0.5 * residuals.square().sum(1).mean()

    def _penalised(self, y: Tensor, inputs: Inputs, labels: Tensor) -> Tensor:
        penalty: Tensor = 0.5 * (self.upper["log_penalty"].exp() * y.square()).sum()
        return self._mean_loss(y, inputs, labels) + penalty

    @override
    def metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs, labels = batch["upper"]
        found = {} if self.loss == "squared" else {"accuracy": (self._labels(inputs) == labels).float().mean()}
        if self.report_solution:
            solution = self.lower_solution(batch["lower"])
            found["value"] = self._mean_loss(solution, inputs, labels)
            found["lower_distance"] = torch.linalg.vector_norm(self.lower.weight - solution)
        return found

    def lower_solution(self, batch: tuple[Inputs, Tensor], steps: int = 1000) -> Tensor:
        """Returns y*(x) for the current x and the lower level's samples, by L-BFGS from the current y.

        Args:
            batch: the samples.
            steps: most iterations. They end before that where no entry of g_y exceeds 1e-10, in single precision 1e-6.
        """
        y = self.lower.weight.detach().clone().requires_grad_()
        tolerance = 1e-10 if y.dtype == torch.float64 else 1e-6
        solver = torch.optim.LBFGS(
            [y],
            max_iter=steps,
            max_eval=2 * steps,
            tolerance_grad=tolerance,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def evaluate() -> Tensor:
            with torch.enable_grad():
                value = self._penalised(y, *batch)
                (y.grad,) = torch.autograd.grad(value, y)
            return value.detach()

        solver.step(evaluate)  # type: ignore[no-untyped-call]
        return y.detach()

    @override
    def predict(self, batch: tuple[Inputs, Tensor]) -> dict[str, Tensor]:
        """Returns for each sample its number, its label, and what y predicts."""
        inputs, labels = batch
        return {
            "index": torch.arange(len(labels), device=labels.device),
            "label": labels,
            "predicted": self._labels(inputs),
        }

    def _labels(self, inputs: Inputs) -> Tensor:
        scores = matmul(inputs, self.lower.weight)
        if self.loss == "multinomial":
            return scores.argmax(1)
        return (scores.squeeze(1) > 0).long() if self.loss == "logistic" else scores.squeeze(1)

    @override
    def check_data(self, datamodule: LightningDataModule) -> None:
        data: Any = datamodule
        features, outputs = self.lower.weight.shape
        if data.features != features:
            raise BilevelError(f"The data have {data.features} features: set task.features to that, not to {features}.")
        if self.loss == "squared":
            if data.classes is not None:
                raise BilevelError("Loss squared needs numbers as labels: set data.regression to true.")
        elif data.classes is None:
            raise BilevelError(f"Loss {self.loss} needs classes as labels: set data.regression to false.")
        elif data.classes != max(outputs, 2):
            raise BilevelError(
                f"The data have {data.classes} classes, and the task has loss {self.loss} and {outputs} outputs: set "
                "task.loss to logistic for two classes, else to multinomial with task.outputs their number."
            )
