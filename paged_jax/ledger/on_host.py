"""The ledger in NumPy: the same verbs as in `verbs`, with the same bits, changed in place.

The cost of a verb grows with the rows, the pages that it names, and the words of the bitmap that
its search for free pages passes. No verb visits the whole pool.
"""

from typing import Any, NamedTuple

import numpy as np

from paged_jax import arguments, types
from paged_jax.config import CacheConfig
from paged_jax.ledger import log as log_lib
from paged_jax.types import Info, Log, Pool, Tables

_WINDOWS = 256, 4096  # words that a search reads in its first step, and in each later one
_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


class HostLedger:
  """All integers of a cache, on the host.

  Its verbs take the same requests as those of `paged_jax.ledger`, and decide the same. A verb
  changes the ledger and returns an `Info` of NumPy values. The public docstrings are in
  `paged_jax.cache`.

  >>> import numpy as np, paged_jax
  >>> config = paged_jax.CacheConfig(num_rows=2, num_pages=4, page_size=8, max_length=16)
  >>> ledger = HostLedger(config)
  >>> info = ledger.extend(np.array([9, 0]))
  >>> info.ok.tolist(), info.num_free
  ([True, True], 2)
  >>> ledger.block_tables.tolist()
  [[0, 1], [4, 4]]

  A program on the device changes the device's ledger, and its report comes later. Until then the
  host goes on from a mark, as if the program did nothing. After the report it starts from the mark
  again:

      # device  extend ─ program ─ free ─ extend
      # host    extend ─ mark ──── free ─ extend ─┐ the report is here
      #                  rewind ◄─────────────────┘
      #                  replay ── free ─ extend

  >>> ledger.mark()
  >>> info = ledger.free(np.array([True, False]))
  >>> ledger.rewind()
  >>> ledger.lengths.tolist()
  [9, 0]

  Args:
    config: Sizes of the cache.
  """

  def __init__(self, config: CacheConfig):
    n, s = config.num_pages, config.num_rows
    self.page_size = config.page_size
    self.copy_on_write = config.copy_on_write
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
    return types.Ledger(pool, tables, self.page_size, self.copy_on_write)

  # Verbs

  def pages_needed(self, num_tokens: np.ndarray) -> np.ndarray:
    """Pages that `extend` would take for each row, i32[S]."""
    growth = self._growth(num_tokens)
    return growth.num_new + growth.copied

  def pages_to_begin(self, held: int, num_tokens: int) -> int:
    """Pages that a row takes to hold `num_tokens`, if it starts on `held` tokens of held pages.

    The copy of a partly filled held page counts.
    """
    size = self.page_size
    copied = num_tokens > held and held % size > 0
    return -(-num_tokens // size) - -(-held // size) + copied

  def shares_tail(self, num_tokens: np.ndarray) -> bool:
    """Whether growing by `num_tokens` i32[S] would write into a page with several holders."""
    rows = ((num_tokens > 0) & (self.lengths % self.page_size > 0)).nonzero()[0]
    tails = self.block_tables[rows, self.lengths[rows] // self.page_size]
    return bool((self.refcount[tails] > 1).any())

  def extend(self, num_tokens: np.ndarray) -> Info:
    """Makes room for `num_tokens` i32[S] more tokens in each row.

    # row before   [a     ][b  ]           others hold b too
    # row after    [a     ][c     ][d ]    the row takes c, a copy of b, and d, and gives up b
    """
    growth = self._growth(num_tokens)
    ok, lengths, need = growth.valid, growth.lengths, growth.num_new + growth.copied
    if need.any():
      fits = need.cumsum(dtype=np.int64) <= self.num_free
      rows = (fits & (need > 0)).nonzero()[0]
      first = growth.num_pages[rows] - growth.copied[rows]  # the tail, if it is copied
      rows, columns = _spread(rows, first, need[rows])
      self._map(rows, columns, self._take(rows.size))
      copied = growth.tails[fits[growth.rows] & (growth.copied[growth.rows] > 0)]
      self._count(copied, -1)
      self.num_copies += copied.size
      # After a refused row, the last sharer of a tail page still has another holder on it.
      fits |= need == 0
      fits[growth.rows] &= (need[growth.rows] > 0) | (self.refcount[growth.tails] <= 1)
      ok = ok & fits
      lengths = np.where(ok, lengths, self.lengths)
    self._set(self.stale, (self.stale & (lengths > self.lengths)).nonzero()[0], False)
    self._set(self.lengths, ..., lengths)
    return self._info(ok)

  def fork(self, src: np.ndarray, dst: np.ndarray, num_tokens: np.ndarray | None = None) -> Info:
    """Makes rows `dst` i32[B] share the first `num_tokens` i32[B] tokens of rows `src` i32[B].

    # src          [a][b][c]     1 1 1 holders before, 2 2 1 after
    # dst after    [a][b]        b may be shared in part
    """
    src = arguments.host_integers("src", src, (None,))
    dst = arguments.host_integers("dst", dst, src.shape)
    known = (src >= 0) & (src < self.num_rows)
    source = np.where(known, src, 0)
    held = np.where(known, self.lengths[source], 0)
    tokens = held if num_tokens is None else num_tokens
    tokens = arguments.host_integers("num_tokens", tokens, src.shape)
    starts = np.where(tokens > 0, self.starts[source], 0)
    valid = known & (tokens >= starts) & (tokens <= held)
    if not self.copy_on_write:
      valid &= tokens % self.page_size == 0
    ok = self._vacant(dst, valid)
    source, target, starts, tokens = source[ok], dst[ok], starts[ok], tokens[ok]
    stale = (tokens > 0) & (self.stale[source] | (tokens < self.lengths[source]))
    first, count = self._span(starts, tokens)
    rows, columns = _spread(source, first, count)
    pages = self.block_tables[rows, columns]
    self._count(pages, 1)
    self._map(np.repeat(target, count), columns, pages)
    self._write(target, starts, tokens, stale)
    return self._info(ok | (dst == self.num_rows))

  def reorder(self, sources: np.ndarray) -> Info:
    """Makes row r a share of row `sources[r]`, all rows at once; S empties a row.

    # row 0    [a][b]   ──▶   [a][c]       sources 1, 1: row 0 becomes a holder of a and c,
    # row 1    [a][c]   ──▶   [a][c]       and gives up a and b
    """
    s = self.num_rows
    sources = arguments.host_integers("sources", sources, (s,))
    own = np.arange(s)
    ok = (sources >= 0) & (sources <= s)
    if not self.copy_on_write:
      whole = np.append(self.lengths % self.page_size == 0, True)  # no row has no partial page
      ok &= whole[np.where(ok, sources, s)] | (sources == own)
    changed = (ok & (sources != own)).nonzero()[0]
    target = changed[sources[changed] < s]
    source = sources[target]
    starts, lengths, stale = self.starts[source], self.lengths[source], self.stale[source]
    first, count = self._span(starts, lengths)
    rows, columns = _spread(source, first, count)
    pages = self.block_tables[rows, columns]
    # All rows become holders of their new pages before any row gives up its old ones.
    self._count(pages, 1)
    self._unmap(changed, *self._span(self.starts[changed], self.lengths[changed]))
    self._map(np.repeat(target, count), columns, pages)
    self._write(changed, 0, 0, False)
    self._write(target, starts, lengths, stale)
    return self._info(ok)

  def unshare(self, starts: np.ndarray) -> Info:
    """Makes each row the only holder of its pages from the one of token `starts` i32[S] on.

    # row before   [a][b][c]      others hold a and b too; `starts` is on b
    # row after    [a][d][c]      the row takes d, a copy of b, and gives up b
    """
    starts = arguments.host_integers("starts", starts, (self.num_rows,))
    ok = (starts >= 0) & (starts <= self.lengths)
    first, count = self._span(np.maximum(starts, self.starts), self.lengths)
    asking = (ok & (starts < self.lengths)).nonzero()[0]
    rows, columns = _spread(asking, first[asking], count[asking])
    shared = self.refcount[self.block_tables[rows, columns]] > 1
    short = False  # whether pages were missing for a row: no later row takes any
    for row in np.unique(rows[shared]).tolist():
      begin, end = int(first[row]), int(first[row] + count[row])
      columns = np.arange(begin, end)
      pages = self.block_tables[row, columns]
      shared = self.refcount[pages] > 1  # of n sharers the last keeps the page
      columns, pages = columns[shared], pages[shared]
      if not pages.size:
        continue
      short |= pages.size > self.num_free
      if short or not self.copy_on_write:
        ok[row] = False
        continue
      self._map(row, columns, self._take(pages.size))
      self._count(pages, -1)
      self.num_copies += pages.size
      if columns[-1] + 1 == end:  # the copy of the tail page is clean
        self._set(self.stale, row, False)
    return self._info(ok)

  def trim(self, lengths: np.ndarray) -> Info:
    """Cuts each row to its first `lengths` i32[S] tokens, and gives up whole pages after them."""
    lengths = arguments.host_integers("lengths", lengths, (self.num_rows,))
    ok = (lengths <= self.lengths) & (lengths >= 0) & ((lengths >= self.starts) | (lengths == 0))
    rows = (ok & (lengths < self.lengths)).nonzero()[0]
    lengths, starts = lengths[rows], self.starts[rows]
    some = lengths > 0
    first, count = self._span(starts, self.lengths[rows])
    keep = np.where(some, -(-lengths // self.page_size) - first, 0)
    self._unmap(rows, first + keep, count - keep)
    self._write(rows, np.where(some, starts, 0), lengths, some)
    return self._info(ok)

  def slide(self, starts: np.ndarray) -> Info:
    """Forgets each row's tokens before `starts` i32[S], and gives up whole pages of these."""
    starts = arguments.host_integers("starts", starts, (self.num_rows,))
    ok = (starts >= 0) & (starts <= self.lengths)
    rows = (ok & (starts > self.starts)).nonzero()[0]
    first = self.starts[rows] // self.page_size
    self._unmap(rows, first, starts[rows] // self.page_size - first)
    self._set(self.starts, rows, starts[rows])
    return self._info(ok)

  def free(self, rows: np.ndarray) -> Info:
    """Empties the rows marked in `rows` bool[S]: they give up all their pages."""
    rows = arguments.host_booleans("rows", rows, (self.num_rows,))
    filled = rows & (self.lengths > 0)
    marked = filled.nonzero()[0]
    self._unmap(marked, *self._span(self.starts[marked], self.lengths[marked]))
    self._write(marked, 0, 0, False)
    return self._info(~rows | filled)

  def hold(self, pages: np.ndarray) -> Info:
    """Adds a hold of the host for each entry of `pages` i32[B]."""
    pages = arguments.host_integers("pages", pages, (None,))
    ok = (pages >= 0) & (pages < self.num_pages)
    ok[ok] = self.refcount[pages[ok]] > 0
    self._count(pages[ok], 1, 1)
    return self._info(ok | (pages == self.num_pages))

  def drop(self, pages: np.ndarray) -> Info:
    """Removes a hold of the host for each entry of `pages` i32[B]."""
    pages = arguments.host_integers("pages", pages, (None,))
    ok = (pages >= 0) & (pages < self.num_pages)
    ok[ok] = _earlier(pages[ok]) < self.holds[pages[ok]]
    self._count(pages[ok], -1, -1)
    return self._info(ok | (pages == self.num_pages))

  def adopt(
    self,
    rows: np.ndarray,
    pages: np.ndarray,
    lengths: np.ndarray,
    starts: np.ndarray | None = None,
  ) -> Info:
    """Starts empty rows i32[B] on held `pages` i32[B,C], with `lengths` i32[B] tokens.

    # host         [a][b]     1 1 holders before
    # row after    [a][b]     2 2 holders: the host's holds remain
    """
    rows = arguments.host_integers("rows", rows, (None,))
    pages = arguments.host_integers("pages", pages, (*rows.shape, None))
    lengths = arguments.host_integers("lengths", lengths, rows.shape)
    starts = np.zeros_like(lengths) if starts is None else starts
    starts = arguments.host_integers("starts", starts, rows.shape)
    valid = (starts >= 0) & (starts <= lengths) & (lengths <= self.capacity)
    if not self.copy_on_write:
      valid &= lengths % self.page_size == 0
    first, count = self._span(np.where(valid, starts, 0), np.where(valid, lengths, 0))
    listed = np.arange(pages.shape[1]) < count[:, None]
    known = (pages >= 0) & (pages < self.num_pages)
    held = known & (self.holds[np.where(known, pages, 0)] > 0)
    ok = self._vacant(rows, valid & (count <= pages.shape[1]) & (held | ~listed).all(axis=1))
    used = pages[listed & ok[:, None]]
    self._count(used, 1)
    self._map(*_spread(rows[ok], first[ok], count[ok]), used)
    self._write(rows[ok], starts[ok], lengths[ok], lengths[ok] > 0)
    return self._info(ok | (rows == self.num_rows))

  def take_held(self, count: np.ndarray | np.int32, size: int) -> tuple[np.ndarray, Info]:
    """Takes `count` i32[] free pages, which the host then holds, all or none.

    Returns:
      The pages i32[size] (N past the last), and `Info` with ok bool[].
    """
    wanted = int(arguments.host_integers("count", count, ()))
    ok = 0 <= wanted <= min(size, self.num_free)
    pages = np.full(size, self.num_pages, np.int32)
    if ok:
      pages[:wanted] = self._take(wanted, holds=1)
    return pages, self._info(np.bool_(ok))

  # Programs that report later

  def replay(self, log: Log) -> None:
    """Repeats all verbs in `log`, step by step.

    Raises:
      ValueError: The log names a verb that a ledger does not have, lacks operands, or has operands
        with different numbers of steps.
    """
    log_lib.check(log)
    operands = [tuple(map(np.asarray, arrays)) for arrays in log.operands]
    num_steps = {len(x) for arrays in operands for x in arrays}
    if len(num_steps) > 1:
      raise ValueError(f"log.operands must have one number of steps, got {sorted(num_steps)}")
    for step in range(max(num_steps, default=0)):
      # Most programs only extend, and copy pages in their first step if at all: then all other
      # steps are done at once.
      if step < 2 and log.verbs == ("extend",) and self._extend_all(operands[0][0][step:]):
        return
      for verb, arrays in zip(log.verbs, operands):
        getattr(self, verb)(*(x[step] for x in arrays))

  def _extend_all(self, num_tokens: np.ndarray) -> bool:
    """Extends by each of `num_tokens` i32[K,S] in turn, if all are granted and no page is copied.

    Returns:
      Whether it did; if not, nothing changed.
    """
    size, lengths = self.page_size, np.zeros((len(num_tokens) + 1, self.num_rows), np.int64)
    np.cumsum(num_tokens, axis=0, out=lengths[1:])
    grows = lengths[-1] > 0
    lengths += self.lengths
    pages = (lengths + (size - 1)) // size  # before the first step, and after each
    need = pages[1:] - pages[:-1]
    total = int((pages[-1] - pages[0]).sum())
    granted = total <= self.num_free and (lengths[-1] <= self.capacity).all()
    if not granted or (num_tokens < 0).any() or self.shares_tail(grows):
      return False
    steps, rows = need.nonzero()
    rows, columns = _spread(rows, pages[steps, rows], need[steps, rows])
    self._map(rows, columns, self._take(total))
    self._set(self.stale, (self.stale & grows).nonzero()[0], False)
    self._set(self.lengths, ..., lengths[-1])
    return True

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

  # Questions

  def _info(self, ok) -> Info:
    """What a verb reports."""
    return Info._make((ok, self.num_free))

  def _growth(self, num_tokens: np.ndarray) -> "_Growth":
    """What `extend` by `num_tokens` i32[S] asks for each row."""
    num_tokens = arguments.host_integers("num_tokens", num_tokens, (self.num_rows,))
    size, before = self.page_size, self.lengths
    valid = (num_tokens >= 0) & (num_tokens <= self.capacity - before)
    lengths = before + num_tokens * valid
    num_pages = (before + (size - 1)) // size
    rows = ((lengths > before) & (num_pages * size > before)).nonzero()[0]
    tails = self.block_tables[rows, num_pages[rows] - 1]
    shared = self.refcount[tails] > 1
    copied = np.zeros(self.num_rows, np.int32)
    rows, tails = rows[shared], tails[shared]
    if rows.size and self.copy_on_write:
      # Row by row: of n sharers the first n - 1 copy the page, and the last one keeps it.
      copied[rows] = self.refcount[tails] - _earlier(tails) > 1
    elif rows.size:
      valid[rows], lengths[rows] = False, before[rows]
    num_new = (lengths + (size - 1)) // size - num_pages
    return _Growth(valid, lengths, num_pages, num_new, rows, tails, copied)

  def _span(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First logical page, and number of pages, of rows that hold tokens `starts..lengths`."""
    first = starts // self.page_size
    return first, -(-lengths // self.page_size) - first

  def _vacant(self, rows: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Which entries are granted: `valid` ones that name an empty row, each row once."""
    ok = valid & (rows >= 0) & (rows < self.num_rows)
    ok[ok] = self.lengths[rows[ok]] == 0
    ok[ok] = _earlier(rows[ok]) == 0
    return ok

  # Changes. Every write to an array calls `_keep`, and every change of a page's holders `_count`.

  def _take(self, count: int, *, holds: int = 0) -> np.ndarray:
    """Takes the next `count` free pages from the cursor on; that many must be free.

    # free      . 1 . 3 4 . 6 .      cursor 3, count 3
    # taken           3 4   6        each gets one holder; the next cursor is 7
    """
    if not count:
      return np.zeros(0, np.int32)
    pages = self._search(count)
    self._count(pages, 1, holds)
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

  def _count(self, pages: np.ndarray, references: int, holds: int = 0) -> None:
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

  def _map(self, rows, columns: np.ndarray, pages) -> None:
    """Writes `pages` into the block tables; the caller counts the holders."""
    self._set(self.block_tables, (rows, columns), pages)

  def _unmap(self, rows: np.ndarray, first: np.ndarray, count: np.ndarray) -> None:
    """Takes from each row its `count` logical pages from `first` on, and counts the holders."""
    rows, columns = _spread(rows, first, count)
    pages = self.block_tables[rows, columns]
    self._map(rows, columns, self.num_pages)
    self._count(pages, -1)

  def _write(self, rows: np.ndarray, starts, lengths, stale) -> None:
    """Sets which tokens rows hold."""
    self._set(self.starts, rows, starts)
    self._set(self.lengths, rows, lengths)
    self._set(self.stale, rows, stale)

  def _set(self, array: np.ndarray, index, values) -> None:
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


class _Mark(NamedTuple):
  """What `rewind` needs: the old values of each write since the mark, and the numbers then."""

  writes: list[tuple[np.ndarray, Any, np.ndarray]]  # array, index, old values
  num_free: int
  cursor: int
  num_copies: int


class _Growth(NamedTuple):
  """What `extend` asks for each row, whether or not enough pages are free."""

  valid: np.ndarray  # bool[S] the count is not negative and fits the row
  lengths: np.ndarray  # i32[S] tokens afterwards
  num_pages: np.ndarray  # i32[S] logical pages before
  num_new: np.ndarray  # i32[S] whole new pages
  rows: np.ndarray  # the rows that write into a partly filled page with other holders
  tails: np.ndarray  # that page of each of these rows
  copied: np.ndarray  # i32[S] 1 if that page must be copied first


def _spread(
  rows: np.ndarray, first: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Row and column of each of the `count` table entries of `rows` from column `first` on."""
  ends = count.cumsum()
  columns = (first - ends + count).repeat(count)
  columns += np.arange(columns.size)
  return rows.repeat(count), columns


def _earlier(ids: np.ndarray) -> np.ndarray:
  """For each entry of `ids`, how many earlier entries are equal."""
  order = ids.argsort(kind="stable")
  ids = ids[order]
  earlier = np.empty(ids.size, np.int64)
  earlier[order] = np.arange(ids.size) - np.searchsorted(ids, ids)
  return earlier
