"""The prefix index: stored prefixes, found by their tokens, also in the middle of a page.

A radix tree per namespace (Morrison 1968; for KV caches Zheng et al. 2024, "SGLang", section 3).
An edge is a run of tokens. Lookups compare the tokens themselves and no hash, so two prompts are
never confused. A node uses the pages whose last token is on its edge; its first page may begin
above it:

    # page size 4     0 1 2 3 4 5 ┬ 6 7 8      page 1 of the upper branch is its own copy of
    # pages           [a     ][b  │  ][c]      tokens 4 and 5, and so is page 1 of the lower one
    #                             └ 6 9
    #                          [d    ]

Use is noted in ticks, one for each lookup or store. A lifetime is in seconds of the clock.
The tree finds, stores and removes; `reclaim` decides which pages leave it, and when.
"""

import array
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from paged_jax.host.eviction import Use
from paged_jax.host.holds import Held

TOKEN_BYTES = 4


def encoded(tokens: Sequence[int] | np.ndarray) -> bytes:
  """Token ids as bytes, four for each.

  Raises:
    ValueError: `tokens` is not a flat sequence of integers in [0, 2**31).
  """
  try:
    if isinstance(tokens, np.ndarray):
      values = tokens.astype("<i4", casting="same_kind" if tokens.size else "unsafe", copy=False)
      same = tokens.ndim == 1 and (values is tokens or bool((values == tokens).all()))
      data = values.tobytes() if same and tokens.dtype != bool else None
    elif isinstance(tokens, bytes | bytearray):
      data = None
    else:
      data = array.array("I", tokens).tobytes()  # twice as fast as NumPy for a list
      small = np.flatnonzero(np.frombuffer(data, "<u4") < 2)
      if any(isinstance(tokens[i], bool) for i in small.tolist()):
        data = None
  except (TypeError, OverflowError):
    data = None
  if data is None or (data and np.frombuffer(data, "<i4").min() < 0):
    raise ValueError(f"tokens must be a flat sequence of ids in [0, 2**31), got {_short(tokens)}")
  return data


def _short(value) -> str:
  text = repr(value)
  return text if len(text) < 80 else text[:77] + "..."


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
  """A stored prefix; it ends at the end of a node."""

  namespace: Hashable
  last_logits: Any  # what the caller stored with it
  pinned: bool
  expires: float  # time of the clock, seconds


@dataclasses.dataclass(eq=False, slots=True)
class Node:
  """The tokens `start..end` of all stored prefixes that pass through this node."""

  parent: "Node | None" = dataclasses.field(repr=False)
  tokens: bytes  # of its edge, `encoded`
  end: int  # tokens from the root to the end of its edge
  held: list[Held]  # the pages whose last token is on its edge
  use: Use
  entry: Entry | None = None  # of the prefix that ends here, if one was stored
  children: dict[bytes, "Node"] = dataclasses.field(default_factory=dict, repr=False)
  count: Any = None  # for `reclaim`

  @property
  def attached(self) -> bool:
    """Whether the node is in the tree, below a root."""
    key = self.tokens[:TOKEN_BYTES]
    return self.parent is not None and self.parent.children.get(key) is self

  @property
  def start(self) -> int:
    """Tokens above this node."""
    return self.end - len(self.tokens) // TOKEN_BYTES


class Match(NamedTuple):
  """What a lookup found."""

  length: int  # tokens of the query that are stored
  last_logits: Any  # those of the query's last token, if exactly the query was stored with some
  held: list[Held]  # ceil(length / T) pages


