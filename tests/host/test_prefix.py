"""The prefix index alone: random histories against plain Python, and examples by hand."""

import dataclasses
import itertools
import math
import random
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from managed import Clock

from paged_jax.host import eviction
from paged_jax.host.holds import Held
from paged_jax.host.prefix import PrefixIndex, encoded, last_page

LOGITS = "logits"
NUMBERS = itertools.count()


def nobody(held):
  return False


def always(held):
  return True


def index(page_size=4, **options):
  return PrefixIndex(page_size, **(dict(min_length=1, clock=Clock()) | options))


def fresh(count):
  return [Held(page=next(NUMBERS)) for _ in range(count)]


def store(index, tokens, *, namespace=None, held=None, busy=nobody, **fields):
  """Stores `tokens` on pages of their own; returns those, or None if it was not stored."""
  held = fresh(-(-len(tokens) // index.page_size)) if held is None else held
  released = index.store(namespace, encoded(tokens), held, busy=busy, **fields)
  return None if released is None else held


def find(index, tokens, namespace=None):
  return index.find(namespace, encoded(tokens))


def peek(index, tokens, namespace=None):
  return index.peek(namespace, encoded(tokens))


def length(index, tokens, namespace=None):
  return peek(index, tokens, namespace).length


def below(node):
  """A node and all that hangs on it."""
  return [node, *(each for child in node.children.values() for each in below(child))]


def path(node):
  """All tokens from the beginning to the end of a node."""
  tokens = b""
  while node is not None:
    node, tokens = node.parent, node.tokens + tokens
  return tuple(np.frombuffer(tokens, "<i4").tolist())


def check_tree(index):
  """The counts are those of the tree, and a page has every token of it."""
  nodes = list(index.nodes())
  entries = [node.entry for node in nodes if node.entry is not None]
  kept = [each for node in nodes for each in node.held]
  assert index.num_entries == len(entries)
  assert index.num_pinned == sum(each.pinned for each in entries)
  assert index.num_tokens == sum(len(node.tokens) // 4 for node in nodes)
  for each in set(kept):
    assert each.indexed == kept.count(each)
  for node in nodes:
    assert (len(node.tokens) == 0) == (node.parent is None)
    assert node.end == len(path(node))
    for first, child in node.children.items():
      assert child.parent is node and child.tokens[:4] == first
    found = index._pages(node, node.end)
    assert len(found) == -(-node.end // index.page_size)


# Random histories


@dataclasses.dataclass
class Sequence:
  """What is known of a whole stored sequence."""

  last_logits: Any
  pinned: bool
  expires: float
  stored: int
  last: int


class History:
  """Random operations on an index, and what it should know afterwards.

  Rows write tokens to pages as a manager's do: a kept page is copied before it is written.
  A mortal history has lifetimes, and room for everything; the others have neither.
  """

  def __init__(self, seed, page_size, rank, max_entries, mortal):
    self.rng = random.Random(seed)
    policy = {"stored": eviction.FIFO, "last": eviction.LRU}[rank]
    self.rank, self.mortal, self.clock = rank, mortal, Clock()
    self.max_entries = 10**6 if mortal else max_entries
    self.index = index(page_size, max_entries=self.max_entries, policy=policy, clock=self.clock)
    self.written: dict[Held, list[int]] = {}  # the tokens that each page has
    self.rows: list[tuple[list[int], list[Held]]] = []
    self.known: set[tuple] = set()  # (namespace, tokens) of every stored beginning
    self.sequences: dict[tuple, Sequence] = {}
    self.tick = 0
    often = [self.do_start] * 3 + [self.do_store] * 5 + [self.do_write] * 2
    moves = [self.do_move_out, self.do_move_in, self.do_end, self.do_pin, self.do_clear]
    ends = [self.do_wait, self.do_expire] if mortal else [self.do_evict, self.do_reclaim]
    self.operations = often + moves + ends

  def step(self):
    before = {each: each.indexed for each in self.written}
    released = self.rng.choice(self.operations)()
    self.forget_the_dead()
    gone = {each for each, indexed in before.items() if indexed and not each.indexed}
    assert set(released or ()) == gone
    self.check()

  # Tokens, rows and pages

  def query(self):
    stored = self.rng.choice(sorted(self.known, key=repr))[1] if self.known else ()
    start = stored[: self.rng.randrange(10)]
    return start + tuple(self.rng.choices(range(2), k=self.rng.randrange(6)))

  def namespace(self):
    return self.rng.choice([None, None, "b"])

  def used(self, held):
    return any(held in pages for _, pages in self.rows)

  def page(self, tokens):
    held = Held(page=next(NUMBERS))
    self.written[held] = list(tokens)
    return held

  def write(self, row, tokens):
    sequence, pages = row
    for token in tokens:
      if len(sequence) % self.index.page_size == 0:
        pages.append(self.page([]))
      elif pages[-1].indexed:
        pages[-1] = self.page(self.written[pages[-1]][: len(sequence) % self.index.page_size])
      del self.written[pages[-1]][len(sequence) % self.index.page_size :]
      self.written[pages[-1]].append(token)
      sequence.append(token)

  def move(self, pages, *, to_host):
    for each in pages:
      each.page = None if to_host else next(NUMBERS)
      each.image = object() if to_host else None
    self.index.requeue_all(pages)

  def do_start(self):
    query, namespace = self.query(), self.namespace()
    match = self.index.find(namespace, encoded(query))
    self.tick += 1
    self.check_match(match, namespace, query)
    for (name, tokens), sequence in self.sequences.items():
      if name == namespace and query[: len(tokens)] == tokens:
        sequence.last = self.tick
    count = match.length // self.index.page_size
    self.move([each for each in match.held[:count] if each.page is None], to_host=False)
    row = list(query[: count * self.index.page_size]), match.held[:count]
    self.write(row, query[len(row[0]) :])
    self.rows = [*self.rows, row][-3:]

  def do_write(self):
    if self.rows:
      self.write(self.rng.choice(self.rows), self.query()[:3])

  def do_end(self):
    if self.rows:
      self.rows.pop(self.rng.randrange(len(self.rows)))

  def do_move_out(self):
    self.move([x for x in self.tails() if self.rng.random() < 0.7], to_host=True)

  def do_move_in(self):
    """What a match finds comes back, from its beginning on."""
    found = self.index.peek(self.namespace(), encoded(self.query())).held
    self.move([each for each in found if each.page is None], to_host=False)

  def tails(self):
    """The page that each branch would give up next."""
    return {last_page(node) for node in self.frontier(always)}

  def frontier(self, ready):
    """Nodes with a device page that could leave, because nothing after it stays."""

    def free(node):
      after = [x for child in node.children.values() for each in below(child) for x in each.held]
      pinned = any(each.entry is not None and each.entry.pinned for each in below(node))
      page = last_page(node)
      return not pinned and page and ready(page) and all(each.page is None for each in after)

    return [node for node in self.index.nodes() if free(node)]

  # Storing

  def do_store(self):
    row = self.rng.choice(self.rows) if self.rows else ([], [])
    tokens = tuple(row[0][: self.rng.randrange(16)])
    key = self.namespace(), tokens
    fields = dict(
      last_logits=self.rng.choice([None, self.rng.random()]),
      pinned=self.rng.random() < 0.15,
      ttl=self.rng.choice([None, 1, 2, 3, 5]) if self.mortal else None,
    )
    victim = None
    if tokens and key not in self.sequences and len(self.sequences) >= self.max_entries:
      victim = self.victim()
    full = victim is None and len(self.sequences) >= self.max_entries
    refused = not tokens or (full and key not in self.sequences)
    held = row[1][: -(-len(tokens) // self.index.page_size)]
    released = self.index.store(key[0], encoded(tokens), held, busy=self.used, **fields)
    assert (released is None) == refused
    if not refused:
      self.tick += 1
      self.retire(victim)
      self.known |= {(key[0], tokens[: n + 1]) for n in range(len(tokens))}
      expires = math.inf if fields["ttl"] is None else self.clock.now + fields["ttl"]
      first = self.sequences[key].stored if key in self.sequences else self.tick
      self.sequences[key] = Sequence(
        fields["last_logits"], fields["pinned"], expires, first, self.tick
      )
    return released

  def do_pin(self):
    if self.known:
      key = self.rng.choice(sorted(self.known, key=repr))
      pinned = self.rng.random() < 0.4
      assert self.index.pin(key[0], encoded(key[1]), pinned) == (key in self.sequences)
      if key in self.sequences:
        self.sequences[key].pinned = pinned

  # Removing

  def victim(self):
    """The whole sequence that goes next."""

    def idle(key):
      last = self.index.peek(key[0], encoded(key[1])).held[-1]
      return not self.sequences[key].pinned and not self.used(last)

    ranked = sorted(self.sequences, key=lambda key: getattr(self.sequences[key], self.rank))
    return next(filter(idle, ranked), None)

  def retire(self, key):
    """A sequence goes, with its tokens that are in no other."""
    self.sequences.pop(key, None)
    while key and key[1] and key not in self.sequences:
      if any((key[0], (*key[1], token)) in self.known for token in range(2)):
        break
      self.known.discard(key)
      key = key[0], key[1][:-1]

  def do_evict(self):
    victim = self.victim()
    released = self.index.evict_entry(self.used)
    assert (released is None) == (victim is None)
    self.retire(victim)
    return released

  def do_reclaim(self):
    guard = {each for each in self.written if self.rng.random() < 0.1}

    def ready(held):
      return held not in guard

    choices = self.frontier(ready)
    node = self.index.candidate(ready)
    assert (node is None) == (not choices)
    return [] if node is None else self.forget_last(node, choices)

  def forget_last(self, node, choices):
    assert node in choices
    rank = getattr(node.use, self.rank)
    assert rank == min(getattr(each.use, self.rank) for each in choices)
    root = node
    while root.parent is not None:
      root = root.parent
    name = next(name for name, each in self.index._roots.items() if each is root)
    size, tokens = self.index.page_size, path(node)
    cut = max(node.start, (node.start // size + node.held.index(last_page(node))) * size)
    released = self.index.forget_last(node)
    lost = {x for x in self.known if x[0] == name and x[1][: cut + 1] == tokens[: cut + 1]}
    assert lost
    self.known -= lost
    self.sequences = {key: each for key, each in self.sequences.items() if key not in lost}
    return released

  def do_clear(self):
    if self.rng.random() < 0.1:
      self.known, self.sequences = set(), {}
      return self.index.clear()

  # Time

  def do_wait(self):
    self.clock.now += self.rng.choice([0.5, 1, 2])

  def forget_the_dead(self):
    """A pinned sequence lives; any other one until its time is over."""
    if self.mortal:
      now = self.clock.now
      self.sequences = {k: x for k, x in self.sequences.items() if x.pinned or x.expires > now}
      self.known = {(k, t[: n + 1]) for k, t in self.sequences for n in range(len(t))}

  def do_expire(self):
    released = self.index.expire()
    self.forget_the_dead()
    self.check_counts()
    return released

  # Laws

  def check(self):
    check_tree(self.index)
    if not self.mortal:
      self.check_counts()
    kept = [each for node in self.index.nodes() for each in node.held]
    for each in self.written:
      assert each.indexed == kept.count(each)
    for namespace, tokens in [*self.known, (None, ()), ("b", ())]:
      for query in (tokens, (*tokens, 0), (*tokens, 1), (*tokens, 7)):
        self.check_match(self.index.peek(namespace, encoded(query)), namespace, query)

  def check_counts(self):
    assert self.index.num_entries == len(self.sequences)
    assert self.index.num_tokens == len(self.known)
    assert self.index.num_pinned == sum(each.pinned for each in self.sequences.values())

  def check_match(self, match, namespace, query):
    beginnings = [
      n for n in range(len(query) + 1) if n == 0 or (namespace, query[:n]) in self.known
    ]
    assert match.length == max(beginnings)
    whole = self.sequences.get((namespace, query))
    assert match.last_logits == (None if whole is None else whole.last_logits)
    size = self.index.page_size
    assert len(match.held) == -(-match.length // size)
    for i, held in enumerate(match.held):
      wanted = list(query[: match.length][i * size : (i + 1) * size])
      assert self.written[held][: len(wanted)] == wanted

  def end(self):
    """What is said to be reclaimable is exactly what leaves; unpinned, everything does."""
    self.rows = []
    if not self.mortal:
      self.drain()
      for namespace, tokens in self.sequences:
        assert self.index.pin(namespace, encoded(tokens), False)
      self.drain()
      assert not any(each.indexed and each.page is not None for each in self.written)
    self.index.clear()
    assert not any(each.indexed for each in self.written)
    assert self.index.num_entries == self.index.num_tokens == self.index.num_pinned == 0

  def drain(self):
    """As many pages leave as were said to be reclaimable; if two branches share some, or more."""
    exact = all(each.indexed < 2 for each in self.written)
    promised = len(self.index.reclaimable(always))
    gone = set()
    while (node := self.index.candidate(always)) is not None:
      gone |= {x for x in self.forget_last(node, self.frontier(always)) if x.page is not None}
    assert not self.frontier(always)
    assert len(gone) == promised if exact else len(gone) >= promised


SETTINGS = settings(
  max_examples=200,
  deadline=None,
  derandomize=True,
  suppress_health_check=list(HealthCheck),
  phases=[Phase.generate, Phase.shrink],
)


def run(history, num_steps):
  for _ in range(num_steps):
    history.step()
  history.end()


@SETTINGS
@given(
  seed=st.integers(0, 2**32),
  page_size=st.integers(1, 4),
  rank=st.sampled_from(["stored", "last"]),
  max_entries=st.sampled_from([1, 2, 4, 100]),
  num_steps=st.sampled_from([5, 10, 20, 40, 80, 160]),
)
def test_a_history_finds_exactly_what_is_stored_and_not_evicted(
  seed, page_size, rank, max_entries, num_steps
):
  run(History(seed, page_size, rank, max_entries, mortal=False), num_steps)


@SETTINGS
@given(
  seed=st.integers(0, 2**32),
  page_size=st.integers(1, 4),
  num_steps=st.sampled_from([5, 10, 20, 40, 80, 160]),
)
def test_a_history_finds_exactly_what_has_not_outlived_its_time(seed, page_size, num_steps):
  run(History(seed, page_size, "last", 100, mortal=True), num_steps)
