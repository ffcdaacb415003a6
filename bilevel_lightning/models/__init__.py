"""Networks of the shipped tasks. All take images, shape ``(batch, channels, height, width)``, and return logits."""

from bilevel_lightning.models.convnet import ConvNet
from bilevel_lightning.models.dense import LinearNet, MLPNet

__all__ = ["ConvNet", "LinearNet", "MLPNet"]
