"""One table of cases for the three ledgers: jnp, NumPy and plain Python, which decide the same."""

import functools
import re

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from story import config

import paged_jax
from paged_jax import groups, jitted
from paged_jax.ledger import HostLedger
from paged_jax.ledger import log as log_lib
from paged_jax.testing import replay, strategies
from paged_jax.testing.model import Model

N, S, P = 8, 3, 6  # of the table's cache, whose pages hold 4 tokens
MANY = 2**31 - 1


class Ledgers:
  """The three, after the same requests."""

  def __init__(self, config):
    self.config = config
    self.device = jitted.ledger.init(config)
    self.host = HostLedger(config)
    self.model = Model(config)

  def ask(self, verb, *operands):
    """What all of them answer; they must agree in that, and in every integer afterwards."""
    arrays = jax.tree.map(array, operands, is_leaf=lambda x: isinstance(x, list))
    if verb == "extend":
      needs = self.model.pages_needed(*operands)
      assert plain(jitted.ledger.pages_needed(self.device, *arrays)) == needs
      assert plain(self.host.pages_needed(*arrays)) == needs
    if verb == "take_held":
      size = self.each(lambda group: N)
      self.device, pages, info = jitted.ledger.take_held(self.device, *arrays, size=size)
      on_host, report = self.host.take_held(*arrays, size=size)
      images = self.each(lambda group: [[None] * group.size] * N)
      taken, ok = self.model.restore(images, *operands)
      assert plain(pages) == plain(on_host) == taken
    else:
      self.device, info, *_ = getattr(jitted.ledger, verb)(self.device, *arrays)
      report = getattr(self.host, verb)(*arrays)
      ok = getattr(self.model, verb)(*operands)
    assert plain(info.ok) == plain(report.ok) == ok
    free = self.each(lambda group: group.num_free())
    assert plain(info.num_free) == report.num_free == free
    for one, other in zip(groups.each(self.host.snapshot()), groups.each(self.device), strict=True):
      replay.same(one, other)
    replay.compare_ledger(self.host.snapshot(), self.model)
    return ok

  def each(self, function):
    """A value of each group of the model."""
    return self.model.like([function(group) for group in self.model.groups])


def array(values):
  values = np.asarray(values)
  return values if values.dtype == bool else values.astype(np.int32)


def plain(values):
  """The values of all groups as plain Python."""
  return groups.like(values, [np.asarray(each).tolist() for each in groups.each(values)])


def call(verb, *values, ok):
  """A verb of one operand."""
  if verb in ("hold", "drop"):
    pages, ok = padded(values, ok)
    return verb, (pages,), ok
  return verb, (list(values),), ok


def padded(pages, ok):
  """Pages of one group, and what a verb answers for each."""
  more = strategies.PAGES - len(pages)
  return [*pages, *[N] * more], ok + "T" * more


def in_each(verb, *entries):
  """A verb on pages of each group; entries are (pages, answers)."""
  pages, ok = zip(*(padded(*entry) for entry in entries))
  return verb, (pages,), ok


extend = functools.partial(call, "extend")


def fork(*entries, ok):
  """Entries are (source, target, tokens)."""
  more = strategies.FORKS - len(entries)
  columns = zip(*entries, *[(S, S, 0)] * more)
  return "fork", tuple(list(column) for column in columns), ok + "T" * more


def adopt(*entries, ok):
  """Entries are (row, pages, tokens, start)."""
  more = strategies.ADOPTED - len(entries)
  filled = [(row, pages + [N] * (P - len(pages)), *rest) for row, pages, *rest in entries]
  columns = zip(*filled, *[(S, [N] * P, 0, 0)] * more)
  return "adopt", tuple(list(column) for column in columns), ok + "T" * more


def adopt_in_each(row, pages, tokens, starts, ok):
  """One entry; pages and starts are those of each group."""
  filled = tuple([own + [N] * (P - len(own)), [N] * P] for own in pages)
  rows, lengths = [row, S], [tokens, 0]
  return "adopt", (rows, filled, lengths, tuple([start, 0] for start in starts)), ok + "T"


