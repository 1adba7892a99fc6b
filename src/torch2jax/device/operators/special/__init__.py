"""No JAX function of the operands can express these operators. Importing fills the table."""

from . import changes as changes
from . import collectives as collectives
from . import indices as indices
from . import layers as layers
from . import moves as moves
from . import values as values
