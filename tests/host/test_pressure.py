"""Levels of pressure, and who is told of a change, alone."""

import logging
import threading

import pytest

from paged_jax.host import pressure
from paged_jax.host.pressure import Level, Notifier

LOW, MEDIUM, HIGH, CRITICAL = Level


@pytest.mark.parametrize(
  "num_free, expected",
  [(0, CRITICAL), (1, HIGH), (9, HIGH), (10, MEDIUM), (29, MEDIUM), (30, LOW), (100, LOW)],
)
def test_a_level_begins_exactly_at_its_watermark(num_free, expected):
  assert pressure.level(num_free, 100, 0.3, 0.1) == expected


def test_a_watermark_is_not_missed_by_a_rounding_error():
  reached = range(1, 100)  # of 100 pages, each the watermark itself
  assert [x for x in reached if pressure.level(x, 100, x / 100, 0.0) != LOW] == []
  assert [x for x in reached if pressure.level(x, 100, 1.0, x / 100) != MEDIUM] == []


def test_one_page_is_free_or_is_not():
  assert pressure.level(1, 1, 0.3, 0.1) == LOW
  assert pressure.level(0, 1, 0.3, 0.1) == pressure.level(0, 1, 1.0, 0.0) == CRITICAL


def test_levels_are_ordered_by_urgency():
  assert LOW < MEDIUM < HIGH < CRITICAL


def told(notifier):
  """What a new subscriber is told, in order."""
  changes = []
  notifier.subscribe(lambda change: changes.append((change.left, change.entered)))
  return changes


def test_changes_come_once_each_and_in_order():
  notifier = Notifier(LOW)
  seen = []
  notifier.subscribe(seen.append)
  for level, num_free in [(LOW, 9), (HIGH, 2), (HIGH, 1), (CRITICAL, 0), (LOW, 8)]:
    notifier.observe(level, num_free)
  assert seen == []
  notifier.deliver()
  assert seen == [(LOW, HIGH, 2), (HIGH, CRITICAL, 0), (CRITICAL, LOW, 8)]
  notifier.deliver()
  assert len(seen) == 3 and notifier.level == LOW


def test_a_change_without_subscribers_is_not_kept_for_later_ones():
  notifier = Notifier(LOW)
  notifier.observe(HIGH, 1)
  notifier.deliver()
  seen = told(notifier)
  notifier.deliver()
  assert seen == []
  notifier.observe(LOW, 9)
  notifier.deliver()
  assert seen == [(HIGH, LOW)]


def test_who_unsubscribed_hears_no_more():
  notifier = Notifier(LOW)
  gone, seen = [], told(notifier)
  unsubscribe = notifier.subscribe(gone.append)
  unsubscribe()
  unsubscribe()
  notifier.observe(HIGH, 1)
  notifier.deliver()
  assert gone == [] and seen == [(LOW, HIGH)]


def test_each_of_two_subscriptions_of_one_callback_ends_by_itself():
  notifier, seen = Notifier(LOW), []

  def callback(change):
    seen.append(change)

  first, second = notifier.subscribe(callback), notifier.subscribe(callback)
  notifier.observe(HIGH, 1)
  notifier.deliver()
  assert len(seen) == 2
  first()
  notifier.observe(LOW, 9)
  notifier.deliver()
  assert len(seen) == 3
  first()
  second()
  notifier.observe(HIGH, 1)
  notifier.deliver()
  assert len(seen) == 3


def test_a_callback_may_unsubscribe_itself():
  notifier, seen = Notifier(LOW), []

  def once(change):
    seen.append(change.entered)
    unsubscribe()

  unsubscribe = notifier.subscribe(once)
  after = told(notifier)
  for level in (HIGH, CRITICAL):
    notifier.observe(level, 1)
    notifier.deliver()
  assert seen == [HIGH] and after == [(LOW, HIGH), (HIGH, CRITICAL)]


def test_a_callback_may_subscribe_another_which_hears_the_next_change():
  notifier, seen = Notifier(LOW), []

  def first(change):
    if change.entered == HIGH:
      notifier.subscribe(lambda change: seen.append(change.entered))

  notifier.subscribe(first)
  for level in (HIGH, CRITICAL):
    notifier.observe(level, 1)
    notifier.deliver()
  assert seen == [CRITICAL]


def test_a_change_made_by_a_callback_is_told_to_all_after_the_one_it_answers():
  notifier = Notifier(LOW)

  def answer(change):
    if change.entered == CRITICAL:
      notifier.observe(MEDIUM, 2)
      notifier.deliver()

  before = told(notifier)
  notifier.subscribe(answer)
  after = told(notifier)
  notifier.observe(CRITICAL, 0)
  notifier.deliver()
  assert before == after == [(LOW, CRITICAL), (CRITICAL, MEDIUM)]


def test_a_callback_that_fails_is_logged_and_the_others_are_still_told(caplog):
  notifier = Notifier(LOW)
  before = told(notifier)

  def fail(change):
    raise ZeroDivisionError("mine")

  notifier.subscribe(fail)
  after = told(notifier)
  with caplog.at_level(logging.ERROR, "paged_jax"):
    for level in (HIGH, LOW):
      notifier.observe(level, 1)
    notifier.deliver()
  assert before == after == [(LOW, HIGH), (HIGH, LOW)]
  assert len(caplog.records) == 2
  assert "HIGH" in caplog.records[0].getMessage()
  assert caplog.records[0].exc_info[0] is ZeroDivisionError


def test_an_interrupt_in_a_callback_ends_the_delivery_but_not_the_notifier():
  notifier = Notifier(LOW)

  def interrupt(change):
    if change.entered == HIGH:
      raise KeyboardInterrupt

  notifier.subscribe(interrupt)
  seen = told(notifier)
  notifier.observe(HIGH, 1)
  with pytest.raises(KeyboardInterrupt):
    notifier.deliver()
  notifier.observe(LOW, 9)
  notifier.deliver()
  assert seen == [(HIGH, LOW)]


def test_two_threads_that_deliver_keep_the_order_for_everyone():
  notifier = Notifier(LOW)
  arrived, go_on = threading.Event(), threading.Event()

  def slow(change):
    if change.entered == HIGH:
      arrived.set()
      assert go_on.wait(10)

  notifier.subscribe(slow)
  seen = told(notifier)
  notifier.observe(HIGH, 1)
  thread = threading.Thread(target=notifier.deliver)
  thread.start()
  assert arrived.wait(10)
  notifier.observe(LOW, 9)
  notifier.deliver()  # must not wait for the other thread, nor overtake it
  assert seen == []
  go_on.set()
  thread.join(10)
  notifier.deliver()
  assert seen == [(LOW, HIGH), (HIGH, LOW)]
