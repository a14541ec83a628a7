"""The stream of events, alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_jax.host.events import Event, Stream


def stream(size, count=0):
  """A stream after `count` events; its snapshot is the number of the last one."""
  stream = Stream(size, lambda: stream.last)
  for i in range(count):
    stream.add("stored", f"r{i}", i, 4 * i)
  return stream


def numbers(batch):
  return [each.number for each in batch.events]


def test_an_event_says_what_happened():
  events = stream(4)
  events.add("stored", "a", 2, 7)
  events.add("evicted", None, 1, 4)
  snapshot, (first, second), last = events.read(0)
  assert snapshot is None and last == 2
  assert first == Event(1, "stored", "a", 2, 7)
  assert second == (2, "evicted", None, 1, 4)


def test_nothing_happened_is_no_reason_for_a_snapshot():
  assert list(map(list, [stream(4).read(0).events, stream(4, 9).read(9).events])) == [[], []]
  assert stream(4).read(0).snapshot is stream(4, 9).read(9).snapshot is None
  assert stream(4, 9).read(9).last == 9


@pytest.mark.parametrize("since, seen", [(9, []), (8, [9]), (5, [6, 7, 8, 9])])
def test_a_reader_within_the_buffer_gets_exactly_what_is_next(since, seen):
  batch = stream(4, 9).read(since)
  assert (batch.snapshot, numbers(batch), batch.last) == (None, seen, 9)


@pytest.mark.parametrize("since", [0, 1, 4])
def test_a_reader_that_fell_behind_gets_a_snapshot_and_goes_on_from_it(since):
  events = stream(4, 9)
  batch = events.read(since)
  assert (batch.snapshot, numbers(batch), batch.last) == (9, [], 9)
  events.add("removed", None, 0, 0)
  assert numbers(events.read(batch.last)) == [10]


def test_reading_takes_nothing_away():
  events = stream(4, 3)
  batch = events.read(1)
  assert events.read(1) == batch == events.read(1)
  events.add("stored", "x", 1, 1)
  assert numbers(batch) == [2, 3]  # what was read does not change


def test_a_stream_without_a_buffer_is_all_snapshots():
  events = stream(0, 3)
  assert events.read(2) == (3, (), 3)
  assert events.read(3).snapshot is None


def test_memory_is_bounded():
  events = stream(8, 10_000)
  assert len(events._events) == len(events.read(10_000 - 8).events) == 8
  assert events.last == 10_000


@settings(max_examples=100, deadline=None, derandomize=True)
@given(size=st.integers(1, 5), bursts=st.lists(st.integers(0, 8), max_size=12))
def test_a_reader_never_misses_an_event_without_being_told(size, bursts):
  events, since, seen = stream(size), 0, 0
  for burst in bursts:
    for _ in range(burst):
      events.add("stored", None, 1, 1)
    batch = events.read(since)
    if batch.snapshot is None:
      assert numbers(batch) == list(range(since + 1, since + 1 + burst))
    else:
      assert burst > size and batch.snapshot == events.last - len(batch.events)
    since = batch.last
    seen += burst
  assert since == events.last == seen
