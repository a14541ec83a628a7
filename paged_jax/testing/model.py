"""The cache in plain Python: lists, dicts and loops, one row and one page at a time.

This is the meaning of the verbs. A token is any value; `None` is a slot that is not written yet.
Verbs take lists and return lists of bools (the values of `Info.ok`). What they refuse changes
nothing.
"""

import collections
import dataclasses

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


class Model:
  """The behaviour of a cache. Attributes are public: tests compare them with the arrays.

  >>> import paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> model = pj.testing.Model(config)
  >>> model.extend([6, 17]), model.rows[0].pages
  ([True, False], {0: 0, 1: 1})
  """

  def __init__(self, config: CacheConfig):
    self.size = config.page_size
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

  # The verbs.

  def copies_tail(self, row: Row, count: int) -> bool:
    """Whether extending the row writes into a page that others hold."""
    inside = count > 0 and row.length % self.size > 0
    return inside and self.refcount(row.pages[row.length // self.size]) > 1

  def extend(self, num_tokens: list[int]) -> list[bool]:
    """Row by row in order; after the first row that lacks pages no row takes any."""
    ok, waiting = [], False
    for row, count in zip(self.rows, num_tokens):
      if count < 0 or row.length + count > self.capacity:
        ok.append(False)
        continue
      copied = self.copies_tail(row, count)
      if copied and not self.copy_on_write:
        ok.append(False)
        continue
      first, last = -(-row.length // self.size), -(-(row.length + count) // self.size)
      need = last - first + copied
      if need > 0 and (waiting or need > self.num_free()):
        waiting = True
        ok.append(False)
        continue
      if copied:
        self.copy(row, first - 1)
      for column in range(first, last):
        row.pages[column] = self.take()
      if count > 0:
        self.clear_tail(row)
      row.length += count
      row.tokens += [None] * count
      ok.append(True)
    return ok

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

  def pages_needed(self, num_tokens: list[int]) -> list[int]:
    """What `extend` takes for each row, counted row by row without a limit."""
    turns: collections.Counter = collections.Counter()  # earlier rows that leave a tail page
    needed = []
    for row, count in zip(self.rows, num_tokens):
      fits = 0 < count <= self.capacity - row.length
      tail = row.pages[row.length // self.size] if fits and row.length % self.size else None
      shared = tail is not None and self.refcount(tail) - turns[tail] > 1
      granted = fits and (self.copy_on_write or not shared)
      new = -(-(row.length + count) // self.size) - -(-row.length // self.size)
      needed.append(new + shared if granted else 0)
      turns[tail] += granted
    return needed

  def writable(self, row: int, position: int) -> bool:
    """Whether the row has a slot of its own for that position."""
    if not 0 <= row < len(self.rows):
      return False
    at = self.rows[row]
    live = at.start <= position < at.length
    return live and self.refcount(at.pages[position // self.size]) == 1

  def write(self, rows: list[int], positions: list[int], tokens: list) -> list[bool]:
    """Tokens into their slots; those without one, or out of order, are dropped."""
    ok, seen, ordered = [], [], True
    for i, (row, position, token) in enumerate(zip(rows, positions, tokens)):
      known = row if 0 <= row < len(self.rows) else None
      if not seen or known != seen[-1]:
        ordered = known not in seen
      elif position <= positions[i - 1]:
        ordered = False
      seen.append(known)
      writable = ordered and self.writable(row, position)
      ok.append(row == len(self.rows) or writable)
      if writable:
        at = self.rows[row]
        self.contents[at.pages[position // self.size]][position % self.size] = token
        at.tokens[position] = token
    return ok

  def fork(self, src: list[int], dst: list[int], num_tokens: list[int] | None) -> list[bool]:
    """Shares made from the rows as they were before the call."""
    before = list(self.rows)
    ok = []
    for i, (s, d) in enumerate(zip(src, dst)):
      known = 0 <= s < len(before)
      count = num_tokens[i] if num_tokens is not None else before[s].length if known else 0
      start = before[s].start if known and count > 0 else 0
      valid = known and start <= count <= before[s].length
      valid &= self.copy_on_write or count % self.size == 0
      named = d in [other for other, granted in zip(dst, ok) if granted]
      valid = valid and 0 <= d < len(before) and before[d].length == 0 and not named
      if valid:
        self.rows[d] = before[s].share(start, count, self.size)
      ok.append(valid or d == len(before))
    return ok

  def reorder(self, sources: list[int]) -> list[bool]:
    """Every row at once from the rows as they were."""
    before = list(self.rows)
    ok = []
    for r, s in enumerate(sources):
      valid = 0 <= s <= len(before)
      if valid and s < len(before) and not self.copy_on_write:
        valid = s == r or before[s].length % self.size == 0
      ok.append(valid)
      if valid and s != r:
        source = before[s] if s < len(before) else Row()
        self.rows[r] = source.share(source.start, source.length, self.size)
    return ok

  def unshare(self, starts: list[int]) -> list[bool]:
    """Row by row in order, every shared page from the start on is copied."""
    ok, waiting = [], False
    for row, start in zip(self.rows, starts):
      if not 0 <= start <= row.length:
        ok.append(False)
        continue
      if start == row.length:
        ok.append(True)
        continue
      first = max(start, row.start) // self.size
      shared = [c for c, page in row.pages.items() if c >= first and self.refcount(page) > 1]
      if shared and not self.copy_on_write:
        ok.append(False)
        continue
      if shared and (waiting or len(shared) > self.num_free()):
        waiting = True
        ok.append(False)
        continue
      for column in sorted(shared):
        self.copy(row, column)
      ok.append(True)
    return ok

  def trim(self, lengths: list[int]) -> list[bool]:
    """Tokens off the tail."""
    ok = []
    for r, (row, length) in enumerate(zip(self.rows, lengths)):
      valid = length == 0 or max(row.start, 0) <= length <= row.length
      if valid:
        self.rows[r] = row.share(row.start, length, self.size)
      ok.append(valid)
    return ok

  def slide(self, starts: list[int]) -> list[bool]:
    """Tokens off the head."""
    ok = []
    for row, start in zip(self.rows, starts):
      valid = 0 <= start <= row.length
      if valid:
        row.start = max(start, row.start)
        row.pages = {c: p for c, p in row.pages.items() if c >= row.start // self.size}
      ok.append(valid)
    return ok

  def free(self, rows: list[bool]) -> list[bool]:
    """Everything the marked rows hold."""
    ok = [not marked or row.length > 0 for row, marked in zip(self.rows, rows)]
    self.rows = [Row() if marked else row for row, marked in zip(self.rows, rows)]
    return ok

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

  def adopt(
    self, rows: list[int], pages: list[list[int]], lengths: list[int], starts: list[int]
  ) -> list[bool]:
    """Empty rows on held pages, the first of which holds the start."""
    before = list(self.rows)
    ok = []
    for r, ids, length, start in zip(rows, pages, lengths, starts):
      named = r in [other for other, granted in zip(rows, ok) if granted]
      valid = r in range(len(before)) and before[r].length == 0 and not named
      valid = valid and 0 <= start <= length <= self.capacity
      first = start // self.size
      count = -(-length // self.size) - first
      used = ids[:count]
      valid = valid and len(used) == count
      valid = valid and all(p in range(self.num_pages) and self.holds[p] > 0 for p in used)
      valid = valid and (self.copy_on_write or length % self.size == 0)
      if valid:
        tokens = [None] * (first * self.size)
        tokens += [self.contents[p][i] for p in used for i in range(self.size)]
        self.rows[r] = Row(dict(enumerate(used, first)), start, length, tokens[:length])
      ok.append(valid or r == len(before))
    return ok

  def offload(self, pages: list[int]) -> list[list]:
    """The contents of each page; nothing where there is no such page."""
    known = range(self.num_pages)
    return [list(self.contents[p]) if p in known else [None] * self.size for p in pages]

  def restore(self, images: list[list], count: int) -> tuple[list[int], bool]:
    """The first images into fresh pages that the host holds, all or none."""
    if not 0 <= count <= min(len(images), self.num_free()):
      return [self.num_pages] * len(images), False
    pages = [self.take() for _ in range(count)]
    for page, image in zip(pages, images):
      self.contents[page] = list(image)
      self.holds[page] += 1
    return pages + [self.num_pages] * (len(images) - count), True

  def swap_out(self, row: int) -> tuple[Row | None, bool]:
    """A row out of the cache, with its tokens."""
    if not 0 <= row < len(self.rows) or self.rows[row].length == 0:
      return None, False
    image, self.rows[row] = self.rows[row], Row()
    return image, True

  def swap_in(self, row: int, image: Row) -> bool:
    """A row back into fresh pages."""
    vacant = 0 <= row < len(self.rows) and self.rows[row].length == 0
    if not vacant or len(image.pages) > self.num_free():
      return False
    fresh = Row({}, image.start, image.length, list(image.tokens))
    self.rows[row] = fresh
    for column in sorted(image.pages):
      page = self.take()
      fresh.pages[column] = page
      for i in range(self.size):
        position = column * self.size + i
        if fresh.start <= position < fresh.length:
          self.contents[page][i] = fresh.tokens[position]
    return True