class PrefixIndex:
  """Finds the longest stored prefix of a query, with its pages. Not thread-safe.

  Args:
    page_size: Tokens per page, T.
    max_entries: Most stored prefixes; 0 stores nothing.
    min_length: Fewest tokens of a stored prefix.
    clock: Returns seconds, for lifetimes.
    edited: Called as `edited(node, first)` before the node's pages from number `first` on, its
      children or its entry change.
    ended: Called as `ended(namespace, tokens)` when a stored prefix is forgotten, except by `clear`;
      None = nobody asks.
  """

  def __init__(
    self,
    page_size: int,
    *,
    max_entries: int = 100,
    min_length: int = 16,
    clock: Callable[[], float],
    edited: Callable[[Node, int], None] = lambda node, first: None,
    ended: Callable[[Hashable, bytes], None] | None = None,
  ):
    self.page_size, self.max_entries, self.min_length = page_size, max_entries, min_length
    self.edited, self.ended = edited, ended
    self._clock = clock
    self._ticks = itertools.count(1)
    self._empty()

  def _empty(self) -> None:
    self._roots: dict[Hashable, Node] = {}
    self._mortal: list = []  # heap of (expiry, number, node)
    self._hollow = False  # whether a root has lost all children
    self._expired: list[Held] = []  # pages of expired prefixes, until `expire` returns them
    self.num_entries = self.num_pinned = 0  # stored prefixes, and how many of them are pinned
    self.num_tokens = 0  # tokens of all edges

  def clear(self) -> list[Held]:
    """Forgets every stored prefix; returns the pages that nothing uses now."""
    held = self._expired
    for node in list(self.nodes()):
      held += self._release(node, 0)
      node.entry, node.children = None, {}
    self._empty()
    return list(dict.fromkeys(each for each in held if not each.kept))

  def nodes(self) -> Iterator[Node]:
    """Every node, parents first."""
    for root in self._roots.values():
      yield root
      yield from _below(root)

  def tick(self) -> int:
    """The next tick."""
    return next(self._ticks)

  # Lookup

  def find(self, namespace: Hashable, tokens: bytes) -> Match:
    """The longest stored prefix of `tokens`; it counts as used."""
    node, length = self._walk(namespace, tokens, split=True)
    tick, at = self.tick(), node
    while at.parent is not None:
      at.use.last, at.use.touched = tick, True
      at.use.hits += 1
      at = at.parent
    return self._match(node, length, tokens)

  def peek(self, namespace: Hashable, tokens: bytes) -> Match:
    """The longest stored prefix of `tokens`; it does not count as used."""
    return self._match(*self._walk(namespace, tokens, split=False), tokens)

  def ends(self, namespace: Hashable, tokens: bytes) -> Iterator[bytes]:
    """Stored prefixes that share the most first tokens with `tokens`, the most first.

    # stored   a b c ┬ d e       query a b c d x: first a b c d e, which shares four, then a b c
    #                └ f g

    Of several that go on after all shared tokens it is one.
    """
    node, length = self._walk(namespace, tokens, split=False)
    below = node
    while below.parent is not None and below.entry is None and below.children:
      below = next(iter(below.children.values()))
    if below.entry is not None and below.end > length:
      yield path(below)
    while node.parent is not None:
      if node.entry is not None and node.end <= length:
        yield tokens[: node.end * TOKEN_BYTES]
      node = node.parent

  def bury(self, namespace: Hashable) -> None:
    """Forgets a namespace; `expire` returns its pages that nothing uses."""
    root = self._roots.get(namespace)
    for node in reversed(list(_below(root))) if root is not None else ():
      self._expired += self._detach(node)

  def entry(self, namespace: Hashable, tokens: bytes) -> Entry | None:
    """The stored prefix `tokens`; None if exactly this prefix is not stored."""
    node = self._stored(namespace, tokens)
    return None if node is None else node.entry

  def _match(self, node: Node, length: int, tokens: bytes) -> Match:
    """The match of the first `length` tokens, which end at `node` or on its edge."""
    entry = node.entry if length * TOKEN_BYTES == len(tokens) and node.end == length else None
    logits = None if entry is None else entry.last_logits
    return Match(length, logits, self._pages(node, length))

  def _walk(self, namespace: Hashable, tokens: bytes, *, split: bool) -> tuple[Node, int]:
    """The node on whose edge the match of `tokens` ends, and the match's length in tokens.

    With `split`, an edge on which the match ends is cut there, so the match ends with its node.
    """
    self._bury()
    node, at = self._roots.get(namespace), 0
    if node is None:
      return Node(None, b"", 0, [], Use(0, 0)), 0
    while at < len(tokens):
      child = node.children.get(tokens[at : at + TOKEN_BYTES])
      if child is None:
        break
      if tokens.startswith(child.tokens, at):
        node, at = child, at + len(child.tokens)
        continue
      same = common(child.tokens, tokens, at)
      return (self._split(child, same) if split else child), at // TOKEN_BYTES + same
    return node, at // TOKEN_BYTES

  def _pages(self, node: Node, length: int) -> list[Held]:
    """The pages of the first `length` tokens, which end at `node` or on its edge."""
    size = self.page_size
    count = -(-length // size)
    while count > node.start // size + len(node.held):  # its last page ends below
      node = next(iter(node.children.values()))  # any child: all have these tokens
    pages: list[Held | None] = [None] * count
    at: Node | None = node
    while at is not None and at.parent is not None:
      first = at.start // size
      for i, each in enumerate(at.held[: max(0, count - first)], first):
        pages[i] = each
      at = at.parent
    return [each for each in pages if each is not None]

  def _split(self, node: Node, length: int) -> Node:
    """Cuts a node after the first `length` tokens of its edge; returns the upper part.

    # page size 4     0 1 2 3 4 5 6 7      ──▶     0 1 2 3 4 5 ─ 6 7
    # pages           [a     ][b     ]             [a     ]       [b]      b ends in the lower part
    """
    assert node.parent is not None
    self.edited(node, 0)
    cut = node.start + length
    whole = cut // self.page_size - node.start // self.page_size
    upper = Node(
      parent=node.parent,
      tokens=node.tokens[: length * TOKEN_BYTES],
      end=cut,
      held=node.held[:whole],
      use=dataclasses.replace(node.use, num_tokens=cut),
    )
    for each in upper.held:
      each.nodes.remove(node)
      each.nodes.append(upper)
    node.parent.children[upper.tokens[:TOKEN_BYTES]] = upper
    node.parent, node.tokens = upper, node.tokens[length * TOKEN_BYTES :]
    node.held = node.held[whole:]
    upper.children[node.tokens[:TOKEN_BYTES]] = node
    self.edited(upper, 0)
    return upper

  # Storing

  def store(
    self,
    namespace: Hashable,
    tokens: bytes,
    held: Callable[[int], list[Held]],
    *,
    last_logits: Any = None,
    ttl: float | None = None,
    pinned: bool = False,
  ) -> list[Held] | None:
    """Stores a prefix with its pages.

    A prefix that is stored again gets the new lifetime and pin, and new logits if there are any.

    Args:
      namespace: Part of the key: model, adapter, tenant, weights.
      tokens: Token ids, `encoded`.
      held: `held(n)` returns the prefix's pages from number n on. It is called at most once, for
        the pages that the index does not have.
      last_logits: Returned for a query of exactly these tokens.
      ttl: Seconds until the prefix is forgotten; None = never.
      pinned: Whether the prefix stays until it is unpinned.

    Returns:
      The pages that nothing uses now; None if the prefix is too short or the index is `full`, and
      nothing was stored.
    """
    length = len(tokens) // TOKEN_BYTES
    if not self.storable(tokens) or self.full(namespace, tokens):
      return None
    released: list[Held] = []
    tick = self.tick()
    expires = math.inf if ttl is None else self._clock() + ttl
    if namespace not in self._roots:
      self._roots[namespace] = Node(None, b"", 0, [], Use(tick, tick))
    node, at = self._walk(namespace, tokens, split=True)
    if at < length:
      node, released = self._grow(node, tokens[at * TOKEN_BYTES :], held, tick)
    if node.entry is None:
      self.num_entries += 1
      node.use.stored = tick
    else:
      self.num_pinned -= node.entry.pinned
      last_logits = node.entry.last_logits if last_logits is None else last_logits
    self.num_pinned += pinned
    node.entry = Entry(namespace, last_logits, pinned, expires)
    node.use.last = tick
    self.edited(node, len(node.held))
    self._mark_mortal(node)
    return released

  def _mark_mortal(self, node: Node) -> None:
    """Notes when a node's entry expires."""
    if node.entry is not None and node.entry.expires != math.inf:
      heapq.heappush(self._mortal, (node.entry.expires, self.tick(), node))

  def _grow(
    self, node: Node, tokens: bytes, held: Callable[[int], list[Held]], tick: int
  ) -> tuple[Node, list[Held]]:
    """A new branch under `node`.

    # page size 4     0 1 2 3 4 5      ──▶     0 1 2 3 4 5 ─ 6 7
    # pages           [a     ][b ]             [a     ]       [c]      c has 4 and 5 too: b goes

    Returns:
      The new node, and the pages that nothing uses now.
    """
    size = self.page_size
    released: list[Held] = []
    if node.end % size and not node.children and node.held:
      # The branch has a page with the same tokens and more.
      released = self._release(node, len(node.held) - 1)
    end = node.end + len(tokens) // TOKEN_BYTES
    child = Node(
      parent=node,
      tokens=tokens,
      end=end,
      held=held(node.end // size),
      use=Use(tick, tick, num_tokens=end),
    )
    node.children[tokens[:TOKEN_BYTES]] = child
    for each in child.held:
      each.nodes.append(child)
    self.num_tokens += len(tokens) // TOKEN_BYTES
    self.edited(child, 0)
    return child, [each for each in released if not each.kept]

  def pin(self, namespace: Hashable, tokens: bytes, pinned: bool) -> bool:
    """Pins or unpins a stored prefix; False if there is none."""
    node = self._stored(namespace, tokens)
    if node is None or node.entry is None:
      return False
    self.num_pinned += pinned - node.entry.pinned
    node.entry.pinned = pinned
    self.edited(node, len(node.held))
    self._mark_mortal(node)
    return True

  def _stored(self, namespace: Hashable, tokens: bytes) -> Node | None:
    """The node of the stored prefix `tokens`, or None if exactly this prefix is not stored."""
    node, at = self._walk(namespace, tokens, split=False)
    exact = node.end == at == len(tokens) // TOKEN_BYTES
    return node if exact and node.entry is not None else None

  # Removing

  def forget_last(self, node: Node, count: int = 1) -> list[Held]:
    """Forgets a node's last `count` device pages, and all pages and nodes after the first of them.

    If a forgotten page also has the last tokens of a node above, that node gets it; see `_detach`.

    Returns:
      The pages that nothing uses now.
    """
    on_device = [i for i, each in enumerate(node.held) if each.page is not None]
    released: list[Held] = []
    for each in reversed(list(_below(node))):
      released += self._detach(each)
    return released + self.forget_from(node, on_device[-count])

  def forget_from(self, node: Node, index: int) -> list[Held]:
    """Forgets the pages of a childless node from number `index` on.

    Returns:
      The pages that nothing uses now.
    """
    cut = (node.start // self.page_size + index) * self.page_size
    if cut <= node.start:
      return self._detach(node)
    gone = self._release(node, index)
    self._remove_entry(node)
    self.num_tokens -= node.end - cut
    node.tokens, node.end = node.tokens[: (cut - node.start) * TOKEN_BYTES], cut
    node.use.num_tokens = cut
    return [each for each in gone if not each.kept]

  def _detach(self, node: Node) -> list[Held]:
    """Removes a childless node from the tree; returns the pages that nothing uses now.

    A first page that begins above the node also has the last tokens of its parent. The parent gets
    it, if it has no other child:

    # page size 4     0 1 2 3 4 5 ─ 6 7      ──▶     0 1 2 3 4 5
    # pages           [a     ]      [b ]             [a     ][b ]
    """
    parent = node.parent
    assert parent is not None and not node.children
    gone = self._release(node, 0)
    self._remove_entry(node)
    self.num_tokens -= node.end - node.start
    self.edited(parent, len(parent.held))
    del parent.children[node.tokens[:TOKEN_BYTES]]
    self._hollow |= parent.parent is None and not parent.children
    if not parent.children and parent.end % self.page_size:
      gone[0].nodes.append(parent)
      parent.held.append(gone[0])
    return [each for each in gone if not each.kept]

  def _release(self, node: Node, index: int) -> list[Held]:
    """Takes a node's pages from number `index` on away from it; returns them."""
    self.edited(node, index)
    gone = node.held[index:]
    del node.held[index:]
    for each in gone:
      each.nodes.remove(node)
    return gone

  def _remove_entry(self, node: Node) -> None:
    """Forgets that a prefix ends at this node."""
    if node.entry is not None:
      self.edited(node, len(node.held))
      self.num_entries -= 1
      self.num_pinned -= node.entry.pinned
      namespace, node.entry = node.entry.namespace, None
      if self.ended is not None:
        self.ended(namespace, path(node))

  def retire(self, node: Node) -> list[Held]:
    """Removes the prefix that ends at a node, and the nodes that no other prefix passes through.

    # stored     a b c ┬ d e      retire(e): d and e go; a, b and c stay, since g needs them
    #                  └ f g

    Returns:
      The pages that nothing uses now.
    """
    self._remove_entry(node)
    released = []
    while node.parent is not None and not node.children and node.entry is None:
      parent = node.parent
      released += self._detach(node)
      node = parent
    return released

  def storable(self, tokens: bytes) -> bool:
    """Whether a prefix is long enough to be stored."""
    return self.max_entries > 0 and len(tokens) // TOKEN_BYTES >= max(self.min_length, 1)

  def full(self, namespace: Hashable, tokens: bytes) -> bool:
    """Whether another prefix must go before this one can be stored."""
    self._bury()
    crowded = self.num_entries >= self.max_entries and self.storable(tokens)
    return crowded and self._stored(namespace, tokens) is None

  @property
  def buried(self) -> bool:
    """Whether pages of expired prefixes wait for `expire`."""
    return bool(self._expired)

  def expire(self) -> list[Held]:
    """Removes the prefixes whose lifetime is over.

    Returns:
      The pages of prefixes that expired since the last call, if nothing uses them now.
    """
    self._bury()
    if self._hollow:
      self._roots = {name: root for name, root in self._roots.items() if root.children}
      self._hollow = False
    expired = [each for each in self._expired if not each.guards]
    self._expired = [each for each in self._expired if each.guards]  # a change still needs them
    return [each for each in expired if not each.kept]

  def _bury(self) -> None:
    """Removes the prefixes whose lifetime is over, except pinned ones."""
    while self._mortal and self._mortal[0][0] <= self._clock():
      node = heapq.heappop(self._mortal)[2]
      entry = node.entry
      if entry is not None and entry.expires <= self._clock() and not entry.pinned:
        self._expired += self.retire(node)

  def end_of(self, node: Node) -> tuple[Node, Held]:
    """The node that has the page of this node's last token, at or below it, and that page."""
    last = (node.end - 1) // self.page_size
    while node.start // self.page_size + len(node.held) <= last:
      node = next(iter(node.children.values()))  # any child: all have these tokens
    return node, node.held[last - node.start // self.page_size]


def path(node: Node) -> bytes:
  """The tokens from the root to the end of a node, `encoded`."""
  parts, at = [], node
  while at.parent is not None:
    parts.append(at.tokens)
    at = at.parent
  return b"".join(reversed(parts))


def _below(node: Node) -> Iterator[Node]:
  """Every node below this one, parents first."""
  stack = list(node.children.values())
  while stack:
    at = stack.pop()
    yield at
    stack += at.children.values()


def common(edge: bytes, tokens: bytes, at: int) -> int:
  """How many first tokens `edge` shares with `tokens` from byte `at` on."""
  size = min(len(edge), len(tokens) - at) // TOKEN_BYTES
  left = np.frombuffer(edge, "<i4", size)
  right = np.frombuffer(tokens, "<i4", size, at)
  different = np.flatnonzero(left != right)
  return int(different[0]) if different.size else size
