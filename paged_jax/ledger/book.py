"""One group of the ledger on the host: its arrays in NumPy, and the changes that verbs are made of.

The cost of a change grows with the rows, the pages that it names, and the words of the bitmap that
its search for free pages passes. None visits the whole pool.
"""

from typing import Any, NamedTuple

import numpy as np

from paged_jax import types
from paged_jax.config import CacheConfig
from paged_jax.types import Pool, Tables

_WINDOWS = 256, 4096  # words that a search reads in its first step, and in each later one
_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


class Book:
  """The pool and the tables of one group, for `HostLedger`, which asks before it changes them.

  Args:
    config: Sizes of the group's cache.
  """

  def __init__(self, config: CacheConfig):
    n, s = config.num_pages, config.num_rows
    self.page_size = config.page_size
    self.copy_on_write = config.copy_on_write
    self.window = config.window
    self.bitmap = np.packbits(np.arange(-(-n // 32) * 32) < n, bitorder="little").view(np.uint32)
    self.refcount = np.zeros(n, np.int32)  # holders of each page, rows and host alike
    self.holds = np.zeros(n, np.int32)  # the part of `refcount` that is the host's
    self.num_free = n
    self.cursor = 0  # page where the next search for a free one starts
    self.block_tables = np.full((s, config.pages_per_row), n, np.int32)
    self.starts = np.zeros(s, np.int32)
    self.lengths = np.zeros(s, np.int32)
    self.stale = np.zeros(s, np.bool_)
    self.num_copies = 0  # pages that `extend` and `unshare` copied
    self.touched: set[int] = set()  # held pages whose holders changed; the user of it clears it
    self._mark: _Mark | None = None

  @property
  def num_pages(self) -> int:
    """Pages in the pool, N; also the id that means "no page"."""
    return self.refcount.shape[0]

  @property
  def num_rows(self) -> int:
    """Rows of the batch, S; also the id that means "no row"."""
    return self.lengths.shape[0]

  @property
  def pages_per_row(self) -> int:
    """Pages that one row can map, P."""
    return self.block_tables.shape[1]

  @property
  def capacity(self) -> int:
    """Tokens that one row can hold, P * T."""
    return self.pages_per_row * self.page_size

  def snapshot(self) -> types.Ledger:
    """A copy in the form of the device's ledger."""

    def copy(array) -> Any:
      return np.array(array)

    pool = Pool(
      free=copy(self.bitmap),
      refcount=copy(self.refcount),
      holds=copy(self.holds),
      num_free=copy(np.int32(self.num_free)),
      cursor=copy(np.int32(self.cursor)),
    )
    tables = Tables(
      block_tables=copy(self.block_tables),
      starts=copy(self.starts),
      lengths=copy(self.lengths),
      stale=copy(self.stale),
    )
    return types.Ledger(pool, tables, self.page_size, self.copy_on_write, self.window)

  # Questions

  def latest_start(self, lengths: np.ndarray) -> np.ndarray:
    """The last start at which rows of `lengths` tokens still have all that their next token sees."""
    if self.window is None:
      return lengths
    return np.minimum(lengths, np.maximum(lengths + 1 - self.window, 0))

  def span(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First logical page, and number of pages, of rows that hold tokens `starts..lengths`."""
    first = starts // self.page_size
    return first, -(-lengths // self.page_size) - first

  def num_alone(self, entries: np.ndarray) -> int:
    """How many pages have no other holders than these entries of the block tables."""
    pages, counts = np.unique(entries[entries < self.num_pages], return_counts=True)
    return int((self.refcount[pages] == counts).sum())

  def vacant(self, rows: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Which entries are granted: `valid` ones that name an empty row, each row once."""
    ok = valid & (rows >= 0) & (rows < self.num_rows)
    ok[ok] = self.lengths[rows[ok]] == 0
    ok[ok] = earlier(rows[ok]) == 0
    return ok

  # Changes. Every write to an array calls `_keep`, and every change of a page's holders `count`.

  def take(self, count: int, *, holds: int = 0) -> np.ndarray:
    """Takes the next `count` free pages from the cursor on; that many must be free.

    # free      . 1 . 3 4 . 6 .      cursor 3, count 3
    # taken           3 4   6        each gets one holder; the next cursor is 7
    """
    if not count:
      return np.zeros(0, np.int32)
    pages = self._search(count)
    self.count(pages, 1, holds)
    self._flip(pages, np.subtract)
    self.num_free -= count
    self.cursor = int(pages[-1] + 1) % self.num_pages
    return pages

  def _search(self, count: int) -> np.ndarray:
    """The next `count` free pages from the cursor on, once round the bitmap, window by window."""
    found, position, size = [], self.cursor, _WINDOWS[0]
    while count > 0:
      first = position // 32
      # One word more than pages: the first word may have no page from `position` on.
      words = first + self.bitmap[first : first + size].nonzero()[0][: count + 1]
      bits = np.unpackbits(self.bitmap[words].view(np.uint8), bitorder="little").nonzero()[0]
      pages = words[bits // 32] * 32 + bits % 32
      pages = pages[pages >= position][:count]
      found.append(pages)
      count -= pages.size
      position = (first + size) * 32 if first + size < self.bitmap.size else 0
      size = _WINDOWS[1]
    return np.concatenate(found)

  def count(self, pages: np.ndarray, references: int, holds: int = 0) -> None:
    """Adds `references` to the holders of each entry of `pages`; `holds` of these are the host's.

    # references, holds    1 0  a row takes it     1 1  the host too     -1 0, -1 -1  gives it up
    """
    if not pages.size:
      return
    self._keep(self.refcount, pages)
    np.add.at(self.refcount, pages, np.int32(references))
    if holds:
      self._keep(self.holds, pages)
      np.add.at(self.holds, pages, np.int32(holds))
      self.touched.update(pages.tolist())  # held before, or now
    else:
      self._touch(pages)
    emptied = set(pages[self.refcount[pages] == 0].tolist())
    if emptied:
      self._flip(np.array(list(emptied)), np.add)
      self.num_free += len(emptied)

  def _flip(self, pages: np.ndarray, change: np.ufunc) -> None:
    """Adds or subtracts the bits of `pages` in the bitmap; all are distinct, so no bit carries."""
    words = pages // 32
    self._keep(self.bitmap, words)
    change.at(self.bitmap, words, _BITS[pages % 32])

  def map(self, rows, columns: np.ndarray, pages) -> None:
    """Writes `pages` into the block tables; the caller counts the holders."""
    self.set(self.block_tables, (rows, columns), pages)

  def unmap(self, rows: np.ndarray, first: np.ndarray, count: np.ndarray) -> None:
    """Takes from each row its `count` logical pages from `first` on, and counts the holders."""
    rows, columns = spread(rows, first, count)
    pages = self.block_tables[rows, columns]
    self.map(rows, columns, self.num_pages)
    self.count(pages, -1)

  def write(self, rows: np.ndarray, starts, lengths, stale) -> None:
    """Sets which tokens rows hold."""
    self.set(self.starts, rows, starts)
    self.set(self.lengths, rows, lengths)
    self.set(self.stale, rows, stale)

  def set(self, array: np.ndarray, index, values) -> None:
    """Assigns values, and keeps the old ones for `rewind`."""
    self._keep(array, index)
    array[index] = values

  def _keep(self, array: np.ndarray, index) -> None:
    """Keeps the values that a write will change, for `rewind`."""
    if self._mark is not None:
      self._mark.writes.append((array, index, array[index].copy()))

  def _touch(self, pages: np.ndarray) -> None:
    """Notes those of `pages` that the host holds."""
    self.touched.update(pages[self.holds[pages] > 0].tolist())

  def mark(self) -> None:
    """Makes the state now the one that `rewind` brings back."""
    self._mark = _Mark([], self.num_free, self.cursor, self.num_copies)

  def rewind(self) -> None:
    """Brings back the state at the mark, which stays."""
    if self._mark is None:
      raise ValueError("rewind needs a mark, got none")
    writes, self.num_free, self.cursor, self.num_copies = self._mark
    counted = [pages for array, pages, _ in writes if array is self.refcount]
    for pages in counted:
      self._touch(pages)
    for array, index, values in reversed(writes):
      array[index] = values
    for pages in counted:
      self._touch(pages)
    writes.clear()

  def unmark(self) -> None:
    """Forgets the mark."""
    self._mark = None


class _Mark(NamedTuple):
  """What `rewind` needs: the old values of each write since the mark, and the numbers then."""

  writes: list[tuple[np.ndarray, Any, np.ndarray]]  # array, index, old values
  num_free: int
  cursor: int
  num_copies: int


def spread(rows: np.ndarray, first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Row and column of each of the `count` table entries of `rows` from column `first` on."""
  ends = count.cumsum()
  columns = (first - ends + count).repeat(count)
  columns += np.arange(columns.size)
  return rows.repeat(count), columns


def earlier(ids: np.ndarray) -> np.ndarray:
  """For each entry of `ids`, how many earlier entries are equal."""
  order = ids.argsort(kind="stable")
  ids = ids[order]
  earlier = np.empty(ids.size, np.int64)
  earlier[order] = np.arange(ids.size) - np.searchsorted(ids, ids)
  return earlier
