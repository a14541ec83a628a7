"""A manager, what it should hold in plain Python, and random operations on both."""

import contextlib

import numpy as np
import pytest
from story import config

from paged_jax import groups
from paged_jax.host import Manager, ManagerConfig, Request, errors
from paged_jax.testing import replay

SHAPE = (2, 2)
VOCABULARY = 3  # few, so that prompts share beginnings


class Clock:
  """Seconds that pass when told to."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def manager(options=None, caches=None, **fields):
  """A small manager of one cache, or of these `caches`, and prefixes of any length."""
  chosen = dict(min_prefix_length=1, num_host_pages=16) | (options or {})
  clock = chosen.pop("clock", Clock())
  configs = config(**fields) if caches is None else caches
  return Manager(configs, ManagerConfig(**chosen), clock=clock)


def fingerprints(tokens):
  """A number below 2,000 per token that depends on all tokens up to it, as keys of a model do."""
  state, out = 7, []
  for token in tokens:
    state = (state * 31 + int(token) + 1) % 1999
    out.append(state + 1)
  return out


def live(manager, handle, start):
  """Group, number of layers and first live token from `start` on, for each group."""
  for group, each in enumerate(groups.each(manager.config)):
    cache = groups.each(manager.cache)[group]
    begin = 0 if each.window is None else int(np.asarray(cache.ledger.tables.starts)[handle.row])
    yield group, each, max(start, begin)


def fill(manager, handle, tokens, start):
  """Writes what a model would for `tokens[start:]`, in all layers of all groups."""
  for group, each, begin in live(manager, handle, start):
    if values := fingerprints(tokens)[begin:]:
      for layer in range(each.num_layers):
        k, *v = replay.keys_and_values(values, layer, SHAPE, each.value_dim)
        manager.write_kv(handle, layer, begin, k, v[0] if v else None, group=group)


def check_bytes(manager, handle, tokens, start=0):
  """The sequence reads back exactly what a model would have written for its tokens."""
  assert handle.num_tokens == len(tokens)
  for group, each, begin in live(manager, handle, start):
    if values := fingerprints(tokens)[begin:]:
      for layer in range(each.num_layers):
        k, v = manager.read_kv(handle, layer, begin, len(values), group=group)
        wanted = replay.keys_and_values(values, layer, SHAPE, each.value_dim, each.dtype)
        np.testing.assert_array_equal(k, wanted[0])
        np.testing.assert_array_equal(v, wanted[-1][..., : each.value_dim])


FIVE = [1, 2, 3, 4, 5]
SIX = [1, 2, 3, 4, 5, 6]


def begin(m, tokens, name="a", **fields):
  """A live sequence, written."""
  handle = m.allocate(Request(name, tokens=tokens, **fields))
  fill(m, handle, tokens, handle.num_cached)
  return handle


def store(m, tokens, name="a", **fields):
  """A prefix that nobody uses."""
  stored = m.store_prefix(begin(m, tokens, name), **fields)
  m.deallocate(name)
  return stored


def grow(m, handle, tokens):
  """The sequence holds all of `tokens`, those that it lacked newly written."""
  start = handle.num_tokens
  m.extend(handle, len(tokens) - start)
  fill(m, handle, tokens, start)


@contextlib.contextmanager
def refused(m, error, message=None):
  before = [each._replace(refusals=0) for each in each_stats(m)]
  with pytest.raises(error, match=message):
    yield
  assert [each._replace(refusals=0) for each in each_stats(m)] == before
  assert m.audit().clean


def each_stats(m):
  """The numbers of each group."""
  return groups.each(m.stats())


class Story:
  """Random operations. `live` is what must be true: request id -> (handle, its tokens)."""

  def __init__(self, rng, manager, prefix="r"):
    self.rng, self.manager, self.prefix = rng, manager, prefix
    self.live: dict = {}
    self.count = self.refused = 0
    self.operations = [getattr(self, name) for name in dir(self) if name.startswith("do_")]

  def step(self):
    operation = self.operations[self.rng.integers(len(self.operations))]
    try:
      operation()
    except (errors.OutOfPages, errors.OutOfHostPages, errors.OutOfRows, errors.TooLong):
      self.refused += 1

  def some(self, swapped=False):
    """A live request that is, or is not, swapped out; or None."""
    names = [name for name, (handle, _) in self.live.items() if handle.is_swapped == swapped]
    return names[self.rng.integers(len(names))] if names else None

  def new_name(self):
    self.count += 1
    return f"{self.prefix}{self.count}"

  def tokens(self, most=14):
    return self.rng.integers(VOCABULARY, size=self.rng.integers(1, most)).tolist()

  def do_allocate(self):
    name, tokens = self.new_name(), self.tokens()
    fits = self.manager.can_allocate(Request(name, tokens=tokens)) if self.alone else None
    try:
      handle = self.manager.allocate(Request(name, tokens=tokens))
    except errors.CacheError:
      assert fits is not True
      raise
    assert fits is not False
    fill(self.manager, handle, tokens, handle.num_cached)
    self.live[name] = (handle, tokens)
    if handle.last_logits is not None:
      assert handle.last_logits == fingerprints(tokens)[-1]

  alone = True  # nobody else uses the manager

  def do_extend(self):
    if (name := self.some()) is not None:
      handle, tokens = self.live[name]
      more = self.tokens(6)
      self.manager.extend(handle, len(more))
      self.live[name] = (handle, tokens + more)
      fill(self.manager, handle, tokens + more, len(tokens))

  def do_clone(self):
    if (name := self.some()) is not None:
      handle, tokens = self.live[name]
      copy = self.new_name()
      self.live[copy] = (handle.clone(copy), tokens)

  def do_share(self):
    if (name := self.some()) is not None:
      handle, tokens = self.live[name]
      copy, count = self.new_name(), int(self.rng.integers(len(tokens) + 1))
      target = self.manager.allocate(Request(copy))
      self.live[copy] = (target, [])
      if not self.reaches(handle, count):
        return
      self.manager.share_prefix(handle, target, count)
      self.live[copy] = (target, tokens[:count])

  def do_own(self):
    if (name := self.some()) is not None and self.live[name][1]:
      self.manager.cow_copy(self.live[name][0])

  def reaches(self, handle, count):
    """Whether the first `count` tokens can go on alone; if not, `trim` says so."""
    if not handle.begins(count):
      with pytest.raises(errors.UnmappedToken):
        self.manager.trim(handle, count)
      return False
    return True

  def do_trim(self):
    if (name := self.some()) is not None:
      handle, tokens = self.live[name]
      keep = int(self.rng.integers(len(tokens) + 1))
      if self.reaches(handle, keep):
        self.manager.trim(handle, keep)
        self.live[name] = (handle, tokens[:keep])

  def do_store(self):
    if (name := self.some()) is not None:
      handle, tokens = self.live[name]
      count = int(self.rng.integers(len(tokens) + 1))
      logits = fingerprints(tokens)[count - 1] if count else None
      if self.manager.store_prefix(handle, tokens[:count], last_logits=logits):
        assert self.manager.find_prefix(tokens[:count], handle.namespace).length == count

  def do_swap_out(self):
    if (name := self.some()) is not None:
      self.manager.swap_out(self.live[name][0])

  def do_swap_in(self):
    if (name := self.some(swapped=True)) is not None:
      handle, tokens = self.live[name]
      self.manager.swap_in(handle)
      check_bytes(self.manager, handle, tokens)

  def do_deallocate(self):
    if self.live:
      name = list(self.live)[self.rng.integers(len(self.live))]
      self.manager.deallocate(name)
      handle, _ = self.live.pop(name)
      assert not handle.is_valid

  def do_collect(self):
    self.manager.gc(int(self.rng.integers(groups.each(self.manager.config)[0].num_pages)))

  def do_evict(self):
    self.manager.evict_prefixes(1)

  def check(self, *, whole=False):
    """The audit, and the bytes of one sequence or of all."""
    report = self.manager.audit()
    assert report.clean, report
    names = [name for name, (handle, _) in self.live.items() if not handle.is_swapped]
    if names and not whole:
      names = [names[self.rng.integers(len(names))]]
    for name in names:
      check_bytes(self.manager, *self.live[name])

  def end(self):
    """Everything ends; nothing is left."""
    self.check(whole=True)
    for name in list(self.live):
      self.manager.deallocate(name)
    self.live = {}
    self.manager.clear_prefixes()
    for stats in each_stats(self.manager):
      assert stats.free_pages == stats.num_pages and stats.free_host_pages == stats.num_host_pages
      assert stats.pages_taken == stats.pages_released
    self.check()
