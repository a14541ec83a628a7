import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_jax import attention

jitted = jax.jit(attention.schedule, static_argnums=(1, 2))


def schedule(rows, num_rows, block_size):
  blocks, lengths = jitted(jnp.asarray(rows, jnp.int32), num_rows, block_size)
  return blocks.tolist(), lengths.tolist()


def test_blocks_of_one_row_each():
  rows = [0, 0, 0, 0, 0, 1, 2, 2, 2]
  blocks, lengths = schedule(rows, 3, 2)
  assert blocks == [0, 2, 4, 5, 6, 8]
  assert lengths == [2, 2, 1, 1, 2, 1]


def test_decode_has_a_block_per_token():
  assert schedule([3, 1, 0], 4, 1) == ([0, 1, 2], [1, 1, 1])


def test_padding_belongs_to_no_block():
  blocks, lengths = schedule([2, 0, 0, 0, 2, 2, 1, 2], 2, 4)
  assert blocks == [1, 6, 8]
  assert lengths == [3, 1, 0]


def test_nothing_but_padding():
  assert schedule([5] * 4, 5, 1) == ([4] * 4, [0] * 4)


@pytest.mark.parametrize("num_tokens, size", [(1, 1), (7, 1), (8, 2), (40, 8), (2048, 64)])
def test_block_size_of_kernels_follows_the_tokens_per_row(num_tokens, size):
  assert attention.block_size("reference", num_tokens, 4) == size


@pytest.mark.parametrize("num_tokens, size", [(1, 1), (4, 1), (5, 5), (40, 40), (2048, 64)])
def test_xla_takes_large_blocks_unless_every_row_may_decode(num_tokens, size):
  assert attention.block_size("xla", num_tokens, 4) == size


@st.composite
def batches(draw):
  """60 tokens of at most 3 rows."""
  rows = []
  for row in draw(st.permutations(range(3))):
    rows += [3] * draw(st.integers(0, 3)) + [row] * draw(st.integers(0, 17))
  return rows + [3] * (60 - len(rows))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batches(), st.sampled_from([1, 2, 16, 60]))
def test_every_token_is_in_one_block_of_its_row(rows, size):
  blocks, lengths = schedule(rows, 3, size)
  covered = []
  for first, length in zip(blocks, lengths):
    assert length <= size
    assert (first == len(rows)) == (length == 0)
    covered += range(first, first + length)
    assert len({rows[b] for b in range(first, first + length)}) <= 1
  assert covered == [b for b, row in enumerate(rows) if row < 3]
