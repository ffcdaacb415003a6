"""The traces of the released code of PBGD, on real data."""

import pytest
import torch
from pytorch_lightning import Callback, Trainer, seed_everything

from bilevel_lightning import GPBGD, VPBGD, GradientDescent
from bilevel_lightning.datamodules import MNISTCleaning
from bilevel_lightning.models import LinearNet
from bilevel_lightning.schedules import Linear
from bilevel_lightning.tasks import HyperCleaning

STEPS = 51
V = {
    "lower_lr": 0.1,
    "dynamics": GradientDescent(0.01),
    "lower_steps": 1,
    "twin": "persistent",
    "gamma": Linear(0, 0.2, 30000),
}
G = {"lower_lr": 0.5, "gamma": Linear(0, 37, 5000)}


class Quiet(HyperCleaning):
    def callbacks(self):
        return []


class UpperLoss(Callback):
    """f at the start of the last iteration, as the released code prints it."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == STEPS - 1:
            with torch.no_grad():
                self.value = float(module.task.upper_loss(batch["upper"]))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "settings", "lr", "accuracy", "f", "f1"),
    [(VPBGD, V, 0.1, 0.8413, 0.794, 0.88319), (GPBGD, G, 0.3, 0.8852, 0.448, 0.73042)],
)
def test_iteration_50_of_the_released_code(real_data, algorithm, settings, lr, accuracy, f, f1):
    """Accuracy, f and F1 that the released code of PBGD prints at k = 50 for seed 2424, linear MNIST."""
    root = str(real_data("mnist"))
    data = MNISTCleaning(root=root, seed=2424, label_noise="any", test_split="train", epoch_length=STEPS)
    seed_everything(2424)
    task, upper_loss = Quiet(LinearNet()), UpperLoss()
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_steps=STEPS, limit_val_batches=0, callbacks=[upper_loss], **off)
    trainer.fit(algorithm(task=task, upper_optimizer=lambda p: torch.optim.SGD(p, lr=lr), **settings), datamodule=data)
    with torch.no_grad():
        found = task.metrics({"lower": data.train, "upper": data.test, "clean": data.clean})
    assert float(found["accuracy"]) == pytest.approx(accuracy, abs=1e-3)
    assert upper_loss.value == pytest.approx(f, abs=2e-3)
    assert float(found["f1"]) == pytest.approx(f1, abs=1e-3)
