"""The twin's verbs in NumPy: whatever they do not leave to the compiled ones is the same, bit for bit."""

import collections

import jax
import numpy as np
import pytest

import paged_jax
from paged_jax import jitted
from paged_jax.ledger import on_host as twin

MANY = 2**31 - 1


def ledger_of(**options):
  config = dict(num_layers=1, num_kv_heads=1, head_dim=4, num_rows=5, page_size=4, max_length=20)
  return paged_jax.CacheConfig(**(config | options))


def on_host(tree):
  return jax.tree.map(np.asarray, tree)


def same(one, other):
  leaves = zip(jax.tree.leaves(one), jax.tree.leaves(on_host(other)), strict=True)
  for x, y in leaves:
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    np.testing.assert_array_equal(x, y)


class Walk:
  """Random verbs, asked of both; the compiled ones decide how it goes on."""

  def __init__(self, seed, config):
    self.rng = np.random.default_rng(seed)
    self.config = config
    self.ledger = on_host(jitted.ledger.init(config))
    self.known = collections.Counter()  # verbs that NumPy knew, and those that it left

  def ask(self, verb, *operands):
    wanted, info, *_ = getattr(jitted.ledger, verb)(self.ledger, *operands)
    found = twin.apply(self.ledger, verb, operands)
    self.known[verb, found is not None] += 1
    if found is not None:
      assert np.asarray(info.ok).all()
      same(found, wanted)
      if verb == "extend":
        self.known["copies"] += int(twin.copied(self.ledger, operands[0] > 0).sum())
    self.ledger = on_host(wanted)

  def replay(self, num_tokens):
    log = paged_jax.Log(((num_tokens,),), ("extend",))
    wanted = jitted.ledger.replay(self.ledger, log)
    found = twin.replay(self.ledger, log)
    self.known["replay", found is not None] += 1
    if found is not None:
      same(found, wanted)
    self.ledger = on_host(wanted)

  def ids(self, pages):
    ids = np.full(8, self.config.num_pages, np.int32)
    ids[: len(pages)] = pages[:8]
    return self.rng.permutation(ids)

  def step(self):
    rng, s, n = self.rng, self.config.num_rows, self.config.num_pages
    lengths, pool = self.ledger.tables.lengths, self.ledger.pool
    more = rng.integers(0, 6, s).astype(np.int32) * (rng.random(s) < 0.5)
    match rng.integers(12):
      case 0 | 1:
        self.ask("extend", more)
      case 2:
        self.replay(rng.integers(0, 2, (3, s)).astype(np.int32))
      case 3:
        few = rng.random(s) < 0.4
        self.ask("free", few & (lengths > 0) if rng.random() < 0.8 else few)
      case 4:
        pages = np.flatnonzero(pool.refcount > 0) if rng.random() < 0.8 else np.arange(n)
        self.ask("hold", self.ids(rng.permutation(pages)[: rng.integers(9)]))
      case 5 | 6:
        pages = np.repeat(np.arange(n), pool.holds) if rng.random() < 0.8 else np.arange(n)
        self.ask("drop", self.ids(rng.permutation(pages)[: rng.integers(9)]))
      case 7:
        self.ask("trim", rng.integers(0, lengths + 1).astype(np.int32))
      case 8:
        starts = rng.integers(0, lengths + 1).astype(np.int32)
        self.ask("slide", np.where(rng.random(s) < 0.3, starts, 0).astype(np.int32))
      case 9:
        source, target = rng.permutation(s)[:2].astype(np.int32)
        pair = [np.array([x, s], np.int32) for x in (source, target, lengths[source])]
        self.ask("fork", *pair)
      case 10:
        pages = np.flatnonzero(pool.holds if rng.random() < 0.8 else pool.refcount)
        self.ask("adopt", *self.beginnings(rng.permutation(pages)))
      case 11:  # a row that others share, and what shares it
        self.ask("hold", self.ids(self.ledger.tables.block_tables[rng.integers(s), :3]))

  def beginnings(self, pages):
    """Rows, mostly empty ones, that start on `pages`."""
    rng, s, size = self.rng, self.config.num_rows, self.config.page_size
    rows, lengths, starts = np.full((3, 3), [[s], [0], [0]], np.int32)
    table = np.full((3, self.config.pages_per_row), self.config.num_pages, np.int32)
    empty = np.flatnonzero(self.ledger.tables.lengths == 0)
    chosen = rng.permutation(empty if rng.random() < 0.9 else s)[:2]
    for n, row in enumerate(chosen):
      count = rng.integers(min(len(pages), self.config.pages_per_row) + 1)
      rows[n], table[n, :count] = row, pages[:count]
      lengths[n] = max(0, count * size - rng.integers(size) * self.config.copy_on_write)
      if count and rng.random() < 0.3:  # it has slid, and begins on a later page
        starts[n] = rng.integers(lengths[n] + 1)
        kept = -(-lengths[n] // size) - starts[n] // size
        table[n] = np.where(
          np.arange(self.config.pages_per_row) < kept, table[n], self.config.num_pages
        )
    return rows, table, lengths, starts


@pytest.mark.parametrize("num_pages", [7, 65])
@pytest.mark.parametrize("copy_on_write", [True, False])
def test_a_walk_goes_the_same_way(num_pages, copy_on_write):
  walk = Walk(num_pages, ledger_of(num_pages=num_pages, copy_on_write=copy_on_write))
  for _ in range(300):
    walk.step()
  for verb in ("extend", "replay", "free", "hold", "drop", "adopt"):
    assert walk.known[verb, True] > 5
    assert walk.known[verb, False] > 0 or num_pages > 7
  assert (walk.known["copies"] > 0) == copy_on_write
  assert not any(walk.known[verb, True] for verb in ("trim", "slide", "fork"))


def test_what_is_refused_is_left_to_the_compiled_verb():
  ledger = on_host(jitted.ledger.init(ledger_of(num_pages=3)))
  for asked in ([13, 0, 0, 0, 0], [-1, 0, 0, 0, 0], [MANY, 1, 0, 0, 0], [21, 0, 0, 0, 0]):
    assert twin.apply(ledger, "extend", (np.array(asked, np.int32),)) is None
  asked = np.zeros((3, 5), np.int32)
  asked[:, 0] = MANY  # in sum it would overflow
  assert twin.replay(ledger, paged_jax.Log(((asked,),), ("extend",))) is None
  assert twin.apply(ledger, "free", (np.array([True] + [False] * 4),)) is None
  for verb in ("hold", "drop"):
    assert twin.apply(ledger, verb, (np.array([0, 3], np.int32),)) is None


def test_of_several_sharers_all_but_the_last_copy_at_whatever_step():
  walk = Walk(0, ledger_of(num_pages=16))
  walk.ask("extend", np.array([6, 0, 0, 0, 0], np.int32))
  walk.ask("fork", *np.array([[0, 0, 0], [1, 2, 3], [6, 6, 6]], np.int32))
  walk.replay(np.array([[0, 1, 1, 0, 0], [0, 0, 2, 0, 2], [1, 1, 1, 0, 0]], np.int32))
  walk.replay(np.array([[0, 0, 0, 9, 0]], np.int32))
  assert walk.known == {("replay", True): 2, ("extend", True): 1, ("fork", False): 1, "copies": 0}
  assert walk.ledger.pool.refcount.max() == 4  # the whole page that they all share
