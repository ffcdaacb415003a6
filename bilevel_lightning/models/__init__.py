"""Networks of the shipped tasks: images, shape ``(batch, channels, height, width)``, to logits; bodies, heads, norms.

A body maps images to vectors of ``body.features`` numbers, which are maps of shape ``body.shape``; a head maps those to
logits. A task can put them on different levels. `weights` are of samples.
"""

from bilevel_lightning.models.cells import PUBLISHED, ArchitectureWeights, Genotype, GenotypeNetwork, SearchNetwork
from bilevel_lightning.models.convnet import ConvNet, ConvNetBody
from bilevel_lightning.models.dense import LinearNet, MLPNet, RegressionMLP
from bilevel_lightning.models.equilibrium import Cell, ConvolutionalCell, DenseCell
from bilevel_lightning.models.heads import ConvHead, LinearHead
from bilevel_lightning.models.norm import PerStepBatchNorm2d, normalization
from bilevel_lightning.models.resnet import ResNet12, ResNet12Body
from bilevel_lightning.models.weights import LossWeights, SampleWeights, SourceWeights

__all__ = [
    "PUBLISHED",
    "ArchitectureWeights",
    "Cell",
    "ConvHead",
    "ConvNet",
    "ConvNetBody",
    "ConvolutionalCell",
    "DenseCell",
    "Genotype",
    "GenotypeNetwork",
    "LinearHead",
    "LinearNet",
    "LossWeights",
    "MLPNet",
    "PerStepBatchNorm2d",
    "RegressionMLP",
    "ResNet12",
    "ResNet12Body",
    "SampleWeights",
    "SearchNetwork",
    "SourceWeights",
    "normalization",
]
