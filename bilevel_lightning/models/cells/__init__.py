"""The DARTS search space: operations, the network that is searched in, genotypes, and the network of a genotype."""

from bilevel_lightning.models.cells.genotype import PUBLISHED, Genotype
from bilevel_lightning.models.cells.network import GenotypeNetwork, drop_path
from bilevel_lightning.models.cells.operations import OPERATIONS
from bilevel_lightning.models.cells.search import ArchitectureWeights, SearchNetwork

__all__ = [
    "OPERATIONS",
    "PUBLISHED",
    "ArchitectureWeights",
    "Genotype",
    "GenotypeNetwork",
    "SearchNetwork",
    "drop_path",
]
