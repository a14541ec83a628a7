"""The prefix index alone: random histories against plain Python, and examples by hand."""

import contextlib
import dataclasses
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from managed import Clock

from paged_jax.host import eviction
from paged_jax.host.holds import Held
from paged_jax.host.prefix import PrefixIndex, encoded
from paged_jax.host.reclaim import Evictable

LOGITS = "logits"
NUMBERS = itertools.count()


def nobody(held):
  return False


def always(held):
  return True


def last_page(node):
  """The last page of a node that is on the device, or None."""
  return next((each for each in reversed(node.held) if each.page is not None), None)


class Shelf:
  """A prefix index, what may leave it, and what a manager does between the two."""

  def __init__(self, page_size=4, *, policy=eviction.LRU, **options):
    self.index = PrefixIndex(page_size, **(dict(min_length=1, clock=Clock()) | options))
    self.evictable = Evictable(self.index, policy)
    self.known = set()

  def __getattr__(self, name):
    return getattr(self.index, name)

  def store(self, namespace, tokens, held, *, busy=nobody, **fields):
    evicted = []
    if self.index.full(namespace, tokens):
      evicted = self.evict_entry(busy)
      if evicted is None:
        return None

    def keep(first):
      self.known.update(held(first))
      return held(first)

    released = self.index.store(namespace, tokens, keep, **fields)
    return None if released is None else [x for x in evicted + released if not x.kept]

  def evict_entry(self, busy):
    for each in self.known:
      self.evictable.set_busy(each, busy(each))
    node = self.evictable.next_entry()
    return None if node is None else self.index.retire(node)

  def next_leaf(self, ready=always):
    """The node that gives up its last page next, if that page is `ready`."""
    with self.guarding(x for x in self.known if x.page is not None and not ready(x)):
      return self.evictable.next_leaf()

  def reclaimable(self, staying=()):
    """Device pages of the index that could leave."""
    with self.guarding(staying):
      self.evictable.settle()
      kinds = {each: each.kind for each in self.known}
      assert self.evictable.available(0) == sum(kind == 1 for kind in kinds.values())
    return {each for each, kind in kinds.items() if kind == 1}

  @contextlib.contextmanager
  def guarding(self, held):
    held = list(held)
    for each in self.known:
      self.evictable.set_busy(each, False)
    self.evictable.guard(held)
    yield
    self.evictable.guard(held, -1)

  def audit(self):
    return self.evictable.audit(self.known, {each for each in self.known if each.busy})

  def moved(self, held):
    for each in held:
      self.evictable.changed(each)


def index(page_size=4, **options):
  return Shelf(page_size, **options)


def fresh(count):
  return [Held(page=next(NUMBERS)) for _ in range(count)]


def on(held):
  """A sequence's pages, as the index asks for them."""
  return lambda first: held[first:]