def take_held(count, ok):
  return "take_held", (count,), ok


# name: verbs with what they answer, tables afterwards (. for no page), refcounts afterwards
CASES = {
  "pages are taken in order, row by row": (
    [extend(5, 0, 9, ok="TTT")],
    ["01....", "......", "234..."], "11111000",
  ),
  "a row that is too long and a negative one are refused alone": (
    [extend(25, -1, 4, ok="FFT")],
    ["......", "......", "0....."], "10000000",
  ),
  "a request near the end of int32 does not wrap around": (
    [extend(2, 0, 0, ok="TTT"), extend(MANY, MANY, 1, ok="FFT"), extend(-MANY, 0, 0, ok="FTT")],
    ["0.....", "......", "1....."], "11000000",
  ),
  "behind a row short of pages nobody takes any, and who needs none goes on": (
    [extend(20, 0, 2, ok="TTT"), extend(0, 12, 1, ok="TFT"), extend(0, 12, 2, ok="TFF")],
    ["01234.", "......", "5....."], "11111100",
  ),
  "a full pool refuses, and gives out what comes back": (
    [extend(24, 8, 0, ok="TTT"), extend(0, 0, 1, ok="TTF"),
     call("free", False, True, False, ok="TTT"),
     extend(0, 0, 5, ok="TTT")],
    ["012345", "......", "67...."], "11111111",
  ),
  "the search goes on where it stopped, round the pool": (
    [extend(8, 8, 8, ok="TTT"), call("free", True, False, False, ok="TTT"),
     extend(16, 0, 0, ok="TTT")],
    ["6701..", "23....", "45...."], "11111111",
  ),
  "of three sharers that write the last keeps the page": (
    [extend(6, 0, 0, ok="TTT"), fork((0, 1, 6), (0, 2, 6), ok="TT"), extend(1, 1, 1, ok="TTT")],
    ["02....", "03....", "01...."], "31110000",
  ),
  "a sharer behind a refused one is not alone on the page": (
    [extend(6, 0, 0, ok="TTT"), take_held(5, True), fork((0, 1, 6), (0, 2, 6), ok="TT"),
     extend(1, 1, 1, ok="TFF")],
    ["07....", "01....", "01...."], "32111111",
  ),
  "a copy and new pages in one request, the copy first": (
    [extend(6, 0, 0, ok="TTT"), fork((0, 2, 5), ok="T"), extend(7, 0, 1, ok="TTT")],
    ["0234..", "......", "01...."], "21111000",
  ),
  "the host's hold on a tail page makes its row copy": (
    [extend(6, 0, 0, ok="TTT"), call("hold", 1, ok="T"), extend(1, 0, 0, ok="TTT")],
    ["02....", "......", "......"], "11100000",
  ),
  "forks name each empty row once, and padding is no fork": (
    [extend(10, 0, 0, ok="TTT"), fork((0, 1, 8), (0, 1, 4), ok="TF"), fork((0, S, 4), (7, 2, 0),
     ok="TF")],
    ["012...", "01....", "......"], "22100000",
  ),
  "a fork of more than is held, into a busy row, or of less than nothing is refused": (
    [extend(10, 4, 0, ok="TTT"), fork((0, 2, 11), (0, 1, 4), ok="FF"), fork((0, 2, -1),
     (-1, 2, 0), ok="FF"),
     fork((0, -1, 4), (0, 4, 4), ok="FF")],
    ["012...", "3.....", "......"], "11110000",
  ),
  "a fork of a row that slid begins where that does": (
    [extend(12, 0, 0, ok="TTT"), call("slide", 5, 0, 0, ok="TTT"), fork((0, 1, 4), (0, 2, 9),
     ok="FT"),
     extend(0, 0, 1, ok="TTT")],
    [".12...", "......", ".13..."], "02110000",
  ),
  "rows change places, and S empties one": (
    [extend(5, 3, 4, ok="TTT"), call("reorder", 1, 0, S, ok="TTT"),
     call("reorder", -1, 4, 2, ok="FFT")],
    ["2.....", "01....", "......"], "11100000",
  ),
  "all rows become shares of one": (
    [extend(5, 3, 4, ok="TTT"), call("reorder", 0, 0, 0, ok="TTT")],
    ["01....", "01....", "01...."], "33000000",
  ),
  "an unshare copies what others hold from a token on": (
    [extend(10, 0, 0, ok="TTT"), fork((0, 1, 8), ok="T"), call("unshare", 10, 5, 0, ok="TTT")],
    ["012...", "03....", "......"], "21110000",
  ),
  "behind an unshare short of pages nobody takes any": (
    [extend(8, 0, 4, ok="TTT"), take_held(4, True), fork((0, 1, 8), ok="T"),
     call("unshare", 0, 5, 0, ok="FFT"), call("unshare", 9, -1, 4, ok="FFT"),
     call("unshare", 4, 0, 0, ok="TFT")],
    ["07....", "01....", "2....."], "21111111",
  ),
  "a trim keeps a row's beginning, down to its start or to nothing": (
    [extend(12, 8, 4, ok="TTT"), call("slide", 5, 0, 0, ok="TTT"), call("trim", 5, 0, 5, ok="TTF"),
     call("trim", 4, 0, -1, ok="FTF")],
    [".1....", "......", "5....."], "01000100",
  ),
  "a slide passes whole pages, all of them at the end": (
    [extend(12, 8, 0, ok="TTT"), call("slide", 9, 8, 1, ok="TTF"),
     call("slide", 3, 9, -1, ok="TFF"),
     extend(0, 1, 0, ok="TTT")],
    ["..2...", "..5...", "......"], "00100100",
  ),
  "an empty row has nothing to free": (
    [extend(4, 0, 4, ok="TTT"), call("free", True, True, False, ok="TFT")],
    ["......", "......", "1....."], "01000000",
  ),
  "holds count, also of a page named twice": (
    [extend(5, 0, 0, ok="TTT"), call("hold", 1, 1, N, -1, ok="TTTF"),
     call("hold", 5, 0, 9, 7, ok="FTFF"),
     call("drop", 1, 1, 1, 0, ok="TTFT")],
    ["01....", "......", "......"], "11000000",
  ),
  "a held page outlives its row": (
    [extend(8, 0, 0, ok="TTT"), call("hold", 0, ok="T"), call("free", True, False, False, ok="TTT"),
     call("trim", 1, 0, 0, ok="FTT")],
    ["......", "......", "......"], "10000000",
  ),
  "a drop without a hold is refused, at both ends of the pool": (
    [take_held(8, True), call("drop", 0, 7, 7, 0, ok="TTFF"),
     call("drop", -1, 8, 9, MANY, ok="FTFF")],
    ["......", "......", "......"], "01111110",
  ),
  "pages are taken for the host all or none": (
    [take_held(9, False), take_held(-1, False), extend(4, 0, 0, ok="TTT"), take_held(8, False),
     take_held(0, True), take_held(7, True)],
    ["0.....", "......", "......"], "11111111",
  ),
  "rows begin on held pages, from the page of their start on": (
    [take_held(3, True), adopt((1, [1, 2], 11, 5), (0, [0], 4, 0), ok="TT"),
     extend(0, 1, 1, ok="TTT")],
    ["0.....", ".13...", "4....."], "22111000",
  ),
  "a row does not begin on what nobody holds, on too few pages, or twice": (
    [extend(4, 0, 0, ok="TTT"), take_held(2, True), adopt((1, [0], 4, 0), (2, [1], 5, 0), ok="FF"),
     adopt((0, [1], 4, 0), (-1, [1], 4, 0), ok="FF"), adopt((1, [1], 4, 0), (1, [2], 4, 0),
     ok="TF"),
     adopt((2, [1], 4, 5), (2, [1, 2], 25, 0), ok="FF"), adopt((2, [], 0, 0), (2, [1], 3, 0),
     ok="TF"),
     adopt((2, [-1], 4, 0), (2, [9], MANY, 0), ok="FF")],
    ["0.....", "1.....", "......"], "12100000",
  ),
  "a page that is in a row twice": (
    [take_held(1, True), adopt((0, [0, 0], 7, 0), ok="T"), call("drop", 0, ok="T"),
     call("unshare", 0, 0, 0, ok="TTT")],
    ["12....", "......", "......"], "01100000",
  ),
}  # fmt: skip
WHOLE = {  # without copies on write
  "only whole pages are shared": (
    [extend(6, 4, 0, ok="TTT"), fork((0, 2, 6), (0, 2, 4), ok="FT"),
     call("reorder", 0, 0, 2, ok="TFT"),
     call("reorder", 0, S, 1, ok="TTT")],
    ["01....", "......", "2....."], "11100000",
  ),
  "what would need a copy is refused, and others go on": (
    [extend(6, 0, 0, ok="TTT"), call("hold", 1, ok="T"), extend(1, 1, 0, ok="FTT"),
     extend(-1, 4, 25, ok="FTF"),
     call("unshare", 0, 0, 0, ok="FTT"), call("drop", 1, ok="T"), extend(1, 0, 0, ok="TTT")],
    ["01....", "23....", "......"], "11110000",
  ),
  "rows begin on whole pages": (
    [take_held(2, True), adopt((0, [0, 1], 7, 0), (1, [0, 1], 8, 5), ok="FT")],
    ["......", ".0....", "......"], "21000000",
  ),
}  # fmt: skip


