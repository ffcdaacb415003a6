"""Equilibrium models (DEQ): a network whose layer is the fixed point of a map."""

from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.callbacks.equilibrium import UpperStationarity
from bilevel_lightning.distributed import gather
from bilevel_lightning.errors import BilevelError, positive
from bilevel_lightning.models.equilibrium import Cell
from bilevel_lightning.projections import Box
from bilevel_lightning.task import BilevelTask
from bilevel_lightning.tree import Params


class States(nn.Module):
    """The lower variables: one state a sample, of which the parameter ``h``, one zero state, is the start.

    Args:
        shape: of one state.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.h = nn.Parameter(torch.zeros(1, *shape))


class Equilibrium(BilevelTask):
    r"""Classify images by the fixed points of a contraction, one a sample.

    Upper: f = mean over the samples of CE(W read(h_i) + b, label_i), over x = (A, B, c, W, b).
    Lower: h_i = Phi(h_i, image_i), such as tanh(h_i A + image_i B + c); dynamics are `FixedPoint` or `Anderson`.

    After each upper step A becomes the nearest one for which Phi contracts by ``radius``, and W is clipped. What
    the images contribute to Phi is computed once an upper iteration (`Bilevel.prepare`).

    y is the states of the batch, one row a sample: it does not persist. With ``stored_states`` the last states of each
    training sample are kept on the device, and in the checkpoint, and are the start when the sample is drawn again;
    evaluations always start at zero. Batches are those of `EquilibriumData`.

    The metrics are one value a sample: ``accuracy``; ``upper_loss``, the cross-entropy; and ``opt_metric``,
    ``|Phi(h) - h| / |Phi(h)| / (1 - radius)``, a bound on the distance from the fixed point relative to Phi(h). (The
    paper's code takes norms over a batch, and h_T - h_{T-1} in place of Phi(h_T) - h_T.) How many steps an evaluation
    takes is the algorithm's ``evaluation_steps``.

    Args:
        cell: Phi.
        classes: number of classes. Default 10.
        radius: contraction, in (0, 1). Default 0.5, as in the paper's code.
        weight_bound: bound on the entries of W. Default 1, as in the paper's code.
        stored_states: number of training samples whose states are stored; 0 (default): each solve starts at zero.

    Raises:
        BilevelError: if a setting is impossible or the data do not fit.

    References:
        S. Bai, J. Z. Kolter, V. Koltun. Deep Equilibrium Models. NeurIPS 2019.
        R. Grazzi, M. Pontil, S. Salzo. Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
        without Warm-Start. JMLR 2023 (this problem, and its settings).
    """

    persistent_lower = False

    def __init__(
        self,
        cell: Cell,
        classes: int = 10,
        radius: float = 0.5,
        weight_bound: float = 1.0,
        stored_states: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < radius < 1:
            raise BilevelError(f"Equilibrium.radius must be in (0, 1), got {radius}: Phi has to contract.")
        if stored_states < 0:
            raise BilevelError(f"Equilibrium.stored_states must not be negative, got {stored_states}.")
        self.radius, self.clip = radius, Box(-positive("Equilibrium.weight_bound", weight_bound), weight_bound)
        head = nn.Linear(cell.features, int(positive("Equilibrium.classes", classes)))
        nn.init.normal_(head.weight, std=0.01)  # as in the paper's code
        nn.init.zeros_(head.bias)
        self.upper: nn.ModuleDict = nn.ModuleDict({"cell": cell, "head": head})
        self.lower: States = States(cell.state_shape)
        tree.assign(self.upper, self.project_upper(tree.clone(tree.of(self.upper))))
        self.register_buffer("stored", torch.zeros(stored_states, *cell.state_shape))
        self.stored: Tensor

    @property
    def cell(self) -> Cell:
        """The map Phi."""
        return cast(Cell, self.upper["cell"])

    def logits(self) -> Tensor:
        """Returns the class scores of the states h."""
        scores: Tensor = self.upper["head"](self.cell.read(self.lower.h))
        return scores

    @override
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        images, index = batch["lower"]
        return {**batch, "lower": (self.cell.input(images), index)}

    @override
    def fixed_point_map(self, batch: tuple[Tensor, Tensor]) -> Params:
        return {"h": self.cell(self.lower.h, batch[0])}

    @override
    def upper_loss(self, batch: Tensor) -> Tensor:
        return cross_entropy(self.logits(), batch)

    @override
    def project_upper(self, upper: Params) -> Params:
        projected = {"cell.A": self.cell.project(upper["cell.A"], self.radius)}
        return {**upper, **projected, "head.weight": self.clip(upper["head.weight"])}

    @override
    def episode_lower(self, upper: Params, episode: dict[str, Any]) -> Params:
        images, index = episode["lower"]
        if self.training and len(self.stored):
            return {"h": self.stored[index]}
        return {"h": self.lower.h.expand(len(images), *self.cell.state_shape)}

    @override
    def keep_lower(self, episode: dict[str, Any], lower: Params) -> None:
        if len(self.stored):
            self.stored[gather(episode["lower"][1])] = gather(lower["h"].detach()).to(self.stored)

    @override
    def metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        (injected, _), labels = batch["lower"], batch["upper"]
        scores, h = self.logits(), self.lower.h
        image = self.cell(h, injected)
        residual, size = (torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (image - h, image))
        return {
            "upper_loss": cross_entropy(scores, labels, reduction="none"),
            "accuracy": (scores.argmax(1) == labels).to(scores.dtype),
            "opt_metric": residual / size / (1 - self.radius),
        }

    @override
    def predict(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the number, the label and the predicted class of each sample."""
        return {"index": batch["lower"][1], "label": batch["upper"], "predicted": self.logits().argmax(1)}

    @override
    def check_data(self, datamodule: LightningDataModule) -> None:
        data: Any = datamodule
        if len(self.stored) not in (0, data.train_samples):
            raise BilevelError(
                f"The task stores {len(self.stored)} states but the data have {data.train_samples} training samples: "
                "set task.stored_states to that number, or to 0 for none."
            )
        if len(self.upper.get_parameter("head.bias")) != data.classes:
            raise BilevelError(f"The data have {data.classes} classes: set task.classes to that number.")
        like = next(self.upper.parameters())
        try:
            with torch.no_grad():
                shape = tuple(self.cell.input(torch.zeros(1, *data.image_shape).to(like)).shape[1:])
        except RuntimeError as error:
            raise BilevelError(
                f"task.cell does not accept images of shape {tuple(data.image_shape)} ({error}); set its image_shape."
            ) from error
        if shape != tuple(self.cell.state_shape):
            raise BilevelError(
                f"task.cell makes states of shape {shape} from images of shape {tuple(data.image_shape)}, and is made "
                f"for {tuple(self.cell.state_shape)}; set its image_shape."
            )

    @override
    def callbacks(self) -> list[Callback]:
        return [UpperStationarity()]
