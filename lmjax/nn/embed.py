"""Tables: of the vocabulary (tokens in, and the rows that logits are products with), and of learned positions."""

from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.nn.execution import LayerExecution
from lmjax.nn.param import matrix
from lmjax.ops.lookup import lookup

TABLE_MULTIPLE = 128
"""Tables have a multiple of this many rows, so that ``tensor`` divides them. It is fixed, not taken from the
mesh: a checkpoint then has the same shapes on every mesh. The rows beyond the vocabulary are never looked up, and
their logits are -inf."""


def table_rows(num_rows: int) -> int:
    return -(-num_rows // TABLE_MULTIPLE) * TABLE_MULTIPLE


class Table(nnx.Module):
    """(vocab, embed): one row a token, or a position."""

    def __init__(self, num_rows: int, embed_dim: int, *, key: PRNGKeyArray):
        self.table = matrix(key, (table_rows(num_rows), embed_dim), ("vocab", "embed"))

    def __call__(self, tokens_BT: Int[Array, "batch seq"], execution: LayerExecution) -> Float[Array, "..."]:
        """The rows of ``tokens`` in the compute dtype, as the residual stream is sharded."""
        return lookup(self.table[...], tokens_BT, execution.compute_dtype)