WINDOWS = {  # window: cases of a cache that keeps so many tokens
  1: {
    "of one token, only the page of the next one is kept": (
      [extend(4, 6, 1, ok="TTT"), extend(1, 1, 0, ok="TTT"), call("trim", 4, 5, 1, ok="TFT")],
      ["......", ".2....", "3....."], "00110000",
    ),
    "of one token, a row without pages is shared, grows and is freed like others": (
      [extend(4, 0, 0, ok="TTT"), extend(1, 0, 0, ok="TTT"), call("trim", 4, 0, 0, ok="TTT"),
       fork((0, 1, 4), (0, 2, 3), ok="TF"), extend(1, 1, 0, ok="TTT"),
       call("reorder", 0, 1, 1, ok="TTT"), call("trim", 4, 5, 4, ok="TTT"),
       call("free", True, False, True, ok="TTT")],
      ["......", ".3....", "......"], "00010000",
    ),
  },
  4: {
    "of one page, the page before goes only one token after a page's edge": (
      [extend(7, 8, 24, ok="TTF"), extend(1, 1, 0, ok="TTT"), extend(4, 3, 0, ok="TTT"),
       extend(1, 0, 0, ok="TTT")],
      ["..56..", ".34...", "......"], "00011110",
    ),
  },
  5: {
    "a page goes in the step that passes it, of rows that ask for tokens": (
      [extend(7, 8, 8, ok="TTT"), extend(1, 1, 0, ok="TTT")],
      ["01....", ".36...", "45...."], "11011110",
    ),
    "a refused row has given up what no token sees": (
      [extend(12, 12, 0, ok="TTT"), take_held(2, True), extend(12, 0, 0, ok="FTT"),
       extend(8, 0, 1, ok="TTF")],
      ["..201.", "345...", "......"], "11111111",
    ),
    "a row that asks for too much gives up nothing": (
      [extend(12, 12, 0, ok="TTT"), extend(13, -1, 0, ok="FFT")],
      ["012...", "345...", "......"], "11111100",
    ),
    "a length whose window is no longer whole is refused": (
      [extend(12, 0, 0, ok="TTT"), extend(1, 0, 0, ok="TTT"), call("trim", 11, 0, 0, ok="FTT"),
       fork((0, 1, 11), (0, 1, -1), (0, 1, 12), ok="FFT"), call("hold", 2, ok="T"),
       adopt((2, [2], 11, 8), (2, [2], 12, 9), ok="FF"),
       adopt((2, [2], -1, 0), (2, [2], 12, 8), ok="FT"),
       call("slide", 10, 9, 8, ok="FFT"), call("trim", 12, 0, 11, ok="TTF")],
      ["..2...", "......", "..2..."], "00300000",
    ),
    "a slide leaves what the next token sees": (
      [extend(12, 12, 3, ok="TTT"), call("slide", 8, 9, 1, ok="TFF"),
       call("slide", 8, 8, 0, ok="TTT"), extend(1, 0, 0, ok="TTT")],
      ["..27..", "..5...", "6....."], "00100111",
    ),
    "a page that one of its rows has passed stays with the others": (
      [extend(8, 0, 0, ok="TTT"), fork((0, 1, 8), (0, 2, 6), ok="TT"), extend(1, 0, 0, ok="TTT"),
       extend(0, 0, 1, ok="TTT"), extend(0, 1, 0, ok="TTT")],
      [".12...", ".14...", "03...."], "12111000",
    ),
    "a row writes into a page that the other has just passed, without a copy": (
      [take_held(3, True), adopt((0, [0, 1], 6, 0), (1, [0, 1, 2], 12, 0), ok="TT"),
       call("drop", 0, 1, 2, ok="TTT"), extend(1, 1, 0, ok="TTT")],
      ["01....", "..23..", "......"], "11110000",
    ),
  },
  30: {
    "longer than any text passes nothing": (
      [extend(23, 0, 0, ok="TTT"), extend(1, 0, 0, ok="TTT"), call("trim", 1, 0, 0, ok="TTT"),
       fork((0, 1, 1), ok="T"), extend(1, 1, 0, ok="TTT"), call("slide", 0, 1, 0, ok="TFT")],
      ["6.....", "0.....", "......"], "10000010",
    ),
  },
}  # fmt: skip
# Of two groups: all tokens in pages of 4, and a window of 3 tokens in pages of 2.
GROUPS = {
  "a row that one pool refuses is refused in all, and nothing is taken": (
    [extend(9, 0, 0, ok="TTT"), extend(0, 8, 1, ok="TFF"), extend(1, 0, 0, ok="TTT"),
     extend(0, 8, 1, ok="TTT")],
    (["012...", "34....", "5....."], ["...34.......", "5670........", "1..........."]),
    ("11111100", "11011111"),
  ),
  "whichever pool it is": (
    [take_held((5, 0), True), extend(6, 8, 1, ok="TFF"), extend(1, 8, 0, ok="TFT"),
     extend(2, 1, 3, ok="TFF")],
    (["567...", "......", "......"], ["..234.......", "............", "............"]),
    ("11111111", "00111000"),
  ),
  "a row that needs a page in one pool only is refused for want of it": (
    [extend(2, 0, 0, ok="TTT"), take_held((0, 7), True), extend(1, 0, 0, ok="FTT"),
     in_each("drop", ([], ""), ([4], "T")), extend(1, 0, 0, ok="TTT")],
    (["0.....", "......", "......"], ["04..........", "............", "............"]),
    ("10000000", "11111111"),
  ),
  "of sharers, one that is refused in one pool is a holder in all": (
    [extend(3, 0, 0, ok="TTT"), fork((0, 1, 3), (0, 2, 3), ok="TT"), take_held((5, 5), True),
     extend(1, 1, 1, ok="TFF")],
    (["6.....", "0.....", "0....."], ["07..........", "01..........", "01.........."]),
    ("21111110", "32111111"),
  ),
  "each group copies the page that it would write": (
    [extend(5, 0, 0, ok="TTT"), fork((0, 1, 5), (0, 2, 4), ok="TT"), extend(1, 0, 0, ok="TTT"),
     call("free", False, False, True, ok="TTT"), fork((0, 2, 6), ok="T"),
     extend(0, 0, 1, ok="TTT")],
    (["02....", "01....", "03...."], [".13.........", "012.........", "..34........"]),
    ("31110000", "12121000"),
  ),
  "what one group's window has passed no group brings back": (
    [extend(7, 3, 0, ok="TTT"), extend(2, 0, 0, ok="TTT"), call("trim", 6, 3, 0, ok="FTT"),
     fork((0, 2, 6), (1, 2, 3), ok="FT"), call("slide", 8, 2, 1, ok="FFT"),
     call("slide", 6, 1, 0, ok="TTT"), call("trim", 8, 3, 1, ok="TTF"),
     call("reorder", 1, 0, S, ok="TTT")],
    (["2.....", ".1....", "......"], ["45..........", "...3........", "............"]),
    ("01100000", "00011100"),
  ),
  "pages are taken for the host in all pools or in none": (
    [take_held((2, 9), False), take_held((9, 2), False), take_held((-1, 2), False),
     take_held((3, 0), True), in_each("drop", ([0, 2, 2], "TTF"), ([0], "F")),
     in_each("hold", ([1, 0], "TF"), ([], ""))],
    (["......", "......", "......"], ["............"] * 3),
    ("02000000", "00000000"),
  ),
  "a row begins on held pages of all groups, each from its start on": (
    [take_held((2, 3), True), adopt_in_each(0, ([0, 1], [0, 1, 7]), 6, (0, 0), ok="F"),
     adopt_in_each(0, ([0, 7], [0, 1, 2]), 6, (0, 0), ok="F"),
     adopt_in_each(0, ([0, 1], [2]), 6, (0, 5), ok="F"),
     adopt_in_each(0, ([0, 1], [2]), 6, (0, 4), ok="T"), extend(1, 0, 0, ok="TTT")],
    (["02....", "......", "......"], ["..23........", "............", "............"]),
    ("21100000", "11210000"),
  ),
  "an unshare that one pool refuses copies nothing": (
    [extend(6, 0, 0, ok="TTT"), fork((0, 1, 6), ok="T"), take_held((6, 3), True),
     call("unshare", 4, 4, 0, ok="FFT"), in_each("drop", ([2], "T"), ([], "")),
     call("unshare", 4, 4, 0, ok="TTT")],
    (["02....", "01....", "......"], ["016.........", "012.........", "............"]),
    ("21111111", "22111110"),
  ),
  "an unshare that another pool refuses copies nothing": (
    [extend(6, 0, 0, ok="TTT"), fork((0, 1, 6), ok="T"), take_held((0, 5), True),
     call("unshare", 4, 4, 0, ok="FFT")],
    (["01....", "01....", "......"], ["012.........", "012.........", "............"]),
    ("22000000", "22211111"),
  ),
}  # fmt: skip
UNEQUAL = {  # of two groups, one with room for 24 tokens in a row and one for 8
  "a row grows as far as every group has room": (
    [extend(9, 8, 0, ok="FTT"), extend(0, 1, 1, ok="TFT")],
    (["......", "01....", "2....."], ["..", "01", "2."]),
    ("11100000", "11100000"),
  ),
}  # fmt: skip
WHOLE_GROUPS = {  # without copies on write
  "only what is whole pages in all groups is shared": (
    [extend(6, 0, 0, ok="TTT"), fork((0, 1, 6), (0, 2, 4), ok="FT"),
     call("reorder", 0, 0, 2, ok="TFT"), in_each("hold", ([1], "T"), ([], "")),
     extend(1, 4, 0, ok="FTT"), in_each("drop", ([1], "T"), ([], "")), extend(1, 0, 0, ok="TTT")],
    (["01....", "2.....", "0....."], ["..25........", "34..........", "01.........."]),
    ("21100000", "11111100"),
  ),
}  # fmt: skip
ALONE, TOGETHER = {}, ({}, dict(page_size=2, window=3))
TABLES = [
  (CASES, ALONE, True),
  (WHOLE, ALONE, False),
  *((cases, dict(window=window), True) for window, cases in WINDOWS.items()),
  (GROUPS, TOGETHER, True),
  (UNEQUAL, ({}, dict(max_length=8)), True),
  (WHOLE_GROUPS, TOGETHER, False),
]


