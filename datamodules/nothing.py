"""Upper iterations for tasks that need no data."""

from typing import Any

from pytorch_lightning import LightningDataModule
from typing_extensions import override

from bilevel_lightning.datamodules.iterations import Iterations, Whole
from bilevel_lightning.errors import positive


class NoData(LightningDataModule):
    """Empty batches ``{"lower": (), "upper": ()}``, for tasks whose losses read none.

    Args:
        iterations: batches an epoch, after which validation runs; each is one upper iteration, or
            `BilevelModule.upper_iterations` of them. Default 100.

    Raises:
        BilevelError: if ``iterations`` is not positive.
    """

    def __init__(self, iterations: int = 100) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.iterations = int(positive("data.iterations", iterations))

    def batch(self, k: int = 0) -> dict[str, Any]:
        """Returns batch ``k``. Lightning would skip one that is None."""
        return {"lower": (), "upper": ()}

    @override
    def train_dataloader(self) -> Iterations:
        assert self.trainer is not None
        return Iterations(self.batch, self.iterations, self.trainer)

    @override
    def val_dataloader(self) -> Whole:
        return Whole(self.batch())

    @override
    def test_dataloader(self) -> Whole:
        return Whole(self.batch())
