"""The prefix index: stored token sequences, found by their tokens, down to a part of a page.

A radix tree per namespace (Morrison 1968; for KV caches Zheng et al. 2024, "SGLang", section 3).
Edges are runs of tokens, compared as such, so two prompts can never be taken for each other. A
node keeps the pages whose last token is on its edge; the first of them may begin above it:

    # page size 4     0 1 2 3 4 5 ┬ 6 7 8      page 1 of the upper branch is its own copy of
    # pages           [a     ][b  │  ][c]      tokens 4 and 5, and so is page 1 of the lower one
    #                             └ 6 9
    #                          [d    ]

Times are ticks, one for each lookup or store; a lifetime is in seconds of the clock passed in.
"""

import array
import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from paged_jax.host.eviction import LRU, Policy, Queue, Use
from paged_jax.host.holds import Held

TOKEN_BYTES = 4


def encoded(tokens: Sequence[int] | np.ndarray) -> bytes:
  """Token ids as bytes, four each.

  Raises:
    ValueError: They are no flat sequence of integers in [0, 2**31).
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
  """A whole stored sequence."""

  last_logits: Any  # whatever came with it
  pinned: bool
  expires: float  # seconds of the clock


@dataclasses.dataclass(eq=False, slots=True)
class Node:
  """The tokens `start..end` of every sequence that goes through here."""

  parent: "Node | None"
  tokens: bytes
  end: int
  held: list[Held]
  use: Use
  entry: Entry | None = None
  children: dict[bytes, "Node"] = dataclasses.field(default_factory=dict)

  @property
  def start(self) -> int:
    """Tokens above this node."""
    return self.end - len(self.tokens) // TOKEN_BYTES


class Match(NamedTuple):
  """What a lookup found."""

  length: int  # tokens of the query that are stored
  last_logits: Any  # of the last of them, if they are the whole query and came with logits
  held: list[Held]  # ceil(length / T) pages


class PrefixIndex:
  """Longest stored prefix of a query, with its pages. Knows nothing of devices.

  Args:
    page_size: Tokens per page, T.
    max_entries: Whole sequences kept; 0 stores nothing.
    min_length: Shorter sequences are not stored, in tokens.
    policy: What goes first.
    clock: Seconds, for lifetimes.
  """

  def __init__(
    self,
    page_size: int,
    *,
    max_entries: int = 100,
    min_length: int = 16,
    policy: Policy = LRU,
    clock: Callable[[], float],
  ):
    self.page_size, self.max_entries, self.min_length = page_size, max_entries, min_length
    self._clock = clock
    self._policy = policy
    self._ticks = itertools.count(1)
    self._empty()

  def clear(self) -> list[Held]:
    """Forgets everything; returns what was kept."""
    held = self._buried + self._release([x for node in self.nodes() for x in node.held])
    self._empty()
    return list(dict.fromkeys(each for each in held if not each.kept))

  def clear_unpinned(self) -> list[Held]:
    """Forgets all but what pinned sequences need; returns what was kept."""
    released: list[Held] = []
    while (held := self.evict_entry(lambda held: False)) is not None:
      released += held
    return list(dict.fromkeys(each for each in released if not each.kept))

  def _empty(self) -> None:
    self._roots: dict[Hashable, Node] = {}
    self._leaves: Queue[Node] = Queue(self._policy, self._tick, _frontier)
    self._entries: Queue[Node] = Queue(
      self._policy, self._tick, lambda node: node.entry is not None
    )
    self._mortal: list = []  # heap of (expiry, number, node)
    self._buried: list[Held] = []  # pages of the dead, until `expire` returns them
    self.num_entries = self.num_pinned = 0
    self.num_tokens = 0

  def nodes(self) -> Iterator[Node]:
    """Every node, parents first."""
    for root in self._roots.values():
      yield root
      yield from _below(root)

  def _tick(self) -> int:
    return next(self._ticks)

  # Lookup

  def find(self, namespace: Hashable, tokens: bytes) -> Match:
    """The longest stored prefix of `tokens`, which counts as used."""
    node, length = self._walk(namespace, tokens, split=True)
    tick, at = self._tick(), node
    while at.parent is not None:
      at.use.last, at.use.touched = tick, True
      at.use.hits += 1
      at = at.parent
    return self._match(node, length, tokens)

  def peek(self, namespace: Hashable, tokens: bytes) -> Match:
    """The same, leaving no trace."""
    return self._match(*self._walk(namespace, tokens, split=False), tokens)

  def _match(self, node: Node, length: int, tokens: bytes) -> Match:
    entry = node.entry if length * TOKEN_BYTES == len(tokens) and node.end == length else None
    logits = None if entry is None else entry.last_logits
    return Match(length, logits, self._pages(node, length))

  def _walk(self, namespace: Hashable, tokens: bytes, *, split: bool) -> tuple[Node, int]:
    """The node whose edge the match ends on (or, if `split`, at whose end) and the match's length."""
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
      same = _common(child.tokens, tokens, at)
      return (self._split(child, same) if split else child), at // TOKEN_BYTES + same
    return node, at // TOKEN_BYTES

  def _pages(self, node: Node, length: int) -> list[Held]:
    """The pages of the first `length` tokens on the way to `node` (or part of the way along it)."""
    size = self.page_size
    count = -(-length // size)
    while count > node.start // size + len(node.held):  # a page that ends below
      node = next(iter(node.children.values()))  # any one: all have these tokens
    pages: list[Held | None] = [None] * count
    at: Node | None = node
    while at is not None and at.parent is not None:
      first = at.start // size
      for i, each in enumerate(at.held[: max(0, count - first)], first):
        pages[i] = each
      at = at.parent
    return [each for each in pages if each is not None]

  def _split(self, node: Node, length: int) -> Node:
    """Cuts `length` tokens off the head of a node's edge; returns the upper part."""
    assert node.parent is not None
    cut = node.start + length
    whole = cut // self.page_size - node.start // self.page_size
    upper = Node(
      parent=node.parent,
      tokens=node.tokens[: length * TOKEN_BYTES],
      end=cut,
      held=node.held[:whole],
      use=dataclasses.replace(node.use, num_tokens=cut),
    )
    node.parent.children[upper.tokens[:TOKEN_BYTES]] = upper
    node.parent, node.tokens, node.held = (
      upper,
      node.tokens[length * TOKEN_BYTES :],
      node.held[whole:],
    )
    upper.children[node.tokens[:TOKEN_BYTES]] = node
    self._leaves.push(upper)  # it is next already if all of the lower part is in host memory
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
    busy: Callable[[Held], bool],
  ) -> list[Held] | None:
    """Stores a sequence on its pages; storing it again replaces its lifetime, its pin, and its
    logits, if there are new ones.

    Args:
      namespace: Part of the key: model, adapter, tenant, weights.
      tokens: Token ids, `encoded`.
      held: `held(n)` are its pages from number n on; asked for once, without those of what is
        stored already.
      last_logits: Returned when a query is exactly this sequence.
      ttl: Seconds until it is gone; None = never.
      pinned: Whether it stays until it is unpinned.
      busy: Whether somebody besides the host uses a page; entries in use are not evicted.

    Returns:
      What is kept no more, or None if nothing was stored: too short, or no room among entries.
    """
    length = len(tokens) // TOKEN_BYTES
    if not self._storable(tokens):
      return None
    released: list[Held] = []
    if self.full(namespace, tokens):
      evicted = self.evict_entry(busy)
      if evicted is None:
        return None
      released += evicted
    tick = self._tick()
    expires = math.inf if ttl is None else self._clock() + ttl
    if namespace not in self._roots:
      self._roots[namespace] = Node(None, b"", 0, [], Use(tick, tick))
    node, at = self._walk(namespace, tokens, split=True)
    if at < length:
      node, dropped = self._grow(node, tokens[at * TOKEN_BYTES :], held, tick)
      released += dropped
    if node.entry is None:
      self.num_entries += 1
      node.use.stored = tick
      self._entries.push(node)
    else:
      self.num_pinned -= node.entry.pinned
      last_logits = node.entry.last_logits if last_logits is None else last_logits
    self.num_pinned += pinned
    node.entry = Entry(last_logits, pinned, expires)
    node.use.last = tick
    self._mark_mortal(node)
    return [each for each in released if not each.kept]

  def _mark_mortal(self, node: Node) -> None:
    if node.entry is not None and node.entry.expires != math.inf:
      heapq.heappush(self._mortal, (node.entry.expires, self._tick(), node))

  def _grow(
    self, node: Node, tokens: bytes, held: Callable[[int], list[Held]], tick: int
  ) -> tuple[Node, list[Held]]:
    """A new branch under `node`, and the partial page that it makes superfluous."""
    size = self.page_size
    released = []
    if node.end % size and not node.children and node.held:
      released.append(node.held.pop())  # the branch has a page with the same tokens and more
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
      each.indexed += 1
    for each in released:
      each.indexed -= 1
    self.num_tokens += len(tokens) // TOKEN_BYTES
    self._leaves.push(child)
    return child, [each for each in released if not each.kept]

  def pin(self, namespace: Hashable, tokens: bytes, pinned: bool) -> bool:
    """Pins or unpins a stored sequence; False if there is no such one."""
    node = self._stored(namespace, tokens)
    if node is None or node.entry is None:
      return False
    self.num_pinned += pinned - node.entry.pinned
    node.entry.pinned = pinned
    self._mark_mortal(node)
    return True

  def _stored(self, namespace: Hashable, tokens: bytes) -> Node | None:
    """The node of exactly this stored sequence."""
    node, at = self._walk(namespace, tokens, split=False)
    exact = node.end == at == len(tokens) // TOKEN_BYTES
    return node if exact and node.entry is not None else None

  # Removing

  def candidates(self, ready: Callable[[Held], bool]) -> Generator[Node, None, None]:
    """Nodes that give up their last device page next, in order, if that page is `ready`.

    To be closed. Whoever takes pages from a node says so before asking for the next one.
    """

    def free(node: Node) -> bool:
      page = last_page(node)
      return page is not None and ready(page) and not self._pinned(node)

    return self._leaves.pops(free)

  def _pinned(self, node: Node) -> bool:
    """Whether a sequence that ends here or below is pinned."""
    if self.num_pinned == 0:
      return False
    return any(at.entry is not None and at.entry.pinned for at in [node, *_below(node)])

  def forget_last(self, node: Node, count: int = 1) -> list[Held]:
    """Forgets a node's last `count` device pages, with all that comes after the first of these.

    A page that also has the last tokens of a node above passes to that one.

    Returns:
      What nobody keeps any more.
    """
    on_device = [i for i, each in enumerate(node.held) if each.page is not None]
    released = self._drop_below(node)
    return released + self._forget(node, on_device[-count])

  def spilled(self, guard: set[Held], ready: Callable[[Held], bool]) -> list[Held]:
    """What takes room in host memory for the index alone, and may go: not what is in `guard`.

    What comes after it on the device must be `ready` to go first.
    """
    staying: set[int] = set()
    found: dict[Held, None] = {}
    for node in reversed(list(self.nodes())):  # children first
      clear = id(node) not in staying and not (node.entry is not None and node.entry.pinned)
      for each in reversed(node.held):
        clear = clear and each not in guard and (each.page is None or ready(each))
        if clear and each.page is None and not each.swapped:
          found[each] = None
      if not clear and node.parent is not None:
        staying.add(id(node.parent))
    return list(found)

  def forget_spilled(self, count: int, guard: set[Held]) -> list[Held]:
    """Forgets `count` pages in host memory, least wanted first; returns what nobody keeps."""
    released: list[Held] = []
    leaves = [node for node in self.nodes() if not node.children]
    leaves.sort(key=lambda node: self._policy.rank(node.use))
    while leaves and len(released) < count:
      node = leaves.pop(0)
      last = node.held[-1] if node.held else None
      if last is None or last.page is not None or last in guard or self._pinned(node):
        continue
      parent = node.parent
      released += self._forget(node, len(node.held) - 1)
      if _attached(node):
        leaves.insert(0, node)
      elif parent is not None and not parent.children:
        leaves.insert(0, parent)
    return released

  def _forget(self, node: Node, index: int) -> list[Held]:
    """Forgets the pages of a childless node from number `index` on."""
    cut = (node.start // self.page_size + index) * self.page_size
    if cut <= node.start:
      return self._detach(node)
    gone, node.held = node.held[index:], node.held[:index]
    self._remove_entry(node)
    self.num_tokens -= node.end - cut
    node.tokens, node.end = node.tokens[: (cut - node.start) * TOKEN_BYTES], cut
    node.use.num_tokens = cut
    self._requeue(node)
    return self._release(gone)

  def requeue_all(self, held: Iterable[Held]) -> None:
    """After these pages moved: whoever may be next is in the queue again."""
    if any(each.indexed for each in held):
      for node in self.nodes():
        if _frontier(node):
          self._leaves.push(node)

  def _requeue(self, node: Node) -> None:
    """This node, or the first one above it with a page on the device."""
    at: Node | None = node
    while at is not None and at.parent is not None:
      if last_page(at) is not None:
        self._leaves.push(at)
        return
      at = at.parent

  def _detach(self, node: Node) -> list[Held]:
    """Takes a childless node off the tree."""
    parent = node.parent
    assert parent is not None and not node.children
    del parent.children[node.tokens[:TOKEN_BYTES]]
    self._remove_entry(node)
    self.num_tokens -= node.end - node.start
    gone, node.held = node.held, []
    if not parent.children and parent.end % self.page_size:
      parent.held.append(gone[0])  # it has the last tokens of the node above, too
      gone = gone[1:]
    self._requeue(parent)
    return self._release(gone)

  def _drop_below(self, node: Node) -> list[Held]:
    """Takes everything under a node off the tree."""
    released: list[Held] = []
    for each in reversed(list(_below(node))) if node.children else ():
      released += self._detach(each)
    return released

  def _release(self, held: list[Held]) -> list[Held]:
    for each in held:
      each.indexed -= 1
    return [each for each in held if not each.kept]

  def _remove_entry(self, node: Node) -> None:
    if node.entry is not None:
      self.num_entries -= 1
      self.num_pinned -= node.entry.pinned
      node.entry = None

  def _idle(self, busy: Callable[[Held], bool]) -> Callable[[Node], bool]:
    def idle(node: Node) -> bool:
      assert node.entry is not None
      return not node.entry.pinned and not any(map(busy, self._pages(node, node.end)[-1:]))

    return idle

  def _retire(self, node: Node) -> list[Held]:
    """Removes a whole sequence, and the pages that no other one goes through."""
    self._remove_entry(node)
    released = []
    while node.parent is not None and not node.children and node.entry is None:
      parent = node.parent
      released += self._detach(node)
      node = parent
    return released

  def _storable(self, tokens: bytes) -> bool:
    return self.max_entries > 0 and len(tokens) // TOKEN_BYTES >= max(self.min_length, 1)

  def full(self, namespace: Hashable, tokens: bytes) -> bool:
    """Whether a sequence must go before this one can be stored."""
    self._bury()
    crowded = self.num_entries >= self.max_entries and self._storable(tokens)
    return crowded and self._stored(namespace, tokens) is None

  def evict_entry(self, busy: Callable[[Held], bool]) -> list[Held] | None:
    """Removes the sequence that goes first; None if all are in use or pinned."""
    victim = self._entries.pop(self._idle(busy))
    return None if victim is None else self._retire(victim)

  def expire(self) -> list[Held]:
    """Removes what has outlived its time; returns what is kept no more since the last call."""
    self._bury()
    self._roots = {name: root for name, root in self._roots.items() if root.children}
    buried, self._buried = self._buried, []
    return [each for each in buried if not each.kept]

  def _bury(self) -> None:
    """Removes the sequences that have outlived their time, but for pinned ones."""
    while self._mortal and self._mortal[0][0] <= self._clock():
      node = heapq.heappop(self._mortal)[2]
      entry = node.entry
      if entry is not None and entry.expires <= self._clock() and not entry.pinned:
        self._buried += self._retire(node)

  def stuck(self, staying: set[Held]) -> set[Held]:
    """The device pages that cannot leave if asked for: what pinned sequences need, those that are
    `staying`, and all that come before them."""
    stuck: set[Held] = set()
    if not (staying or self.num_pinned):
      return stuck
    above: set[int] = set()  # nodes with something stuck below
    for node in reversed(list(self.nodes())):  # children first
      clear = id(node) not in above
      if clear and node.entry is not None and node.entry.pinned:
        stuck.add(self._pages(node, node.end)[-1])  # it would pass to the pinned one
        clear = False
      if not clear:
        stuck.update(node.held)
      elif not staying.isdisjoint(node.held):
        last = max(i for i, each in enumerate(node.held) if each in staying)
        stuck.update(node.held[: last + 1])
        clear = False
      if not clear and node.parent is not None:
        above.add(id(node.parent))
    return {each for each in stuck if each.page is not None}


def last_page(node: Node) -> Held | None:
  """The last page of a node that is on the device, or None."""
  for each in reversed(node.held):
    if each.page is not None:
      return each
  return None


def _frontier(node: Node) -> bool:
  """Whether a node of the tree has device pages and nothing below it has."""
  here = _attached(node) and last_page(node) is not None
  return here and not any(map(_on_device, node.children.values()))


def _on_device(node: Node) -> bool:
  """Whether this node or one below has a device page."""
  return last_page(node) is not None or any(last_page(each) is not None for each in _below(node))


def _attached(node: Node) -> bool:
  return node.parent is not None and node.parent.children.get(node.tokens[:TOKEN_BYTES]) is node


def _below(node: Node) -> Iterator[Node]:
  """Every node under this one, parents first."""
  stack = list(node.children.values())
  while stack:
    at = stack.pop()
    yield at
    stack += at.children.values()


def _common(edge: bytes, tokens: bytes, at: int) -> int:
  """Tokens that an edge shares with `tokens` from byte `at` on."""
  size = min(len(edge), len(tokens) - at) // TOKEN_BYTES
  left = np.frombuffer(edge, "<i4", size)
  right = np.frombuffer(tokens, "<i4", size, at)
  different = np.flatnonzero(left != right)
  return int(different[0]) if different.size else size
