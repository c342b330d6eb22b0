"""A disk that is full, as the tests of data have it."""

from tests.data.conftest import file_size_limit as file_size_limit
