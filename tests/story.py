"""A few verbs with plain Python operands, so that a test reads like a story."""

import numpy as np

import paged_jax
from paged_jax import jitted
from paged_jax.testing import replay

MOST = 24  # tokens written at once


def config(**fields):
  small = dict(
    num_layers=2, num_kv_heads=2, head_dim=2, page_size=4, num_pages=8, num_rows=3, max_length=24,
    dtype="float32",
  )  # fmt: skip
  return paged_jax.CacheConfig(**(small | fields))


def empty(**fields):
  return jitted.init(config(**fields))


def ids(*values):
  """i32[n] in NumPy: `jnp.array` compiles a program per shape."""
  return np.array(values, np.int32)


def extend(cache, *num_tokens):
  cache, info = jitted.extend(cache, ids(*num_tokens))
  return cache, info.ok.tolist()


def write(cache, row, tokens, start=0):
  """Writes `tokens` of one row from a position on, in every layer; returns which were written."""
  count, padding = len(tokens), MOST - len(tokens)  # one shape, one program
  rows = ids(*[row] * count, *[len(cache.lengths)] * padding)
  plan = jitted.plan(cache, rows, ids(*range(start, start + count), *[0] * padding))
  shape = (cache.pages.kv.shape[2], cache.pages.head_dim)
  tokens = [*tokens, *[0] * padding]
  for layer in range(cache.pages.kv.shape[1]):
    k, v = replay.values(tokens, layer, shape), replay.values(tokens, ~layer, shape)
    cache = jitted.write(cache, np.int32(layer), k, v, plan)
  return cache, plan.ok.tolist()[:count]


def read(cache, row):
  """The tokens that a row reads back, the same in every layer, head and column."""
  length = int(cache.lengths[row])
  tokens = None
  for layer in range(cache.pages.kv.shape[1]):
    k, v = (
      np.asarray(x, np.float32)[0, :length] for x in jitted.gather(cache, np.int32(layer), ids(row))
    )
    tokens = np.abs(k[:, 0, 0])
    np.testing.assert_array_equal(k, replay.values(tokens, layer, k.shape[1:]))
    np.testing.assert_array_equal(v, replay.values(tokens, ~layer, v.shape[1:]))
  return tokens.astype(int).tolist()


def pages_of(cache, row):
  table = np.asarray(cache.block_tables[row])
  return table[table < cache.ledger.pool.num_pages].tolist()
