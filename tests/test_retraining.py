import pickle
from functools import partial

import pytest
import torch
from loops import trainer
from pytorch_lightning import Callback
from torch.nn.functional import cross_entropy

from bilevel_lightning import BilevelError
from bilevel_lightning.datamodules import DigitsTraining
from bilevel_lightning.models import PUBLISHED, Genotype
from bilevel_lightning.retraining import Retraining
from bilevel_lightning.schedules import Linear

SMALL = {"image_shape": (1, 8, 8), "channels": 2, "layers": 3, "auxiliary_weight": 0.0}


class Watch(Callback):
    """What each iteration was done with."""

    def __init__(self):
        self.rates, self.dropped = [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.dropped.append(module.network.dropped)


def data():
    return DigitsTraining(train_samples=100, val_samples=40, batch_size=25)


def test_schedules_of_the_step_size_and_of_dropping():
    watch = Watch()
    trainer(8, callbacks=[watch], gradient_clip_val=5.0).fit(Retraining(drop_path=0.4, **SMALL), datamodule=data())
    assert watch.dropped == pytest.approx([0.4 * k / 8 for k in range(8)])
    half = torch.pi * torch.arange(1, 9, dtype=torch.float64) / 8
    assert watch.rates == pytest.approx((0.025 * (1 + torch.cos(half)) / 2).tolist(), abs=1e-9)


def test_other_schedules():
    watch = Watch()
    sgd = partial(torch.optim.SGD, lr=0.2)
    trainer(3, callbacks=[watch]).fit(
        Retraining(optimizer=sgd, scheduler=Linear(1.0, 0.5, 2), **SMALL), datamodule=data()
    )
    assert watch.rates == pytest.approx([0.15, 0.1, 0.1])
    watch = Watch()
    step = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    trainer(2, callbacks=[watch]).fit(Retraining(optimizer=sgd, scheduler=step, **SMALL), datamodule=data())
    assert watch.rates == pytest.approx([0.1, 0.05])


def test_the_auxiliary_loss_is_added():
    torch.manual_seed(0)
    module = Retraining("DARTS_V1", channels=2, layers=3, auxiliary_weight=0.4, drop_path=0.0)
    module.trainer = trainer(5)
    module.log = lambda *args, **kwargs: None
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    loss = module.training_step((images, labels), 0)
    logits, second = module.network(images)
    expected = cross_entropy(logits, labels) + 0.4 * cross_entropy(second, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_learns_and_is_tested():
    torch.manual_seed(0)
    module = Retraining("random", drop_path=0.0, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), **SMALL)
    run = trainer(60)
    run.fit(module, datamodule=DigitsTraining(train_samples=500))
    assert float(run.callback_metrics["val/accuracy"]) > 0.6
    (tested,) = run.test(module, datamodule=run.datamodule, verbose=False)
    batches = run.predict(module, datamodule=run.datamodule)
    right = torch.cat([batch["label"] == batch["predicted"] for batch in batches])
    assert tested["test/accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert len(right) == 1797 - 700


def test_a_checkpoint_needs_no_genotype_file(tmp_path):
    Genotype.random(4).save(tmp_path / "g.json")
    run = trainer(1)
    run.fit(Retraining(str(tmp_path / "g.json"), **SMALL), datamodule=data())
    run.save_checkpoint(tmp_path / "c.ckpt")
    (tmp_path / "g.json").unlink()
    loaded = Retraining.load_from_checkpoint(tmp_path / "c.ckpt")
    assert loaded.genotype == Genotype.random(4)
    assert torch.load(tmp_path / "c.ckpt", weights_only=True)["hyper_parameters"]["genotype"] == str(loaded.genotype)


def test_it_can_be_sent_to_other_processes():
    module = Retraining("random", **SMALL)
    again = pickle.loads(pickle.dumps(module))
    assert again.optimizer is module.optimizer
    assert again.genotype == module.genotype


def test_names():
    assert Retraining("DARTS_OUR4", **SMALL).genotype == PUBLISHED["DARTS_OUR4"]
    assert Retraining("random", genotype_seed=2, genotype_nodes=3, **SMALL).genotype == Genotype.random(2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auxiliary_weight": -1.0}, "auxiliary_weight must not be negative"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"genotype": "nowhere.json"}, "neither a file nor 'random'"),
        ({"auxiliary_weight": 0.4}, "images of 32 to 40 pixels"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BilevelError, match=message):
        Retraining(**{**SMALL, **settings})


def test_data_and_lengths_that_do_not_fit():
    with pytest.raises(BilevelError, match=r"images of shape \(1, 8, 8\) and 10 classes: set model.image_shape"):
        trainer(1).fit(Retraining(**{**SMALL, "classes": 3}), datamodule=data())
    with pytest.raises(BilevelError, match="set trainer.max_steps or max_epochs"):
        trainer(-1).fit(Retraining(**SMALL), datamodule=data())
    with pytest.raises(BilevelError, match="optimizer: Invalid learning rate"):
        trainer(1).fit(Retraining(optimizer=partial(torch.optim.SGD, lr=-1.0), **SMALL), datamodule=data())
