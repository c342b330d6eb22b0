"""The vocabulary table: tokens in, and the rows that the output logits are products with."""

from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.nn.execution import LayerExecution
from lmjax.nn.param import matrix
from lmjax.ops.lookup import lookup

TABLE_MULTIPLE = 128
"""Vocabulary tables have a multiple of this many rows, so that ``tensor`` divides them. It is fixed, not taken from the
mesh: a checkpoint then has the same shapes on every mesh. The rows beyond the vocabulary are never looked up, and
their logits are -inf."""


def table_rows(vocab_size: int) -> int:
    return -(-vocab_size // TABLE_MULTIPLE) * TABLE_MULTIPLE


class VocabularyTable(nnx.Module):
    """(vocab, embed), one row a token."""

    def __init__(self, vocab_size: int, embed_dim: int, *, key: PRNGKeyArray):
        self.table = matrix(key, (table_rows(vocab_size), embed_dim), ("vocab", "embed"))

    def __call__(self, tokens_BT: Int[Array, "batch seq"], execution: LayerExecution) -> Float[Array, "..."]:
        """The rows of ``tokens`` in the compute dtype, as the residual stream is sharded."""
        return lookup(self.table[...], tokens_BT, execution.compute_dtype)
