"""What a caller can know of room without waiting, and several prefixes or a part at once."""

import numpy as np
import pytest
from story import config

from paged_jax.host import Manager, ManagerConfig, Prefix, Request, errors


def manager(**fields):
  return Manager(config(**fields), ManagerConfig(num_host_pages=8, min_prefix_length=1))


def test_pages_to_reach_are_those_that_extend_takes():
  m = manager(page_size=4, num_pages=16, num_rows=4, max_length=32)
  one = m.allocate(Request("one", 6))
  two = m.clone(one, "two")  # shares a partly filled tail page
  free = m.num_free

  def pages(lengths):
    by_row = np.zeros(4, np.int32)
    for handle, length in lengths.items():
      by_row[handle.row] = length
    return m.pages_to_reach(by_row)

  assert pages({one: 6, two: 6}) == 0
  assert pages({one: 4}) == 0  # no less than it has
  assert pages({one: 8}) == 1  # the copy
  assert pages({one: 9, two: 13}) == 1 + 1 + 2  # the last sharer copies nothing
  m.extend_many({one: 3, two: 7})
  assert free - m.num_free == 4


def test_pages_to_search_bound_any_order_of_rows():
  m = manager(page_size=4, num_pages=16, num_rows=4, max_length=32)
  handles = [m.allocate(Request("0", 6)), *(m.allocate(Request(str(i), 0)) for i in (1, 2))]
  # page 0 stays shared, each of three comes to hold its own pages 1 and 2, one of which is there
  assert m.pages_to_search(handles, 11, 6) == 3 * 2 - 1
  assert m.pages_to_search(handles, 6, 6) == 3 * 1 - 1
  m.store_prefix(handles[0], list(range(6)))  # somebody else holds the tail page, too
  assert m.pages_to_search(handles, 11, 6) == 3 * 2


def test_rows_pages_and_idle_pages_are_counted():
  m = manager(page_size=4, num_pages=16, num_rows=4, max_length=32)
  one = m.allocate(Request("one", tokens=range(9)))
  m.clone(one, "two")
  assert (m.num_free_rows, m.num_free, m.num_mapped, m.num_idle) == (2, 13, 6, 0)
  m.store_prefix(one)
  m.deallocate_many(["one", "two"])
  assert (m.num_free_rows, m.num_free, m.num_mapped, m.num_idle) == (4, 13, 0, 3)


def test_a_clone_can_take_the_first_tokens_only():
  m = manager(page_size=4, num_pages=16, num_rows=4, max_length=32)
  one = m.allocate(Request("one", 9))
  two = m.clone(one, "two", num_tokens=5)
  assert (two.num_tokens, two.pages) == (5, one.pages[:2])
  assert m.clone(one, "none", num_tokens=0).num_tokens == 0
  with pytest.raises(errors.UnmappedToken):
    m.clone(one, "more", num_tokens=10)
  assert m.audit().clean


def test_several_prefixes_are_stored_as_one_after_another():
  def stored(at_once):
    m = Manager(
      config(page_size=4, num_pages=16, num_rows=4, max_length=32),
      ManagerConfig(num_host_pages=8, min_prefix_length=2, max_prefixes=2),
    )
    one = m.allocate(Request("one", tokens=range(9)))
    two = m.allocate(Request("two", tokens=range(20, 27)))
    prefixes = [
      Prefix(one, range(6), last_logits="six"), Prefix(one), Prefix(two, [20]), Prefix(two, range(20, 27))
    ]  # fmt: skip
    if at_once:
      done = m.store_prefixes(prefixes)
    else:
      done = [m.store_prefix(p.handle, p.tokens, last_logits=p.last_logits) for p in prefixes]
    m.deallocate_many(["one", "two"])
    found = [m.find_prefix(range(9)), m.find_prefix(range(6)), m.find_prefix(range(20, 27))]
    report = m.audit()
    assert report.clean, report
    return (
      done,
      [(match.length, match.last_logits) for match in found],
      m.prefix_stats(),
      m.num_free,
    )

  assert stored(True) == stored(False)


def test_nothing_is_stored_if_one_of_several_is_not_held():
  m = manager(page_size=4, num_pages=16, num_rows=4, max_length=32)
  one = m.allocate(Request("one", tokens=range(9)))
  with pytest.raises(errors.UnmappedToken):
    m.store_prefixes([Prefix(one), Prefix(one, np.arange(10))])
  assert m.prefix_stats().entries == 0
  assert m.audit().clean


def full_of_prefixes():
  """8 pages, all of them idle: two prefixes of 4 pages each."""
  m = manager(page_size=4, num_pages=8, num_rows=4, max_length=32)
  for name, tokens in (("a", range(16)), ("b", range(20, 36))):
    m.store_prefix(m.allocate(Request(name, tokens=tokens)))
    m.deallocate(name)
  assert (m.num_free, m.num_idle) == (0, 8)
  return m


@pytest.mark.parametrize("spare, free", [(0, 0), (1, 1), (3, 3), (100, 6)])
def test_what_evicts_may_do_so_for_more_to_come(spare, free):
  m = full_of_prefixes()
  m.allocate_many([Request("c", 5)], spare=spare)
  assert (m.num_free, m.num_idle) == (free, 6 - free)
  m.allocate_many([Request("d", 4 * free)], spare=spare)  # which evicts nothing
  assert (m.num_free, m.num_idle) == (0, 6 - free)
  assert m.audit().clean


def test_a_bad_spare_changes_nothing():
  m = full_of_prefixes()
  with pytest.raises(ValueError, match="spare must be an integer of at least 0, got -1"):
    m.allocate_many([Request("c", 5)], spare=-1)
  assert (m.num_free, m.num_free_rows) == (0, 4)


def test_pages_to_begin_are_those_that_allocate_takes():
  m = full_of_prefixes()
  for tokens, pages in ((range(16), 1), (range(9), 1), (range(8), 1), (range(40, 49), 3)):
    assert m.pages_to_begin(list(tokens)) == pages
    taken = m.allocate(Request("c", tokens=tokens))
    assert len(taken.pages) - taken.num_cached // 4 == pages
    m.deallocate("c")
    m = full_of_prefixes()
