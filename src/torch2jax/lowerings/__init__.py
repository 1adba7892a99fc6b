"""PyTorch's operators are JAX functions here, one file a family. Importing fills the table."""

from . import activations as activations
from . import attention as attention
from . import binary as binary
from . import choices as choices
from . import collectives as collectives
from . import comparisons as comparisons
from . import convolution as convolution
from . import embeddings as embeddings
from . import extremes as extremes
from . import factories as factories
from . import foreach as foreach
from . import grouped as grouped
from . import histograms as histograms
from . import indexing as indexing
from . import linalg as linalg
from . import losses as losses
from . import normalization as normalization
from . import pooling as pooling
from . import random as random
from . import reductions as reductions
from . import scans as scans
from . import shapes as shapes
from . import special as special
from . import unary as unary
from . import vision as vision
