"""Few-shot learning: each episode is a lower problem of its own; what they share is the upper level."""

import copy
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.modules.batchnorm import _NormBase
from typing_extensions import override

from bilevel_lightning import tree
from bilevel_lightning.binding import split
from bilevel_lightning.callbacks.few_shot import AdaptationCurve, EpisodeFigure, FewShotReport, RegressionFigure
from bilevel_lightning.distributed import gather, processes, rank
from bilevel_lightning.errors import BilevelError
from bilevel_lightning.models import PerStepBatchNorm2d
from bilevel_lightning.state import Row, State
from bilevel_lightning.task import BilevelTask
from bilevel_lightning.tree import Params

Part = tuple[Tensor, Tensor]


class FewShot(BilevelTask):
    r"""Classify queries from a few labelled images, over many episodes.

    Upper: f = cross-entropy on the episode's query set.
    Lower: g = cross-entropy on its support set + ``regularization`` R(y).

    The two structures of the field, and one between them:

    ============ ======= ======================= ================== ==========================================
    ``adapt``    start   upper variables x       lower variables y  as in
    ============ ======= ======================= ================== ==========================================
    ``head``     fixed   body                    head               RHG, BDA; IAPTT-GM, which learns the start
    ``head``     learned body, start of the head head               ANIL
    ``all``      learned start of the network    the whole network  MAML, FOMAML, Meta-SGD, iMAML, Reptile
    ============ ======= ======================= ================== ==========================================

    With ``head``, the body's features of an episode are computed once an upper iteration (`Bilevel.prepare`). Batches
    are ``{"support": (images, labels), "query": (images, labels)}``, torchmeta's ``train`` and ``test`` too, whose
    tensors have a leading episode dimension. Reported is ``accuracy`` on the queries, and ``accuracy_before`` adapting.

    With ``stored_heads`` = N, solved heads are kept, in the checkpoint, and training starts from them: episode number n
    at head n mod N. The numbers are those of the batch's ``"episode"``, or else of the places in the batch of all
    processes. Evaluations always start from the head as it was made. So the warm starts of the literature are:

    * none: N = 0.
    * naive, the last batch's heads for other tasks: N = episodes of a batch, on all processes.
    * full, each task its own: N = the data's ``train_episodes``.

    Methods that step y once in an upper iteration (MEHA, V-PBGD, BOME, SOBA) need the full one: y is the heads of all N
    tasks, and an iteration moves those of its episodes. What a method keeps beside y is kept for each head too.

    Args:
        body: network from images to features; with ``head: null`` the whole network, from images to logits.
        head: network from features to logits.
        adapt: ``head`` (default, where there is one) or ``all``.
        start: of y: ``learned``, an upper variable (default), or ``fixed``, as the head was made. ``all`` needs
            ``learned``.
        regularizer: R: ``none`` (default); ``ridge``, |y|^2; ``distance``, |y - y_0|^2, which needs a learned start;
            ``p_norm``, sum over the tensors w of y of (\|w\| + \|epsilon 1\|)^(exponent/2).
        regularization: its factor. Default 0.25, as ``exponent`` and ``epsilon`` that of IAPTT-GM's code.
        exponent: of ``p_norm``. Default 0.5.
        epsilon: of ``p_norm``. Default 0.1.
        stored_heads: number N of heads that are kept; for ``start`` fixed, and algorithms that learn no start of y.
            0 (default): none.

    Raises:
        BilevelError: if the settings contradict each other, or the data do not fit the network.

    References:
        C. Finn, P. Abbeel, S. Levine. Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks. ICML 2017.
        L. Franceschi, P. Frasconi, S. Salzo, R. Grazzi, M. Pontil. Bilevel Programming for Hyperparameter Optimization
        and Meta-Learning. ICML 2018.
        R. Liu, Y. Liu, S. Zeng, J. Zhang. Towards Gradient-based Bilevel Optimization with Non-convex Followers and
        Beyond. NeurIPS 2021 (the regularisers).
        R. Grazzi, M. Pontil, S. Salzo. Bilevel Optimization with a Lower-level Contraction: Optimal Sample Complexity
        without Warm-Start. JMLR 2023 (the warm starts).
    """

    persistent_lower = False
    measure = "accuracy"

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module | None = None,
        adapt: Literal["head", "all"] | None = None,
        start: Literal["learned", "fixed"] = "learned",
        regularizer: Literal["none", "ridge", "distance", "p_norm"] = "none",
        regularization: float = 0.25,
        exponent: float = 0.5,
        epsilon: float = 0.1,
        stored_heads: int = 0,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("adapt", adapt, (None, "head", "all")),
            ("start", start, ("learned", "fixed")),
            ("regularizer", regularizer, ("none", "ridge", "distance", "p_norm")),
        ):
            if value not in choices:
                raise BilevelError(f"{type(self).__name__}.{name} must be one of {choices}, got {value!r}.")
        adapt = adapt or ("all" if head is None else "head")
        if adapt == "head" and head is None:
            raise BilevelError(f"{type(self).__name__}.adapt 'head' needs a head: give one, or adapt 'all'.")
        if start == "fixed" and (adapt == "all" or regularizer == "distance"):
            raise BilevelError(
                f"{type(self).__name__}.start 'fixed' leaves nothing to learn with adapt 'all', and no y_0 for the "
                "regularizer 'distance': set start to 'learned'."
            )
        if regularization < 0:
            raise BilevelError(f"{type(self).__name__}.regularization must not be negative, got {regularization}.")
        if stored_heads < 0:
            raise BilevelError(f"{type(self).__name__}.stored_heads must not be negative, got {stored_heads}.")
        if stored_heads and start != "fixed":
            raise BilevelError(
                f"{type(self).__name__}.stored_heads would replace the start that is learned: set start to 'fixed', or "
                "leave stored_heads out."
            )
        parts = nn.ModuleDict({"body": body} if head is None else {"body": body, "head": head})
        self.adapt, self.start = adapt, start
        self.lower: nn.Module
        if adapt == "all":
            self.upper, self.lower = parts, copy.deepcopy(parts)
        elif start == "learned":
            self.upper, self.lower = parts, copy.deepcopy(parts["head"])
        else:
            self.upper, self.lower = nn.ModuleDict({"body": body}), parts["head"]
        self.regularizer, self.regularization = regularizer, regularization
        self.exponent, self.epsilon = exponent, epsilon
        self.adapted = [*tree.of(self.lower)]  # not frozen
        self.stored_heads = self.stored_lowers = stored_heads
        self.stored = State(tree.repeat(tree.of(self.lower), stored_heads)) if stored_heads else None

    @override
    def initial_lower(self, upper: Params) -> Params:
        if self.start == "fixed":
            return super().initial_lower(upper)
        prefix = "" if self.adapt == "all" else "head."
        return {name: upper[prefix + name] for name in self.adapted}

    @override
    def episode_lower(self, upper: Params, episode: dict[str, Any]) -> Params:
        if self.stored is None or not self.training:
            return self.initial_lower(upper)
        return {name: t[episode["episode"]] for name, t in self.stored.get().items()}

    @override
    def keep_lower(self, episode: dict[str, Any], lower: Params) -> None:
        if self.stored is None:
            return
        heads = {name: gather(t.detach()[None]) for name, t in lower.items()}
        for i, number in enumerate(gather(episode["episode"][None]).tolist()):
            self.stored.set(Row(number, {name: t[i] for name, t in heads.items()}))

    @override
    def stored_row(self, episode: dict[str, Any]) -> Tensor:
        row: Tensor = episode["episode"]
        return row

    @override
    def episodes(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        labels = split(batch)[0][1]
        number = len(labels)
        parts: dict[str, Part] = {key: part for key, part in batch.items() if key != "episode"}
        found: list[dict[str, Any]] = [
            {key: (part[0][i], part[1][i]) for key, part in parts.items()} for i in range(number)
        ]
        if self.stored is not None and self.training:
            if number * processes() > self.stored_heads:
                raise BilevelError(
                    f"{type(self).__name__}.stored_heads={self.stored_heads} is less than the {number * processes()} "
                    "episodes of a batch on all processes: raise it to that number."
                )
            places = rank() * number + torch.arange(number, device=labels.device)
            for episode, row in zip(found, batch.get("episode", places) % self.stored_heads, strict=True):
                episode["episode"] = row
        return found

    @override
    def at_lower_step(self, t: int) -> None:
        for layer in self.modules():
            if isinstance(layer, PerStepBatchNorm2d):
                layer.lower_step = t

    @override
    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.adapt == "all":
            return batch
        body = self.upper.get_submodule("body")
        return {key: part if key == "episode" else (body(part[0]), part[1]) for key, part in batch.items()}

    def output(self, inputs: Tensor) -> Tensor:
        """Returns what y gives for images, or for features where only the head is adapted."""
        if self.adapt == "head":
            logits: Tensor = self.lower(inputs)
            return logits
        for part in self.lower.children():
            inputs = part(inputs)
        return inputs

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of both levels."""
        return cross_entropy(output, target)

    @override
    def upper_loss(self, batch: Part) -> Tensor:
        return self.loss(self.output(batch[0]), batch[1])

    @override
    def lower_loss(self, batch: Part) -> Tensor:
        loss = self.loss(self.output(batch[0]), batch[1])
        if self.regularizer == "none":
            return loss
        y: Params = {name: t for name, t in self.lower.named_parameters() if name in self.adapted}
        if self.regularizer == "distance":
            start = self.initial_lower(dict(self.upper.named_parameters()))
            y = {name: t - start[name] for name, t in y.items()}
        if self.regularizer == "p_norm":
            # the root of what is not 0, so that second derivatives at w = 0 are 0 and not NaN
            squares = [(s := t.square().sum(), s > 0) for t in y.values()]
            roots = [torch.where(inside, s, 1.0).sqrt() * inside for s, inside in squares]
            norms = [n + self.epsilon * t.numel() ** 0.5 for n, t in zip(roots, y.values(), strict=True)]
            terms = [n ** (self.exponent / 2) for n in norms]
        else:
            terms = [t.square().sum() for t in y.values()]
        return loss + self.regularization * torch.stack(terms).sum()

    @override
    def metrics(self, batch: dict[str, Part]) -> dict[str, Tensor]:
        images, labels = split(batch)[1]
        return {"accuracy": (self.output(images).argmax(1) == labels).to(images.dtype).mean()}

    @override
    def predict(self, batch: dict[str, Part]) -> dict[str, Tensor]:
        """Returns label and prediction of each query of an episode."""
        images, labels = split(batch)[1]
        return {"label": labels, "predicted": self.output(images).argmax(1)}

    @property
    def normalization(self) -> str:
        """How the network's normalisation layers get their statistics, for reports."""
        found = {
            ("per_step" if isinstance(m, PerStepBatchNorm2d) else "frozen") if m.track_running_stats else "transductive"
            for m in self.modules()
            if isinstance(m, _NormBase)
        }
        return ", ".join(sorted(found)) or "no batch normalisation"

    @override
    def check_data(self, datamodule: LightningDataModule) -> None:
        data: Any = datamodule
        self._check_stored(data)
        ways, shape = getattr(data, "ways", None), getattr(data, "image_shape", None)
        if ways is None or shape is None:
            return
        like = next(self.upper.parameters())
        training = self.training
        try:
            with torch.no_grad(), torch.random.fork_rng([]):
                batch = self.eval().prepare({"support": (torch.zeros(2, *shape).to(like), torch.zeros(2))})
                out = self.output(batch["support"][0])
        except RuntimeError as error:
            raise BilevelError(
                f"The network does not accept images of shape {tuple(shape)} ({error}): set body.image_shape and the "
                "head's features."
            ) from error
        finally:
            self.train(training)
        if tuple(out.shape) != (2, self.outputs(ways)):
            raise BilevelError(
                f"The network returns shape {tuple(out.shape[1:])} for an image and the data have {ways} ways: set "
                "data.ways and the head's ways to the same number."
            )

    def _check_stored(self, data: Any) -> None:
        size = getattr(data, "episodes_per_batch", None)
        if not self.stored_heads or size is None:
            return
        batch, tasks = size * processes(), getattr(data, "train_episodes", None)
        if self.stored_heads not in (batch, tasks):
            raise BilevelError(
                f"The task stores {self.stored_heads} heads, which fits neither the {batch} episodes of a batch on all "
                f"processes nor data.train_episodes={tasks}: set task.stored_heads to one of them, or to 0 for none."
            )

    def outputs(self, ways: int) -> int:
        """Returns how many numbers the network gives for one input."""
        return ways

    @override
    def callbacks(self) -> list[Callback]:
        return [FewShotReport(), EpisodeFigure(), AdaptationCurve()]


class FewShotRegression(FewShot):
    r"""Fit a function from a few points, over many episodes: `FewShot` with the mean squared error at both levels.

    Reported are ``mse`` on the queries after adapting, and ``mse_before``.

    Args:
        body: network from inputs to features; with ``head: null`` the whole network.
        head: network from features to outputs.
        **settings: of `FewShot`.

    References:
        C. Finn, P. Abbeel, S. Levine. Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks. ICML 2017.
    """

    measure = "mse"

    def __init__(self, body: nn.Module, head: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(body, head, **settings)

    @override
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target)

    @override
    def outputs(self, ways: int) -> int:
        return 1

    @override
    def metrics(self, batch: dict[str, Part]) -> dict[str, Tensor]:
        return {"mse": self.upper_loss(split(batch)[1])}

    @override
    def callbacks(self) -> list[Callback]:
        return [FewShotReport(), RegressionFigure(), AdaptationCurve()]

    @override
    def predict(self, batch: dict[str, Part]) -> dict[str, Tensor]:
        """Returns target and prediction of each query of an episode."""
        inputs, targets = split(batch)[1]
        return {"target": targets.squeeze(-1), "predicted": self.output(inputs).squeeze(-1)}
