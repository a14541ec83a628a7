import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_jax.attention import backend, blocks, xla

jitted = jax.jit(blocks.schedule, static_argnums=(3, 4, 5))


def schedule(rows, num_rows, block_size, most=None, positions=None, starts=None):
  """First tokens and lengths of blocks; what else they say is checked."""
  rows = np.asarray(rows, np.int32)
  last = (
    np.arange(len(rows), dtype=np.int32) if positions is None else np.array(positions, np.int32)
  )
  last = np.where(rows < num_rows, last, -1)
  starts = np.zeros_like(rows) if starts is None else np.array(starts, np.int32)
  made = jax.tree.map(
    np.asarray, jitted(rows, starts, last, num_rows, most or num_rows, block_size)
  )
  first, lengths = made.first.tolist(), made.lengths.tolist()
  assert made.num_blocks == sum(length > 0 for length in lengths)
  places = np.full(len(rows), made.tokens.size)
  for g, (token, length) in enumerate(zip(first, lengths)):
    attend = [b for b in range(token, token + length) if last[b] >= 0]
    assert made.rows[g] == (rows[token] if length else num_rows)
    assert not length or made.starts[g] == starts[token]
    assert made.lows[g] == min(last[attend], default=np.iinfo(np.int32).max)
    assert made.highs[g] == max(last[attend], default=-1)
    tokens = [b if b in attend else len(rows) for b in range(token, token + block_size)]
    assert made.tokens[g].tolist() == tokens
    assert made.last[g].tolist() == [last[b] if b in attend else -1 for b in tokens]
    places[attend] = g * block_size + np.array(attend, int) - token
  assert made.places.tolist() == places.tolist()
  return first, lengths


def test_blocks_of_one_row_each():
  rows = [0, 0, 0, 0, 0, 1, 2, 2, 2]
  first, lengths = schedule(rows, 3, 2)
  assert first == [0, 2, 4, 5, 6, 8]
  assert lengths == [2, 2, 1, 1, 2, 1]


def test_decode_has_a_block_per_token():
  assert schedule([3, 1, 0], 4, 1) == ([0, 1, 2], [1, 1, 1])


def test_padding_belongs_to_no_block():
  first, lengths = schedule([2, 0, 0, 0, 2, 2, 1, 2], 2, 4)
  assert first == [1, 6, 8]
  assert lengths == [3, 1, 0]


def test_nothing_but_padding():
  assert schedule([5] * 4, 5, 1) == ([4] * 4, [0] * 4)


@pytest.mark.parametrize(
  "num_tokens, num_rows, few, size",
  [
    (32, 32, 8, 1),  # rows that decode
    (160, 32, 8, 8),  # drafts: 5 tokens of each row, together
    (256, 32, 8, 8),
    (32, 2, 8, 32),  # prompts
    (512, 16, 8, 64),
    (512, 256, 8, 2),  # two tokens of each row
    (512, 256, 1, 8),  # any prompts: larger blocks might leave too much empty
    (2048, 32, 1, 64),
    (1100, 1024, 1, 2),
    (4, 4, 1, 1),
    (7, 4, 1, 8),
  ],
)
def test_block_size_of_kernels(num_tokens, num_rows, few, size):
  assert backend.block_size(num_tokens, num_rows, few) == size


@pytest.mark.parametrize("num_tokens, size", [(1, 1), (4, 1), (5, 5), (40, 40), (2048, 64)])
def test_xla_takes_large_blocks_unless_every_row_may_decode(num_tokens, size):
  assert xla.block_size(num_tokens, 4, 1) == size


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
  first, lengths = schedule(rows, 3, size)
  covered = []
  for token, length in zip(first, lengths):
    assert length <= size
    assert (token == len(rows)) == (length == 0)
    covered += range(token, token + length)
    assert len({rows[b] for b in range(token, token + length)}) <= 1
  assert covered == [b for b, row in enumerate(rows) if row < 3]