def store(index, tokens, *, namespace=None, held=None, busy=nobody, **fields):
  """Stores `tokens` on pages of their own; returns those, or None if it was not stored."""
  held = fresh(-(-len(tokens) // index.page_size)) if held is None else held
  released = index.store(namespace, encoded(tokens), on(held), busy=busy, **fields)
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
    if not self.mortal:  # the dead are reported later, by `expire`
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
    self.index.moved(pages)

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

    def passes(node, page):
      """Whether the page would only pass to a pinned sequence above."""
      above = [node.parent]
      while above[-1].parent is not None:
        above.append(above[-1].parent)
      pinned = [each for each in above if each.entry is not None and each.entry.pinned]
      return any(self.index._pages(each, each.end)[-1] is page for each in pinned)

    def free(node):
      after = [x for child in node.children.values() for each in below(child) for x in each.held]
      pinned = any(each.entry is not None and each.entry.pinned for each in below(node))
      page = last_page(node)
      alone = all(each.page is None for each in after)
      return not pinned and page and ready(page) and alone and not passes(node, page)

    return [node for node in self.index.nodes() if node.parent is not None and free(node)]

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
    released = self.index.store(key[0], encoded(tokens), on(held), busy=self.used, **fields)
    assert (released is None) == refused
    if not refused:
      self.tick += 1
      self.retire(victim)
      self.known |= {(key[0], tokens[: n + 1]) for n in range(len(tokens))}
      expires = math.inf if fields["ttl"] is None else self.clock.now + fields["ttl"]
      first = self.sequences[key].stored if key in self.sequences else self.tick
      logits = fields["last_logits"]
      if logits is None and key in self.sequences:
        logits = self.sequences[key].last_logits
      self.sequences[key] = Sequence(logits, fields["pinned"], expires, first, self.tick)
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
    node = self.index.next_leaf(ready)
    assert (node is None) == (not choices)
    return [] if node is None else self.forget_last(node, choices, ready)

  def forget_last(self, node, choices, ready):
    assert node in choices
    rank = getattr(node.use, self.rank)
    assert rank == min(getattr(each.use, self.rank) for each in choices)
    root = node
    while root.parent is not None:
      root = root.parent
    name = next(name for name, each in self.index._roots.items() if each is root)
    size, tokens = self.index.page_size, path(node)
    last = [i for i, each in enumerate(node.held) if each.page is not None]
    most = sum(1 for _ in itertools.takewhile(lambda i: ready(node.held[i]), reversed(last)))
    count = self.rng.randint(1, most)
    cut = max(node.start, (node.start // size + last[-count]) * size)
    released = self.index.forget_last(node, count)
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
    assert self.index.audit() == 0
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
    """What is said to be reclaimable is exactly what leaves; unpinned and unused, everything does."""
    if not self.mortal:
      self.drain({x for _, pages in self.rows for x in pages if x.page is not None})
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

  def drain(self, staying=frozenset()):
    """As many pages leave as were said to be reclaimable; if two branches share some, or more."""

    def ready(held):
      return held not in staying

    exact = all(each.indexed < 2 for each in self.written)
    promised = len(self.index.reclaimable(staying))
    gone = set()
    while (node := self.index.next_leaf(ready)) is not None:
      gone |= {x for x in self.forget_last(node, self.frontier(ready), ready) if x.page is not None}
    assert not self.frontier(ready)
    assert len(gone) == promised if exact else len(gone) >= promised


SETTINGS = settings(
  max_examples=100,
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
  num_steps=st.sampled_from([10, 40, 80]),
)
def test_a_history_finds_exactly_what_is_stored_and_not_evicted(
  seed, page_size, rank, max_entries, num_steps
):
  run(History(seed, page_size, rank, max_entries, mortal=False), num_steps)


@SETTINGS
@given(
  seed=st.integers(0, 2**32),
  page_size=st.integers(1, 4),
  num_steps=st.sampled_from([10, 40, 80]),
)
def test_a_history_finds_exactly_what_has_not_outlived_its_time(seed, page_size, num_steps):
  run(History(seed, page_size, "last", 100, mortal=True), num_steps)


# Lookup


def test_a_match_ends_inside_a_page_inside_an_edge_and_at_their_ends():
  shelf = index()
  pages = store(shelf, range(10), last_logits=LOGITS)
  for count, num_pages in [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (10, 3)]:
    assert peek(shelf, [*range(count), 99]) == (count, None, pages[:num_pages])
    assert find(shelf, [*range(count), 99]) == (count, None, pages[:num_pages])
  assert find(shelf, range(10)) == (10, LOGITS, pages)
  check_tree(shelf)


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 100])
def test_the_longest_match_among_branches_wins(page_size):
  shelf = index(page_size)
  prompts = [[1], [1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7], [2]]
  for prompt in prompts:
    store(shelf, prompt)
    check_tree(shelf)
  assert length(shelf, [1, 2, 3, 5, 9]) == 4
  assert length(shelf, [1, 2, 3, 9]) == 3
  assert length(shelf, [1, 2, 7, 7]) == 3
  assert length(shelf, [2, 1]) == 1
  assert length(shelf, [3, 1, 2]) == 0
  assert (shelf.num_entries, shelf.num_tokens) == (5, 8)


def test_an_empty_query_and_an_empty_index_match_nothing():
  shelf = index()
  assert find(shelf, []) == find(shelf, [1]) == peek(shelf, [1], "b") == (0, None, [])
  store(shelf, [1, 2])
  assert find(shelf, []) == (0, None, [])
  assert not shelf.pin(None, encoded([]), True)
  assert shelf.evict_entry(nobody) is not None
  assert shelf.evict_entry(nobody) is None
  assert shelf.next_leaf() is None


def test_logits_come_only_if_the_match_is_the_whole_query_and_that_was_stored():
  shelf = index()
  store(shelf, [1, 2, 3, 4, 5], last_logits=LOGITS)
  assert find(shelf, [1, 2, 3, 4, 5]).last_logits == LOGITS
  assert find(shelf, [1, 2, 3, 4, 5, 6]).last_logits is None
  assert find(shelf, [1, 2, 3]).last_logits is None
  assert find(shelf, [1, 2, 3, 4, 6]).last_logits is None
  store(shelf, [1, 2, 3])
  assert find(shelf, [1, 2, 3]).last_logits is None
  assert find(shelf, [1, 2, 3, 4, 5]).last_logits == LOGITS


def test_a_peek_leaves_no_trace():
  shelf = index()
  store(shelf, range(10))
  store(shelf, [*range(6), 9])
  before = [(id(node), dataclasses.replace(node.use)) for node in shelf.nodes()]
  for count in range(11):
    peek(shelf, range(count))
  peek(shelf, [1], "b")
  assert [(id(node), node.use) for node in shelf.nodes()] == before


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("cut", range(1, 8))
def test_a_prompt_and_its_beginning_can_come_in_either_order(page_size, cut):
  for first, second in [(cut, 8), (8, cut)]:
    shelf = index(page_size)
    store(shelf, range(first), last_logits=first)
    store(shelf, range(second), last_logits=second)
    check_tree(shelf)
    assert (shelf.num_entries, shelf.num_tokens) == (2, 8)
    for count in range(1, 9):
      logits = count if count in (first, second) else None
      assert find(shelf, range(count))[:2] == (count, logits)
      check_tree(shelf)


def test_a_page_that_two_branches_share_is_one_page():
  shelf = index()
  pages = store(shelf, range(8))
  other = store(shelf, [*range(8), 20], held=[*pages, *fresh(1)])
  store(shelf, [*range(8), 30], held=[*pages, *fresh(1)])
  assert [each.indexed for each in pages] == [1, 1] and other[2].indexed == 1
  assert find(shelf, [*range(8), 20]).held == other


def test_a_longer_branch_makes_a_partial_page_superfluous():
  shelf = index()
  short = store(shelf, range(6))
  more = fresh(3)
  released = shelf.store(None, encoded(range(9)), on(more), busy=nobody)
  assert released == [short[1]]
  assert find(shelf, range(6)).held == [short[0], more[1]]
  assert find(shelf, range(9)).held == [short[0], more[1], more[2]]


class Slow(bytes):
  """Keys of which all hashes are equal."""

  def __hash__(self):
    return 1

  def __eq__(self, other):
    return bytes.__eq__(self, other)

  def __getitem__(self, places):
    return Slow(bytes.__getitem__(self, places))


def test_tokens_decide_where_all_hashes_are_equal():
  shelf, prompts = index(2), list(itertools.product(range(3), repeat=3))
  pages = {}
  for prompt in prompts:
    held = fresh(2)
    assert shelf.store(None, Slow(encoded(prompt)), on(held), last_logits=prompt, busy=nobody) == []
    pages[prompt] = held[1]
  assert all(isinstance(key, Slow) for node in shelf.nodes() for key in node.children)
  for prompt in prompts:
    match = shelf.find(None, Slow(encoded(prompt)))
    assert match.last_logits == prompt and match.held[1] is pages[prompt]
  assert shelf.find(None, Slow(encoded([0, 3, 0]))).length == 1


def test_namespaces_never_mix():
  names = [None, "", "a", b"a", ("a",), (1, 2), encoded([1, 2]), "None", -1, -2]  # hashes of -1, -2
  shelf = index()
  pages = {name: store(shelf, [1, 2], namespace=name, last_logits=name) for name in names}
  for name in names:
    assert find(shelf, [1, 2], name) == (2, name, pages[name])
  assert find(shelf, [1, 2], "b").length == find(shelf, [1, 2], 1).length == 0
  assert shelf.num_tokens == 2 * len(names)
  shelf.pin("a", encoded([1, 2]), True)
  for _ in names[1:]:
    shelf.evict_entry(nobody)
  assert [name for name in names if length(shelf, [1, 2], name)] == ["a"]


INVALID = [
  [-1], [3, -7], [1.5], [1.0], [[1, 2]], [2**31], [2**32], [2**70], ["1"], "12", "", None, 5,
  [True], [1, False], b"abc", b"abcd", b"", bytearray(b"abcd"), [None],
  np.array([-1]), np.array([1.0]), np.array([[1]]), np.array(3), np.array([2**31]),
  np.array([2**32 + 1]), np.array([2**31], np.uint32), np.array([2**63], np.uint64),
  np.array([True]), np.array(["a"]), np.array([1], object), np.zeros((0, 2), np.int32),
]  # fmt: skip


@pytest.mark.parametrize("tokens", INVALID, ids=lambda tokens: repr(tokens)[:30])
def test_what_is_no_sequence_of_ids_is_named_and_refused(tokens):
  with pytest.raises(ValueError, match="tokens") as caught:
    encoded(tokens)
  assert repr(tokens)[:20] in str(caught.value)


def test_a_refusal_of_a_long_sequence_is_short():
  with pytest.raises(ValueError) as caught:
    encoded([-1] * 10_000)
  assert len(str(caught.value)) < 200


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", ">i4", "u4", "i8", "u8"])
def test_any_kind_of_integers_gives_the_same_bytes(dtype):
  assert encoded(np.array([0, 1, 127], dtype)) == encoded([0, 1, 127]) == encoded((0, 1, 127))
  assert encoded([np.int64(5), 2**31 - 1]) == encoded(np.array([5, 2**31 - 1]))
  assert encoded(np.arange(6)[::2]) == encoded(range(0, 6, 2)) == encoded([0, 2, 4])
  assert encoded([]) == encoded(np.array([])) == b""


# Storing


def test_storing_again_replaces_logits_and_pin_and_keeps_the_pages():
  shelf = index()
  pages = store(shelf, range(6), last_logits=1, pinned=True)
  assert shelf.num_pinned == 1
  store(shelf, range(6), last_logits=2)
  assert find(shelf, range(6)) == (6, 2, pages)
  assert (shelf.num_entries, shelf.num_pinned, shelf.num_tokens) == (1, 0, 6)
  store(shelf, range(6))
  assert find(shelf, range(6)).last_logits == 2


def test_what_is_too_short_is_not_stored():
  shelf = index(min_length=3)
  assert store(shelf, [1, 2]) is None and store(shelf, []) is None
  assert store(shelf, [1, 2, 3]) is not None
  assert store(index(min_length=0), []) is None
  assert store(index(), [5]) is not None
  assert list(shelf.find(None, encoded([1, 2]))[:2]) == [2, None]


def test_capacity_zero_stores_nothing():
  shelf = index(max_entries=0)
  assert store(shelf, range(9)) is None
  assert (shelf.num_entries, shelf.num_tokens, length(shelf, range(9))) == (0, 0, 0)


def test_capacity_two_touch_the_first_and_the_third_evicts_the_second():
  shelf = index(max_entries=2)
  store(shelf, [1] * 5)
  second = store(shelf, [2] * 5)
  find(shelf, [1] * 5)
  assert shelf.store(None, encoded([3] * 5), on(fresh(2)), busy=nobody) == second
  assert [length(shelf, [token] * 5) for token in (1, 2, 3)] == [5, 0, 5]
  assert shelf.num_entries == 2


def test_a_prompt_that_ends_elsewhere_on_the_same_edge_counts_as_another_entry():
  shelf = index(max_entries=1)
  store(shelf, [1, 2, 3, 4])
  store(shelf, [1, 2, 3, 9])
  assert shelf.num_entries == 1
  assert [length(shelf, [1, 2, 3, token]) for token in (4, 9)] == [3, 4]
  assert not shelf.pin(None, encoded([1, 2, 3, 4]), True)


def test_only_a_stored_sequence_can_be_pinned():
  shelf = index()
  store(shelf, [1, 2, 3, 4])
  for tokens in ([1, 2, 3, 9], [1, 2, 3], [9, 9, 9, 9], [1, 2, 3, 4, 5], []):
    assert not shelf.pin(None, encoded(tokens), True)
  assert not shelf.pin("b", encoded([1, 2, 3, 4]), True)
  assert shelf.num_pinned == 0
  assert shelf.pin(None, encoded([1, 2, 3, 4]), True)
  assert shelf.num_pinned == 1


def test_entries_in_use_or_pinned_are_not_evicted():
  shelf = index(max_entries=2)
  used = store(shelf, [1] * 5)
  store(shelf, [2] * 5, pinned=True)
  assert store(shelf, [3] * 5, busy=lambda held: held in used) is None
  assert [length(shelf, [token] * 5) for token in (1, 2, 3)] == [5, 5, 0]
  assert shelf.evict_entry(lambda held: held in used) is None
  assert store(shelf, [3] * 5) is not None
  assert [length(shelf, [token] * 5) for token in (1, 2, 3)] == [0, 5, 5]
  shelf.pin(None, encoded([2] * 5), False)
  store(shelf, [4] * 5, busy=nobody)
  assert [length(shelf, [token] * 5) for token in (2, 3, 4)] == [0, 5, 5]


def test_what_an_eviction_frees_and_the_same_call_stores_again_is_not_reported_as_gone():
  shelf = index(max_entries=1)
  pages = store(shelf, range(4))
  released = shelf.store(None, encoded(range(8)), on([*pages, *fresh(1)]), busy=nobody)
  assert released == [] and pages[0].indexed == 1


# Order


ORDERS = {
  "lru": (eviction.LRU, [1, 3, 4, 2]),
  "fifo": (eviction.FIFO, [1, 2, 3, 4]),
  "clock": (eviction.CLOCK, [1, 3, 4, 2]),
  "longest": (eviction.Policy("longest", lambda use: -use.num_tokens), [4, 3, 2, 1]),
  "rarest": (eviction.Policy("rarest", lambda use: use.hits), [1, 3, 4, 2]),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("whole", [True, False], ids=["entries", "pages"])
def test_the_policy_says_who_goes_first(name, whole):
  policy, order = ORDERS[name]
  shelf, gone = index(policy=policy), []
  for token in (1, 2, 3, 4):
    store(shelf, [token] * token)
  find(shelf, [2, 2])
  while shelf.num_entries:
    if whole:
      shelf.evict_entry(nobody)
    else:
      shelf.forget_last(shelf.next_leaf())
    left = [token for token in (1, 2, 3, 4) if length(shelf, [token])]
    gone += [token for token in (1, 2, 3, 4) if token not in [*left, *gone]]
  assert gone == order


def test_the_clock_gives_everyone_one_more_chance_and_then_takes_the_first():
  shelf = index(policy=eviction.CLOCK)
  for token in (1, 2, 3):
    store(shelf, [token])
    find(shelf, [token])
  shelf.evict_entry(nobody)
  assert [length(shelf, [token]) for token in (1, 2, 3)] == [0, 1, 1]
  find(shelf, [2])
  shelf.evict_entry(nobody)
  assert [length(shelf, [token]) for token in (2, 3)] == [1, 0]


# Giving up pages


def test_tails_go_before_what_they_hang_on():
  shelf = index()
  pages = store(shelf, range(12))
  branch = store(shelf, [*range(8), 50], held=[*pages[:2], *fresh(1)])
  find(shelf, range(12))
  order = []
  while (node := shelf.next_leaf()) is not None:
    order += shelf.forget_last(node)
    check_tree(shelf)
  assert order == [branch[2], pages[2], pages[1], pages[0]]
  assert shelf.num_entries == shelf.num_tokens == 0


def test_a_page_with_the_last_tokens_of_a_parent_passes_to_it():
  shelf = index()
  pages = store(shelf, range(6), last_logits=LOGITS)
  more = [pages[0], *fresh(2)]
  shelf.store(None, encoded(range(12)), on(more), busy=nobody)
  assert shelf.forget_last(shelf.next_leaf()) == [more[2]]
  assert shelf.forget_last(shelf.next_leaf()) == []
  assert find(shelf, range(12)) == (6, None, more[:2])
  assert find(shelf, range(6)).last_logits == LOGITS
  assert shelf.forget_last(shelf.next_leaf()) == [more[1]]
  assert find(shelf, range(6)) == (4, None, pages[:1])


def test_an_evicted_sequence_leaves_what_others_go_through():
  shelf = index()
  pages = store(shelf, range(6))
  more = [pages[0], *fresh(2)]
  shelf.store(None, encoded(range(9)), on(more), busy=nobody)
  assert shelf.evict_entry(nobody) == []
  assert find(shelf, range(9)).held == more
  assert set(shelf.evict_entry(nobody)) == set(more)
  assert list(shelf.find(None, encoded(range(9)))) == [0, None, []]


def test_nothing_above_a_pinned_sequence_leaves():
  shelf = index()
  store(shelf, range(4))
  store(shelf, range(8), pinned=True)
  branch = store(shelf, [*range(4), 9])
  assert shelf.reclaimable() == {branch[1]}
  assert shelf.forget_last(shelf.next_leaf()) == [branch[1]]
  assert shelf.next_leaf() is None and shelf.reclaimable() == set()


def test_a_page_that_passes_to_a_pinned_parent_is_not_reclaimable():
  shelf = index()
  store(shelf, range(6), pinned=True)
  store(shelf, range(8))
  assert shelf.reclaimable() == set()


def test_a_page_that_a_pinned_branch_keeps_too_is_not_reclaimable():
  shelf = index()
  pages = store(shelf, range(4))
  store(shelf, range(4), namespace="b", held=pages, pinned=True)
  assert shelf.reclaimable() == set()


def moved(shelf, pages, *, to_host=True):
  for each in pages:
    each.page, each.image = (None, object()) if to_host else (next(NUMBERS), None)
  shelf.moved(pages)


def test_pages_in_host_memory_are_found_but_give_up_nothing():
  shelf = index()
  pages = store(shelf, range(12))
  moved(shelf, pages[2:])
  assert find(shelf, range(12)).held == pages
  assert shelf.reclaimable() == set(pages[:2])
  assert set(shelf.forget_last(shelf.next_leaf())) == set(pages[1:])
  moved(shelf, pages[:1])
  assert shelf.next_leaf() is None
  moved(shelf, pages[:1], to_host=False)
  assert shelf.forget_last(shelf.next_leaf()) == pages[:1]


def test_a_lookup_that_cuts_an_edge_leaves_the_upper_part_evictable():
  shelf = index()
  pages = store(shelf, range(8))
  moved(shelf, pages[1:])
  find(shelf, range(4))
  assert shelf.reclaimable() == {pages[0]}
  assert last_page(shelf.next_leaf()) is pages[0]


def test_a_page_is_evictable_once_all_branches_below_it_are_in_host_memory_or_gone():
  shelf = index()
  trunk = store(shelf, range(4))
  first = store(shelf, [*range(4), 1], held=[*trunk, *fresh(1)])
  second = store(shelf, [*range(4), 2], held=[*trunk, *fresh(1)])
  moved(shelf, first[1:])
  assert shelf.forget_last(shelf.next_leaf()) == second[1:]
  assert shelf.reclaimable() == set(trunk)
  assert last_page(shelf.next_leaf()) is trunk[0]


def test_a_branch_on_the_device_keeps_what_it_hangs_on_even_below_one_in_host_memory():
  shelf = index()
  pages = store(shelf, range(12))
  find(shelf, range(4))
  find(shelf, range(8))
  moved(shelf, pages[1:2])  # another namespace, where it comes last, may have moved it
  assert shelf.next_leaf(lambda held: held is pages[0]) is None
  assert last_page(shelf.next_leaf()) is pages[2]


def test_clear_forgets_everything_pinned_or_not_and_the_index_goes_on():
  shelf = index()
  pages = store(shelf, range(6), pinned=True) + store(shelf, range(4), namespace="b", ttl=5)
  assert set(shelf.clear()) == set(pages) and not any(each.indexed for each in pages)
  assert (shelf.num_entries, shelf.num_tokens, shelf.num_pinned) == (0, 0, 0)
  assert not list(shelf.nodes()) and shelf.clear() == [] and shelf.next_leaf() is None
  store(shelf, range(6))
  assert length(shelf, range(9)) == 6


# Lifetimes


def test_a_sequence_is_gone_at_its_time_before_and_after_its_removal():
  clock = Clock()
  shelf = index(clock=clock)
  pages = store(shelf, range(6), last_logits=LOGITS, ttl=10)
  clock.now = 9.9
  assert shelf.expire() == [] and find(shelf, range(6)) == (6, LOGITS, pages)
  clock.now = 10
  assert find(shelf, range(6)) == peek(shelf, range(3)) == (0, None, [])
  assert not shelf.pin(None, encoded(range(6)), True)
  assert shelf.expire() == pages and shelf.expire() == []
  assert (shelf.num_entries, shelf.num_tokens, list(shelf.nodes())) == (0, 0, [])


def test_what_a_living_sequence_goes_through_lives():
  clock = Clock()
  shelf = index(clock=clock)
  store(shelf, range(6), last_logits=LOGITS, ttl=1)
  more = store(shelf, range(9))
  clock.now = 1
  shelf.expire()
  assert find(shelf, range(6))[:2] == (6, None) and find(shelf, range(9)).held[1:] == more[1:]


def test_a_sequence_that_outlived_its_time_is_no_entry_though_its_tokens_live_on():
  clock = Clock()
  shelf = index(clock=clock)
  store(shelf, range(6), ttl=1)
  store(shelf, range(9))
  clock.now = 1
  shelf.expire()
  assert shelf.num_entries == 1


def test_the_dead_do_not_push_out_the_living():
  clock = Clock()
  shelf = index(clock=clock, max_entries=2)
  store(shelf, [1] * 4)
  store(shelf, [2] * 4, ttl=1)
  clock.now = 1
  store(shelf, [3] * 4)
  assert [length(shelf, [token] * 4) for token in (1, 2, 3)] == [4, 0, 4]


def test_storing_again_replaces_the_lifetime_of_the_whole_sequence():
  clock = Clock()
  shelf = index(clock=clock)
  store(shelf, range(8))
  find(shelf, range(3))  # cuts the edge
  store(shelf, range(8), ttl=1)
  clock.now = 1
  assert length(shelf, range(8)) == 0
  shelf.expire()
  store(shelf, range(8), ttl=1)
  store(shelf, range(8), ttl=5)
  clock.now = 3
  shelf.expire()
  assert length(shelf, range(8)) == 8


def test_a_parent_keeps_its_last_tokens_when_branches_below_expire():
  clock = Clock()
  shelf = index(clock=clock)
  store(shelf, range(5))
  store(shelf, range(6), ttl=1)
  more = store(shelf, range(9), ttl=1)
  clock.now = 1
  assert shelf.expire() == [more[2]]
  assert find(shelf, range(9)).held[1] is more[1]
  check_tree(shelf)


def test_a_branch_over_a_dead_one_leaves_the_pages_above_alone():
  clock = Clock()
  shelf = index(clock=clock)
  pages = store(shelf, range(5))
  store(shelf, range(6), ttl=1)
  store(shelf, range(9), ttl=1)
  clock.now = 1
  more = [pages[0], *fresh(2)]
  store(shelf, range(9), held=more)
  assert find(shelf, range(9)) == (9, None, more)
  check_tree(shelf)


def test_a_pinned_sequence_stays_past_its_time_until_it_is_unpinned():
  clock = Clock()
  shelf = index(clock=clock)
  pages = store(shelf, range(4), ttl=1, pinned=True)
  store(shelf, range(8), ttl=1)
  clock.now = 1
  shelf.expire()
  assert find(shelf, range(8)) == (4, None, pages)
  clock.now = 2
  assert shelf.pin(None, encoded(range(4)), False)
  assert find(shelf, range(8)).length == 0
  assert shelf.expire() == pages and shelf.num_tokens == 0


def test_nothing_dead_remains_when_its_longer_sequence_was_evicted_before():
  clock = Clock()
  shelf = index(clock=clock, policy=eviction.Policy("longest", lambda use: -use.num_tokens))
  store(shelf, range(4), ttl=5)
  store(shelf, range(8), ttl=10)
  shelf.evict_entry(nobody)
  assert length(shelf, range(8)) == 4
  clock.now = 10
  shelf.expire()
  assert (shelf.num_entries, shelf.num_tokens) == (0, 0)


# Cost


class Counted(dict):
  """Children that count how many of them were looked at."""

  looks = 0

  def get(self, key, default=None):
    Counted.looks += 1
    return super().get(key, default)

  def __getitem__(self, key):
    Counted.looks += 1
    return super().__getitem__(key)

  def __delitem__(self, key):
    Counted.looks += 1
    super().__delitem__(key)

  def __iter__(self):
    for key in super().__iter__():
      Counted.looks += 1
      yield key

  def values(self):
    for value in super().values():
      Counted.looks += 1
      yield value

  def items(self):
    for item in super().items():
      Counted.looks += 1
      yield item


def looks(num_entries, operation):
  """How many children an operation looks at, among prompts that share 6 tokens."""
  shelf = index(max_entries=num_entries)
  for token in range(num_entries):
    store(shelf, [*range(6), token, token, 5])
  for node in shelf.nodes():
    node.children = Counted(node.children)
  shelf.evictable.settle()
  Counted.looks = 0
  operation(shelf)
  return Counted.looks


COSTS = {
  "a whole prompt": lambda shelf: find(shelf, [*range(6), 7, 7, 5]),
  "half a page below": lambda shelf: find(shelf, [*range(6), 7, 99]),
  "nothing": lambda shelf: find(shelf, [99]),
  "where all branches begin": lambda shelf: find(shelf, range(6)),
  "a peek": lambda shelf: peek(shelf, [*range(6), 7, 7]),
  "a store": lambda shelf: store(shelf, [*range(6), 7, 7, 6]),
  "an eviction": lambda shelf: shelf.evict_entry(nobody),
  "a page": lambda shelf: shelf.forget_last(shelf.next_leaf()),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_cost_does_not_grow_with_the_number_of_entries(name):
  assert 0 < looks(10, COSTS[name]) == looks(1000, COSTS[name])


def test_a_chain_of_two_thousand_pages_is_not_too_deep():
  shelf, pages, tokens = index(2, max_entries=10_000), fresh(2_000), list(range(4_000))
  for count in range(1, 2_001):
    store(shelf, tokens[: 2 * count], held=pages[:count])
  assert find(shelf, tokens).held == pages
  for count in range(1_000):
    assert shelf.forget_last(shelf.next_leaf()) == [pages[-1 - count]]
  assert shelf.evict_entry(nobody) is not None
  assert len(shelf.clear()) == 1_000


def test_a_chain_inside_a_page_may_be_deep():
  shelf = index(4096, max_entries=10_000)
  tokens = list(range(1_500))
  for count in range(1, 1_501):
    store(shelf, tokens[:count])
  assert length(shelf, tokens) == 1_500
  moved(shelf, find(shelf, tokens).held)
  moved(shelf, find(shelf, tokens).held, to_host=False)
  assert len(shelf.forget_last(shelf.next_leaf())) <= 1