def configs(fields, copy_on_write):
  made = [config(copy_on_write=copy_on_write, **each) for each in groups.each(fields)]
  return groups.like(fields, made)


@pytest.mark.parametrize(
  "case, configs",
  [
    pytest.param(case, configs(fields, copy_on_write), id=f"{name}-{copy_on_write}")
    for cases, fields, copy_on_write in TABLES
    for name, case in cases.items()
  ],
)
def test_case(case, configs):
  verbs, tables, refcounts = case
  ledgers = Ledgers(configs)
  for verb, operands, ok in verbs:
    assert ledgers.ask(verb, *operands) == answers(ok), (verb, operands)
  books = ledgers.host.groups
  found = [
    ["".join(map(str, row)).replace(str(N), ".") for row in book.block_tables] for book in books
  ]
  assert groups.like(configs, found) == tables
  assert groups.like(configs, ["".join(map(str, book.refcount)) for book in books]) == refcounts


def answers(ok):
  """Flags as text, as a verb gives them: a list, one of each group, or one flag."""
  if isinstance(ok, bool):
    return ok
  return groups.like(ok, [[letter == "T" for letter in each] for each in groups.each(ok)])


THREE, TWO = [0] * 3, [0] * 2
FORMS = {  # verb, operands, what the error says
  "hold one list": ("hold", (THREE,), "pages must be a tuple of 2, as the cache is, got ndarray"),
  "drop three": ("drop", ((THREE, THREE, THREE),), "pages must be a tuple of 2.*got a tuple of 3"),
  "adopt one array": ("adopt", (TWO, [TWO, TWO], TWO), "pages must be a tuple of 2"),
  "adopt one start": (
    "adopt", (TWO, ([TWO, TWO], [TWO, TWO]), TWO, TWO), "starts must be a tuple of 2",
  ),
  "adopt another shape": (
    "adopt", (TWO, ([TWO, TWO], [TWO]), TWO, (TWO, TWO)), r"pages must.*\[2, any\].*\[1, 2\]",
  ),
  "take one number": ("take_held", (1, (N, N)), "count must be a tuple of 2"),
  "take into one size": ("take_held", ((1, 1), N), "size must be a tuple of 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_an_argument_that_is_not_one_of_each_group_is_named(name):
  verb, operands, message = FORMS[name]
  operands = jax.tree.map(array, operands, is_leaf=lambda x: isinstance(x, list))
  both = configs(TOGETHER, True)
  with pytest.raises(ValueError, match=message):
    getattr(paged_jax.ledger, verb)(jitted.ledger.init(both), *operands)
  with pytest.raises(ValueError, match=message):
    getattr(HostLedger(both), verb)(*operands)


def test_one_cache_takes_no_tuple():
  with pytest.raises(ValueError, match="pages must be no tuple, as the cache is, got a tuple of 1"):
    paged_jax.ledger.hold(jitted.ledger.init(config()), (array(THREE),))
  with pytest.raises(ValueError, match="pages must be no tuple, as the cache is, got a tuple of 1"):
    HostLedger(config()).hold((array(THREE),))


@pytest.mark.parametrize("other", [dict(num_rows=2), dict(copy_on_write=False)], ids=str)
def test_groups_with_different_rows_are_refused(other):
  both = config(), config(**other)
  message = re.escape("must have the same num_rows and copy_on_write, got [(3, True), (")
  ledgers = tuple(jitted.ledger.init(each) for each in both)
  for call in (
    lambda: paged_jax.init(both),
    lambda: HostLedger(both),
    lambda: paged_jax.ledger.extend(ledgers, array(THREE)),
  ):
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.parametrize("copy_on_write", [True, False])
def test_every_history_goes_the_same_way(copy_on_write):
  fields = dict(num_rows=5, num_pages=7, max_length=20, copy_on_write=copy_on_write)

  @settings(
    max_examples=25, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
  )  # fmt: skip
  @given(strategies.histories(config(**fields), max_steps=40))
  def run(history):
    ledgers = Ledgers(config(**fields))
    for step in history:
      if step.verb == "restore":
        ledgers.ask("take_held", step.operands[1])
      elif step.verb in log_lib.VERBS:
        ledgers.ask(step.verb, *step.operands)

  run()
