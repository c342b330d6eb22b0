import pytest

from lmjax.nn.embed import TABLE_MULTIPLE, table_rows

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("vocab_size", "rows"), [(1, 128), (127, 128), (128, 128), (129, 256), (128_256, 128_256)])
def test_tables_are_padded_to_whole_multiples(vocab_size, rows):
    assert table_rows(vocab_size) == rows
    assert rows % TABLE_MULTIPLE == 0
