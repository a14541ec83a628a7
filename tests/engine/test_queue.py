"""Who waits, in which order, against lists in plain Python."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from paged_jax.engine import Sampling
from paged_jax.engine.queue import Queue, Waiting
from paged_jax.engine.requests import NOTHING, Request, Sample

PAGES = [None, (1, 2), (3, 4)]


def sample(number, beginning=None, priority=0, origin=None):
  request = Request((1, 2, 3), priority=priority, beginning=beginning)
  request.samples.append(Sample(number, 0, request, Sampling(), origin=origin))
  return request.samples[0]


def first(members, closed, *, shares):
  """The first that can start, by looking at all of them."""
  ready = [
    x for x in members
    if not (x.resting or x.follows or (shares and not x.swapped and x.request.beginning in closed))
  ]  # fmt: skip
  return min(ready, key=lambda x: x.order, default=None)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_the_first_in_line_is_the_first_of_a_list(data):
  shares = data.draw(st.booleans())
  waiting, members, closed, number = Waiting(shares=shares), {}, set(), 0
  gone = []
  for _ in range(data.draw(st.integers(1, 60))):
    match data.draw(st.sampled_from(["add", "add", "again", "remove", "close", "take", "origin"])):
      case "add":
        origins = [None, None, *members, *gone]
        new = sample(
          number, data.draw(st.sampled_from(PAGES)), data.draw(st.integers(0, 1)),
          data.draw(st.sampled_from(origins)),
        )  # fmt: skip
        number += 1
        new.resting = data.draw(st.sampled_from([False, False, False, True]))
        waiting.add(new)
        members[new] = None
      case "again" if gone:  # preempted, with its pages or without
        back = gone.pop(data.draw(st.integers(0, len(gone) - 1)))
        back.begin(NOTHING._replace(handle=data.draw(st.sampled_from([None, object()]))))
        waiting.add(back)
        members[back] = None
      case "remove" | "take" as how:
        chosen = first(members, closed, shares=shares)
        if how == "remove" and members:
          chosen = data.draw(st.sampled_from(list(members)))
        if chosen is not None:
          waiting.remove(chosen)
          del members[chosen]
          gone.append(chosen)
      case "close":
        closed = data.draw(st.sets(st.sampled_from(PAGES[1:])))
      case "origin" if gone:  # it runs, and draws
        data.draw(st.sampled_from(gone)).begin(NOTHING._replace(row=1, decoding=True))
    waiting.close(frozenset(closed))
    assert waiting.first() is first(members, closed, shares=shares)
    assert {*waiting} == {*members} and len(waiting) == len(members)
    assert waiting.num_ready == sum(not x.resting for x in members)
    for page in PAGES[1:]:
      assert waiting.begin_with(page) == any(x.request.beginning == page for x in members)


def test_those_that_left_do_not_stay_in_memory():
  waiting = Waiting(shares=True)
  waiting.add(sample(0))
  for number in range(1, 2000):
    other = sample(number)
    waiting.add(other)
    waiting.remove(other)
  assert sum(map(len, waiting._lines.values())) < 100 and waiting.first().number == 0


def test_beams_wait_as_one_in_the_place_of_the_first():
  request = Request((1, 2, 3))
  wanted = dataclasses.replace(Sampling(), num_beams=2)
  request.samples += [Sample(n, n, request, wanted) for n in range(2)]
  assert request.samples[1].beams[0] is request.samples[0]


def test_who_gives_way_first_rests_or_has_the_lowest_priority_or_came_last():
  queue = Queue(shares=True)
  queue.running = {3: sample(1, priority=1), 0: sample(2), 2: sample(4), 1: sample(3)}
  assert queue.last().number == 4
  queue.running[3].resting = True
  assert queue.last().number == 1
