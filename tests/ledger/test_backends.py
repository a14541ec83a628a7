"""One table of cases for the three ledgers: jnp, NumPy and plain Python, which decide the same."""

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from story import config

from paged_jax import jitted
from paged_jax.ledger import HostLedger
from paged_jax.ledger import log as log_lib
from paged_jax.testing import replay, strategies
from paged_jax.testing.model import Model

N, S, P = 8, 3, 6  # of the table's cache, whose pages hold 4 tokens
MANY = 2**31 - 1


class Ledgers:
  """The three, after the same requests."""

  def __init__(self, **fields):
    self.config = config(**fields)
    self.device = jitted.ledger.init(self.config)
    self.host = HostLedger(self.config)
    self.model = Model(self.config)

  def ask(self, verb, *operands):
    """What all of them answer; they must agree in that, and in every integer afterwards."""
    arrays = [np.asarray(x) if verb == "free" else np.asarray(x, np.int32) for x in operands]
    if verb == "extend":
      needs = self.model.pages_needed(*operands)
      assert jitted.ledger.pages_needed(self.device, *arrays).tolist() == needs
      assert self.host.pages_needed(*arrays).tolist() == needs
    if verb == "take_held":
      self.device, pages, info = jitted.ledger.take_held(self.device, *arrays, size=N)
      on_host, report = self.host.take_held(*arrays, size=N)
      taken, ok = self.model.restore([[None] * 4] * N, *operands)
      assert pages.tolist() == on_host.tolist() == taken
    else:
      self.device, info, *_ = getattr(jitted.ledger, verb)(self.device, *arrays)
      report = getattr(self.host, verb)(*arrays)
      ok = getattr(self.model, verb)(*operands)
    assert info.ok.tolist() == report.ok.tolist() == ok
    assert int(info.num_free) == report.num_free == self.model.groups[0].num_free()
    replay.same(self.host.snapshot(), self.device)
    replay.compare_ledger(self.host.snapshot(), self.model)
    return ok


def call(verb, *values, ok):
  """A verb of one operand."""
  more = strategies.PAGES - len(values) if verb in ("hold", "drop") else 0
  return verb, ([*values, *[N] * more],), ok + "T" * more


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


@pytest.mark.parametrize(
  "name, copy_on_write", [*((name, True) for name in CASES), *((name, False) for name in WHOLE)]
)
def test_case(name, copy_on_write):
  verbs, tables, refcounts = (CASES if copy_on_write else WHOLE)[name]
  ledgers = Ledgers(copy_on_write=copy_on_write)
  for verb, operands, ok in verbs:
    wanted = ok if isinstance(ok, bool) else [letter == "T" for letter in ok]
    assert ledgers.ask(verb, *operands) == wanted, (verb, operands)
  found = [
    "".join(map(str, row)).replace(str(N), ".") for row in ledgers.host.groups[0].block_tables
  ]
  assert found == tables
  assert "".join(map(str, ledgers.host.groups[0].refcount)) == refcounts


@pytest.mark.parametrize("copy_on_write", [True, False])
def test_every_history_goes_the_same_way(copy_on_write):
  fields = dict(num_rows=5, num_pages=7, max_length=20, copy_on_write=copy_on_write)

  @settings(
    max_examples=25, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
  )  # fmt: skip
  @given(strategies.histories(config(**fields), max_steps=40))
  def run(history):
    ledgers = Ledgers(**fields)
    for step in history:
      if step.verb == "restore":
        ledgers.ask("take_held", step.operands[1])
      elif step.verb in log_lib.VERBS:
        ledgers.ask(step.verb, *step.operands)

  run()
