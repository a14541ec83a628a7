import cases
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_jax import attention
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
  "num_tokens, num_rows, longest, size",
  [
    (32, 32, 1, 1),  # rows that decode
    (160, 32, 5, 8),  # drafts: 5 tokens of each row, together
    (256, 32, 8, 8),
    (32, 32, 32, 32),  # prompts
    (512, 32, 512, 64),
    (512, 256, 512, 8),  # any prompts: larger blocks might leave too much empty
    (2048, 32, 2048, 64),
    (1100, 1024, 1100, 2),
    (7, 4, 9, 8),
  ],
)
def test_block_size_of_kernels(num_tokens, num_rows, longest, size):
  assert backend.block_size(num_tokens, num_rows, longest) == size


@pytest.mark.parametrize(
  "parts, sizes",
  [
    (None, [64]),
    (((70, 8),), [64]),
    (((40, 8), (30, 30)), [8, 1]),
    (((40, 8, 40), (30, 30, 30)), [64, 32]),
    (((40, 40, 3), (30, 2, 30)), [4, 32]),
  ],
)
def test_parts_are_cut_by_their_longest_row_or_their_average_one(parts, sizes):
  p = cases.build(cases.Case("", (70,), (70,), spare_rows=0))
  tokens = p.plan.rows, p.plan.positions, p.plan.slots, p.plan.ok, p.pages, p.tables
  cut = attention.cut("reference", *tokens, parts)
  assert [part.block_size for part in cut] == sizes


def test_xla_takes_blocks_as_long_as_rows():
  sizes = [xla.block_size(*case) for case in ((4, 4, 1), (40, 8, 5), (40, 8, 40), (2048, 8, 2048))]
  assert sizes == [1, 5, 40, 64]


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
