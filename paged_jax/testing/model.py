"""The cache in plain Python: lists, dicts and loops, one row and one page at a time.

This is the meaning of the verbs. A token is any value; `None` is a slot that is not written yet.
Verbs take lists and return lists of bools (the values of `Info.ok`). What they refuse changes
nothing.
"""

import collections
import copy
import dataclasses
from typing import Any

from paged_jax import groups as groups_lib
from paged_jax.config import CacheConfig


@dataclasses.dataclass
class Row:
  """A row: the page of each logical page, its live range, and the tokens that it must read back."""

  pages: dict[int, int] = dataclasses.field(default_factory=dict)
  start: int = 0
  length: int = 0
  tokens: list = dataclasses.field(default_factory=list)

  def share(self, start: int, length: int, size: int) -> "Row":
    """The first `length` tokens of this row, as a row of its own."""
    if length == 0:
      return Row()
    columns = range(start // size, -(-length // size))
    return Row({c: self.pages[c] for c in columns}, start, length, self.tokens[:length])


class Group:
  """One pool and its tables. Attributes are public: tests compare them with the arrays."""

  def __init__(self, config: CacheConfig):
    self.size = config.page_size
    self.window = config.window
    self.num_pages = config.num_pages
    self.capacity = config.pages_per_row * config.page_size
    self.copy_on_write = config.copy_on_write
    self.rows = [Row() for _ in range(config.num_rows)]
    self.holds = [0] * config.num_pages
    self.contents = [[None] * self.size for _ in range(config.num_pages)]
    self.cursor = 0

  # What the laws derive from the rows and the holds.

  def refcount(self, page: int) -> int:
    """Holders of a page: each table entry and each hold."""
    return self.holds[page] + sum(list(r.pages.values()).count(page) for r in self.rows)

  def num_free(self) -> int:
    """Pages that nobody holds."""
    return sum(self.refcount(page) == 0 for page in range(self.num_pages))

  def take(self) -> int:
    """The next free page from the cursor on; its content is cleared."""
    for step in range(self.num_pages):
      page = (self.cursor + step) % self.num_pages
      if self.refcount(page) == 0:
        self.cursor = (page + 1) % self.num_pages
        self.contents[page] = [None] * self.size
        return page
    raise AssertionError("take from a full pool")

  def latest_start(self, length: int) -> int:
    """The last start at which a row of this length has all that its next token sees."""
    return length if self.window is None else min(length, max(0, length + 1 - self.window))

  # What a row asks of this group, and what it gets.

  def copies_tail(self, row: Row, count: int) -> bool:
    """Whether extending the row writes into a page that others hold."""
    inside = count > 0 and row.length % self.size > 0
    return inside and self.refcount(row.pages[row.length // self.size]) > 1

  def need(self, row: Row, count: int) -> int:
    """Pages that a row takes for `count` more tokens."""
    new = -(-(row.length + count) // self.size) - -(-row.length // self.size)
    return new + self.copies_tail(row, count)

  def grow(self, row: Row, count: int):
    """Gives a row room for `count` more tokens; there must be enough free pages."""
    first, last = -(-row.length // self.size), -(-(row.length + count) // self.size)
    if self.copies_tail(row, count):
      self.copy(row, first - 1)
    for column in range(first, last):
      row.pages[column] = self.take()
    if count > 0:
      self.clear_tail(row)
    row.length += count
    row.tokens += [None] * count

  def slide(self, row: Row, start: int):
    """Forgets a row's tokens before `start`."""
    row.start = max(start, row.start)
    row.pages = {c: p for c, p in row.pages.items() if c >= row.start // self.size}

  def copy(self, row: Row, column: int):
    """Gives the row its own copy of a logical page."""
    source = row.pages[column]
    row.pages[column] = self.take()
    self.contents[row.pages[column]] = list(self.contents[source])
    if column == row.length // self.size:
      self.clear_tail(row)

  def clear_tail(self, row: Row):
    """Forgets everything that a row's last page holds beyond the row's length."""
    kept = row.length % self.size
    page = row.pages.get(row.length // self.size)
    if kept and page is not None and self.refcount(page) == 1:
      self.contents[page][kept:] = [None] * (self.size - kept)

  def shared(self, row: Row, start: int) -> list[int]:
    """The logical pages of a row from token `start` on that others hold too."""
    first = max(start, row.start) // self.size
    return sorted(c for c, page in row.pages.items() if c >= first and self.refcount(page) > 1)

  def begins(self, row: Row, length: int) -> bool:
    """Whether the first `length` tokens of a row can be a row of their own."""
    start = row.start if length > 0 else 0
    return 0 <= length <= row.length and start <= self.latest_start(length)

  def whole(self, length: int) -> bool:
    """Whether a share of `length` tokens needs no copy, or copies are made."""
    return self.copy_on_write or length % self.size == 0

  def writable(self, row: int, position: int) -> bool:
    """Whether the row has a slot of its own for that position."""
    if not 0 <= row < len(self.rows):
      return False
    at = self.rows[row]
    live = at.start <= position < at.length
    return live and self.refcount(at.pages[position // self.size]) == 1

  def held(self, ids: list[int], length: int, start: int) -> list[int] | None:
    """Those of the held pages `ids` that a row of these tokens starts on; None if it cannot."""
    sane = 0 <= start <= self.latest_start(length) and length <= self.capacity
    count = -(-length // self.size) - start // self.size
    used = ids[: max(count, 0)]
    known = all(p in range(self.num_pages) and self.holds[p] > 0 for p in used)
    return used if sane and known and len(used) == count and self.whole(length) else None

  def adopt(self, row: int, used: list[int], length: int, start: int):
    """A row starts on held pages."""
    first = start // self.size
    tokens = [None] * (first * self.size)
    tokens += [self.contents[p][i] for p in used for i in range(self.size)]
    self.rows[row] = Row(dict(enumerate(used, first)), start, length, tokens[:length])

  def hold(self, pages: list[int]) -> list[bool]:
    """A host reference each."""
    known = range(self.num_pages)
    ok = [page == self.num_pages or (page in known and self.refcount(page) > 0) for page in pages]
    for page, valid in zip(pages, ok):
      if valid and page < self.num_pages:
        self.holds[page] += 1
    return ok

  def drop(self, pages: list[int]) -> list[bool]:
    """A host reference back each."""
    ok = []
    for page in pages:
      held = page in range(self.num_pages) and self.holds[page] > 0
      if held:
        self.holds[page] -= 1
      ok.append(held or page == self.num_pages)
    return ok

  def offload(self, pages: list[int]) -> list[list]:
    """The contents of each page; nothing where there is no such page."""
    known = range(self.num_pages)
    return [list(self.contents[p]) if p in known else [None] * self.size for p in pages]

  def restore(self, images: list[list], count: int) -> list[int]:
    """The first images into fresh pages that the host holds."""
    pages = [self.take() for _ in range(count)]
    for page, image in zip(pages, images):
      self.contents[page] = list(image)
      self.holds[page] += 1
    return pages + [self.num_pages] * (len(images) - count)

  def swap_in(self, row: int, image: Row):
    """A row back into fresh pages."""
    fresh = Row({}, image.start, image.length, list(image.tokens))
    self.rows[row] = fresh
    for column in sorted(image.pages):
      page = self.take()
      fresh.pages[column] = page
      for i in range(self.size):
        position = column * self.size + i
        if fresh.start <= position < fresh.length:
          self.contents[page][i] = fresh.tokens[position]


class Model:
  """The behaviour of a cache, or of a tuple of caches: what one group refuses no group does.

  As with the arrays, what belongs to one pool is a tuple if there are several: page ids, starts,
  images.

  >>> import paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> model = pj.testing.Model(config)
  >>> model.extend([6, 17]), model.groups[0].rows[0].pages
  ([True, False], {0: 0, 1: 1})
  """

  def __init__(self, config: CacheConfig | tuple[CacheConfig, ...]):
    self.groups = [Group(each) for each in groups_lib.each(config)]
    self.several = groups_lib.several(config)
    self.num_rows = len(self.groups[0].rows)
    self.capacity = min(group.capacity for group in self.groups)
    self.copy_on_write = self.groups[0].copy_on_write

  def each(self, value: Any) -> tuple:
    """The value of each group."""
    return value if self.several else (value,)

  def like(self, values: list) -> Any:
    """The values of all groups, as a caller gets them."""
    return tuple(values) if self.several else values[0]

  def length(self, row: int) -> int:
    """Tokens of a row; 0 if there is no such row."""
    return self.groups[0].rows[row].length if 0 <= row < self.num_rows else 0

  # The verbs.

  def extend(self, num_tokens: list[int]) -> list[bool]:
    """Row by row in order; after the first row that lacks pages no row takes any."""
    asked = [0 <= n <= self.capacity - self.length(r) for r, n in enumerate(num_tokens)]
    self.leave_behind(num_tokens, asked)
    ok, waiting = [], False
    for r, count in enumerate(num_tokens):
      both = [(group, group.rows[r]) for group in self.groups]
      copied = any(group.copies_tail(row, count) for group, row in both) if asked[r] else False
      if not asked[r] or (copied and not self.copy_on_write):
        ok.append(False)
        continue
      needs = [group.need(row, count) for group, row in both]
      short = any(need > group.num_free() for need, group in zip(needs, self.groups))
      if any(needs) and (waiting or short):
        waiting = True
        ok.append(False)
        continue
      for group, row in both:
        group.grow(row, count)
      ok.append(True)
    return ok

  def leave_behind(self, num_tokens: list[int], asked: list[bool]):
    """Rows that ask for tokens forget those that no later token sees."""
    for group in self.groups:
      for row, count, sane in zip(group.rows, num_tokens, asked):
        if group.window is not None and sane and count > 0:
          group.slide(row, group.latest_start(row.length))

  def pages_needed(self, num_tokens: list[int]) -> Any:
    """What `extend` takes for each row, counted row by row without a limit."""
    trial = copy.deepcopy(self)
    asked = [0 <= n <= self.capacity - self.length(r) for r, n in enumerate(num_tokens)]
    trial.leave_behind(num_tokens, asked)
    turns = [collections.Counter() for _ in trial.groups]  # earlier rows that leave a tail page
    needed = [[] for _ in trial.groups]
    for r, count in enumerate(num_tokens):
      found = []
      for group, leaves in zip(trial.groups, turns):
        row = group.rows[r]
        tail = row.pages[row.length // group.size] if row.length % group.size else None
        shared = count > 0 and tail is not None and group.refcount(tail) - leaves[tail] > 1
        held = count > 0 and tail is not None and group.refcount(tail) > 1
        found.append((row, tail, shared, held))
      granted = asked[r] and count > 0
      granted = granted and (self.copy_on_write or not any(held for *_, held in found))
      for group, leaves, own, (row, tail, shared, _) in zip(trial.groups, turns, needed, found):
        new = -(-(row.length + count) // group.size) - -(-row.length // group.size)
        own.append(new + shared if granted else 0)
        leaves[tail] += granted
    return self.like(needed)

  def write(self, rows: list[int], positions: list[int], tokens: list) -> list[bool]:
    """Tokens into their slots; those without one, or out of order, are dropped."""
    ok, seen, ordered = [], [], True
    for i, (row, position, token) in enumerate(zip(rows, positions, tokens)):
      known = row if 0 <= row < self.num_rows else None
      if not seen or known != seen[-1]:
        ordered = known not in seen
      elif position <= positions[i - 1]:
        ordered = False
      seen.append(known)
      writable = ordered and all(group.writable(row, position) for group in self.groups)
      ok.append(row == self.num_rows or writable)
      for group in self.groups if writable else ():
        at = group.rows[row]
        group.contents[at.pages[position // group.size]][position % group.size] = token
        at.tokens[position] = token
    return ok

  def fork(self, src: list[int], dst: list[int], num_tokens: list[int] | None) -> list[bool]:
    """Shares made from the rows as they were before the call."""
    before = [list(group.rows) for group in self.groups]
    ok = []
    for i, (s, d) in enumerate(zip(src, dst)):
      known = 0 <= s < self.num_rows
      count = num_tokens[i] if num_tokens is not None else before[0][s].length if known else 0
      valid = known and all(
        group.begins(rows[s], count) and group.whole(count)
        for group, rows in zip(self.groups, before)
      )
      valid = valid and self.vacant(d, before, [x for x, granted in zip(dst, ok) if granted])
      for group, rows in zip(self.groups, before) if valid else ():
        start = rows[s].start if count > 0 else 0
        group.rows[d] = rows[s].share(start, count, group.size)
      ok.append(valid or d == self.num_rows)
    return ok

  def vacant(self, row: int, before: list[list[Row]], named: list[int]) -> bool:
    """Whether a row was empty before, and no earlier entry named it."""
    return 0 <= row < self.num_rows and before[0][row].length == 0 and row not in named

  def reorder(self, sources: list[int]) -> list[bool]:
    """Every row at once from the rows as they were."""
    before = [list(group.rows) for group in self.groups]
    ok = []
    for r, s in enumerate(sources):
      valid = 0 <= s <= self.num_rows
      if valid and s not in (r, self.num_rows):
        valid = all(group.whole(before[0][s].length) for group in self.groups)
      ok.append(valid)
      for group, rows in zip(self.groups, before) if valid and s != r else ():
        source = rows[s] if s < self.num_rows else Row()
        group.rows[r] = source.share(source.start, source.length, group.size)
    return ok

  def unshare(self, starts: list[int]) -> list[bool]:
    """Row by row in order, every shared page from the start on is copied."""
    ok, waiting = [], False
    for r, start in enumerate(starts):
      if not 0 <= start <= self.length(r):
        ok.append(False)
        continue
      if start == self.length(r):
        ok.append(True)
        continue
      shared = [group.shared(group.rows[r], start) for group in self.groups]
      if any(shared) and not self.copy_on_write:
        ok.append(False)
        continue
      short = any(len(columns) > group.num_free() for columns, group in zip(shared, self.groups))
      if any(shared) and (waiting or short):
        waiting = True
        ok.append(False)
        continue
      for group, columns in zip(self.groups, shared):
        for column in columns:
          group.copy(group.rows[r], column)
      ok.append(True)
    return ok

  def trim(self, lengths: list[int]) -> list[bool]:
    """Tokens off the tail."""
    ok = []
    for r, length in enumerate(lengths):
      valid = length == 0 or all(group.begins(group.rows[r], length) for group in self.groups)
      for group in self.groups if valid else ():
        row = group.rows[r]
        group.rows[r] = row.share(row.start, length, group.size)
      ok.append(valid)
    return ok

  def slide(self, starts: list[int]) -> list[bool]:
    """Tokens off the head."""
    ok = []
    for r, start in enumerate(starts):
      latest = min(group.latest_start(self.length(r)) for group in self.groups)
      valid = 0 <= start <= latest
      for group in self.groups if valid else ():
        group.slide(group.rows[r], start)
      ok.append(valid)
    return ok

  def free(self, rows: list[bool]) -> list[bool]:
    """Everything the marked rows hold."""
    ok = [not marked or self.length(r) > 0 for r, marked in enumerate(rows)]
    for group in self.groups:
      group.rows = [Row() if marked else row for row, marked in zip(group.rows, rows)]
    return ok

  def hold(self, pages: Any) -> Any:
    """A host reference each."""
    return self.like([group.hold(own) for group, own in zip(self.groups, self.each(pages))])

  def drop(self, pages: Any) -> Any:
    """A host reference back each."""
    return self.like([group.drop(own) for group, own in zip(self.groups, self.each(pages))])

  def adopt(self, rows: list[int], pages: Any, lengths: list[int], starts: Any) -> list[bool]:
    """Empty rows on held pages, the first of which holds the start."""
    before = [list(group.rows) for group in self.groups]
    ok = []
    for i, (r, length) in enumerate(zip(rows, lengths)):
      valid = self.vacant(r, before, [x for x, granted in zip(rows, ok) if granted])
      own = [(ids[i], begins[i]) for ids, begins in zip(self.each(pages), self.each(starts))]
      used = [group.held(ids, length, start) for group, (ids, start) in zip(self.groups, own)]
      valid = valid and all(each is not None for each in used)
      for group, each, (_, start) in zip(self.groups, used, own) if valid else ():
        group.adopt(r, each or [], length, start)
      ok.append(valid or r == self.num_rows)
    return ok

  def offload(self, pages: Any) -> Any:
    """The contents of each page; nothing where there is no such page."""
    return self.like([group.offload(own) for group, own in zip(self.groups, self.each(pages))])

  def restore(self, images: Any, count: Any) -> tuple[Any, bool]:
    """The first images into fresh pages that the host holds, all or none."""
    own = list(zip(self.groups, self.each(images), self.each(count)))
    ok = all(0 <= n <= min(len(x), group.num_free()) for group, x, n in own)
    return self.like([group.restore(x, n if ok else 0) for group, x, n in own]), ok

  def swap_out(self, row: int) -> tuple[Any, bool]:
    """A row out of the cache, with its tokens."""
    if self.length(row) == 0:
      return None, False
    images = [group.rows[row] for group in self.groups]
    for group in self.groups:
      group.rows[row] = Row()
    return self.like(images), True

  def swap_in(self, row: int, image: Any) -> bool:
    """A row back into fresh pages."""
    both = list(zip(self.groups, self.each(image)))
    vacant = 0 <= row < self.num_rows and self.length(row) == 0
    if not vacant or any(len(own.pages) > group.num_free() for group, own in both):
      return False
    for group, own in both:
      group.swap_in(row, own)
    return True
