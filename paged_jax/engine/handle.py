"""A caller's grip on a request."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paged_jax.engine.requests import Completion, Entry
from paged_jax.engine.sampling import Sampling

if TYPE_CHECKING:
  from paged_jax.engine.engine import Engine


class RequestHandle:
  """A submitted request. All of this may be called from any thread.

  Commands count in the order in which they are given, and each sees what those before it have made
  of the request; the next round carries them out.
  """

  def __init__(self, engine: "Engine", entry: Entry):
    self._engine, self._entry = engine, entry

  @property
  def done(self) -> bool:
    """Whether all its samples have ended."""
    return self._entry.done

  @property
  def tokens(self) -> list[list[int]]:
    """The new tokens of each sample so far; of a beam search, the texts it keeps at the moment."""
    return [list((sample.change or sample).tokens) for sample in self._entry.samples]

  @property
  def completions(self) -> list[Completion | None]:
    """Of each sample, None while it goes on; of a beam search the best one first."""
    return [sample.result for sample in self._entry.samples]

  def pieces(self, sample: int = 0, start: int = 0) -> list[str]:
    """What each token from number `start` on added to a sample's text; together they are the text.

    What may still change is held back: a piece is "" if its token ends inside a character, or what
    may be a stop, and a later one has what it lacks. A stop is in no piece. Without a tokenizer they
    are numbers. Beams have none before they end.
    """
    return self._engine._pieces(self._entry.samples[sample], start)

  @property
  def num_cached(self) -> int:
    """Tokens of its prompt that were not computed, because the prefix cache had them."""
    return self._entry.num_cached

  @property
  def rows(self) -> dict[int, int]:
    """Which sample is in which row, for those that run."""
    samples = list(self._entry.samples)
    return {sample.row: sample.nth for sample in samples if sample.row >= 0}

  def cancel(self) -> None:
    """Ends it before the next call; what it has drawn stays readable."""
    self._engine._cancel(self._entry)

  def fork(
    self,
    count: int,
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    sample: int | None = None,
  ) -> "list[RequestHandle]":
    """Branches that start with all that a sample's `tokens` are now, on the same pages.

    The sample itself rests, and keeps its pages for further forks, until a branch is committed or
    it is rolled back. A branch may be forked, too.

    Args:
      count: How many.
      sampling: How each goes on, by default as the sample does; `max_new_tokens` counts from the
        prompt. If one for all, branch i draws with its seed + i.
      sample: Which one of the request's; may be left out if it has one.

    Raises:
      ValueError: It is a beam, or a branch could never run.
      RuntimeError: The engine has failed, or is closed.
    """
    return self._engine._fork(self._entry, count, sampling, sample)

  def rollback(
    self, num_tokens: int, sampling: Sampling | None = None, *, sample: int | None = None
  ) -> None:
    """Forgets all but the first `num_tokens` new tokens, and goes on from there.

    A sample that rests, or has ended, goes on, too.

    Args:
      num_tokens: How many to keep; all of them to go on as it is.
      sampling: How to go on, by default as before: equal seeds draw the same tokens again. Sample i
        of a request draws with its seed + i.
      sample: Which one of the request's; may be left out if it has one.

    Raises:
      ValueError: It is a beam, or has fewer tokens, or could never run.
      RuntimeError: The engine has failed, or is closed.
    """
    self._engine._roll_back(self._entry, num_tokens, sampling, sample)

  def commit(self) -> None:
    """The sample that this branch was forked from goes on with the branch's text and pages.

    This branch and the others of that sample end as cancelled, unless they are done; branches of
    theirs go on by themselves.

    Raises:
      ValueError: It is no branch, or one of its sample's branches has been committed since.
      RuntimeError: The engine has failed, or is closed.
    """
    self._engine._commit(self._entry)
