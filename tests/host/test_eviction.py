"""The queue that asks a policy, alone."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_jax.host import eviction
from paged_jax.host.eviction import Queue, Use


@dataclasses.dataclass(eq=False)
class Thing:
  name: object
  use: Use
  alive: bool = True


def things(*names):
  return [Thing(name, Use(stored=i, last=i)) for i, name in enumerate(names)]


def queue(policy, things=(), start=1000):
  ticks = itertools.count(start)
  queue = Queue(policy, lambda: next(ticks), lambda thing: thing.alive)
  for thing in things:
    queue.push(thing)
  return queue


def always(thing):
  return True


def entries(queue):
  """How much a queue remembers."""
  return len(queue._heap) + len(queue._new)


def drain(queue, ready=always):
  return [thing.name for thing in iter(lambda: queue.pop(ready), None)]


def test_an_empty_queue_gives_nothing():
  assert queue(eviction.LRU).pop(always) is None


@pytest.mark.parametrize(
  "policy, order",
  [
    (eviction.LRU, "bdca"),  # a and c were used since
    (eviction.FIFO, "abcd"),
    (eviction.CLOCK, "bdac"),  # a and c get a second chance, in the order they came up
    (eviction.Policy("newest", lambda use: -use.stored), "dcba"),
    (eviction.Policy("rarest", lambda use: (use.hits, use.stored)), "bdac"),
  ],
  ids=lambda value: getattr(value, "name", value),
)
def test_the_lowest_rank_goes_first(policy, order):
  waiting = things(*"abcd")
  for tick, i in [(10, 2), (11, 0)]:
    use = waiting[i].use
    use.last, use.touched, use.hits = tick, True, use.hits + 1
  assert "".join(drain(queue(policy, waiting))) == order


def test_a_rank_is_read_again_when_a_thing_comes_up():
  a, b, _ = waiting = things(*"abc")
  lru = queue(eviction.LRU, waiting)
  a.use.last = 10
  b.use.last = 9
  assert drain(lru) == ["c", "b", "a"]


def test_a_thing_pushed_twice_comes_once_while_it_waits():
  a, b = waiting = things(*"ab")
  lru = queue(eviction.LRU, [a, a, b, a])
  seen = []
  assert lru.pop(seen.append) is None
  assert seen == waiting
  assert lru.pop(lambda thing: thing is b) is b


def test_who_is_not_ready_waits_in_order_and_does_not_hold_up_the_others():
  waiting = things(*"abcd")
  lru = queue(eviction.LRU, waiting)
  assert lru.pop(lambda thing: thing.name == "c").name == "c"
  assert lru.pop(lambda thing: False) is None
  assert drain(lru) == ["a", "b", "d"]


def test_the_dead_are_forgotten():
  a, _, c = waiting = things(*"abc")
  lru = queue(eviction.LRU, waiting)
  a.alive = c.alive = False
  assert drain(lru) == ["b"]
  a.alive = True
  assert lru.pop(always) is None
  lru.push(a)
  assert lru.pop(always) is a


def test_the_clock_passes_the_used_ones_once_and_ends_though_all_were_used():
  a, b, c = waiting = things(*"abc")
  for thing in waiting:
    thing.use.touched = True
  clock = queue(eviction.CLOCK, waiting)
  assert clock.pop(always) is a
  assert not any(thing.use.touched for thing in waiting)
  b.use.touched = True
  assert clock.pop(always) is c
  assert clock.pop(always) is b


def test_the_clock_ends_though_nobody_is_ready():
  waiting = things(*"abc")
  for thing in waiting:
    thing.use.touched = True
  clock = queue(eviction.CLOCK, waiting)
  assert clock.pop(lambda thing: False) is None
  assert drain(clock) == ["a", "b", "c"]


def test_memory_stays_bounded_however_often_the_same_are_pushed():
  waiting = things(*range(10))
  lru = queue(eviction.LRU)
  for i in range(5_000):
    lru.push(waiting[i % 10])
    assert entries(lru) <= 2 * 10 + 64
  for name in range(10):
    thing = lru.pop(always)
    assert thing.name == name
    thing.alive = False
  assert lru.pop(always) is None


def test_memory_stays_bounded_when_all_others_died():
  lru = queue(eviction.LRU)
  for i in range(5_000):
    thing = Thing(i, Use(i, i))
    lru.push(thing)
    thing.alive = i % 1_000 == 0
    assert entries(lru) <= 100
  assert drain(lru) == [0, 1_000, 2_000, 3_000, 4_000]


def test_a_pop_that_finds_nobody_ready_does_not_grow_the_queue():
  lru = queue(eviction.LRU, things(*"abc"))
  for _ in range(200):
    lru.pop(lambda thing: False)
  assert entries(lru) == 3


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), rank=st.sampled_from(["last", "stored"]))
def test_a_history_pops_the_lowest_rank_of_those_that_are_alive_and_ready(seed, rank):
  rng, ticks = random.Random(seed), itertools.count()
  order = queue({"last": eviction.LRU, "stored": eviction.FIFO}[rank])
  waiting: list[Thing] = []
  for tick in ticks:
    if tick == 150:
      break
    step = rng.randrange(5)
    if step < 2 or not waiting:
      waiting.append(Thing(tick, Use(tick, tick)))
      order.push(waiting[-1])
    elif step == 2:
      rng.choice(waiting).use.last = tick
      order.push(rng.choice(waiting))
    elif step == 3 and rng.random() < 0.3:
      waiting.pop(rng.randrange(len(waiting))).alive = False
    elif step == 4:
      busy = set(rng.sample(waiting, rng.randrange(len(waiting) + 1)))
      free = [thing for thing in waiting if thing not in busy]
      found = order.pop(lambda thing, busy=busy: thing not in busy)
      assert found is min(free, key=lambda thing: getattr(thing.use, rank), default=None)
      if found is not None:
        waiting.remove(found)
        found.alive = False
