"""What a user holds of a request: its texts, and the commands that change it."""

from collections.abc import Sequence

from paged_jax.engine import branches
from paged_jax.engine.desk import Desk
from paged_jax.engine.requests import Completion, Request, Sample
from paged_jax.engine.sampling import Sampling
from paged_jax.host.config import whole


class RequestHandle:
  """A submitted request. All of this may be called from any thread.

  Commands count in the order in which they are given, and each sees what those before it have made
  of the request; the next round carries them out.
  """

  def __init__(self, desk: Desk, request: Request):
    self._desk, self._request = desk, request

  @property
  def done(self) -> bool:
    """Whether all its samples have ended."""
    return self._request.done

  @property
  def tokens(self) -> list[list[int]]:
    """The new tokens of each sample so far; of a beam search, the texts it keeps at the moment."""
    return [list((sample.change or sample).tokens) for sample in self._request.samples]

  @property
  def completions(self) -> list[Completion | None]:
    """Of each sample, None while it goes on; of a beam search the best one first."""
    return [sample.result for sample in self._request.samples]

  def pieces(self, sample: int = 0, start: int = 0) -> list[str]:
    """What each token from number `start` on added to a sample's text; together they are the text.

    What may still change is held back: a piece is "" if its token ends inside a character, or what
    may be a stop, and a later one has what it lacks. A stop is in no piece. Without a tokenizer they
    are numbers. Beams have none before they end.

    >>> import paged_jax
    >>> from paged_jax.engine import Engine, EngineConfig, Sampling
    >>> from paged_jax.testing.counting import Counting
    >>> cache = paged_jax.CacheConfig(
    ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
    ... )
    >>> engine = Engine(Counting(), EngineConfig(cache, prompt_sizes=(16,)))
    >>> handle = engine.submit([1, 2, 3], Sampling(max_new_tokens=4))
    >>> while engine.step():
    ...   pass
    >>> handle.pieces(), handle.pieces(start=2)
    (['4', ' 5', ' 6', ' 7'], [' 6', ' 7'])

    """
    return self._desk.pieces(self._request.samples[sample], start)

  @property
  def num_cached(self) -> int:
    """Tokens of its prompt that were not computed, because the prefix cache had them."""
    return self._request.num_cached

  @property
  def rows(self) -> dict[int, int]:
    """Which sample is in which row, for those that run."""
    samples = list(self._request.samples)
    return {sample.row: sample.nth for sample in samples if sample.row >= 0}

  def cancel(self) -> None:
    """Ends it before the next call; what it has drawn stays readable.

    >>> import paged_jax
    >>> from paged_jax.engine import Engine, EngineConfig, Sampling
    >>> from paged_jax.testing.counting import Counting
    >>> cache = paged_jax.CacheConfig(
    ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
    ... )
    >>> engine = Engine(Counting(), EngineConfig(cache, prompt_sizes=(16,)))
    >>> handle = engine.submit([1, 2, 3], Sampling(max_new_tokens=4))
    >>> handle.cancel()
    >>> engine.step(), handle.completions[0].reason
    (True, 'cancelled')
    """
    with self._desk.lock:
      self._desk.change(branches.cancel(self._request.samples))

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

    # request   [prompt | a b c]           rests, keeps its row and pages
    # branch    [prompt | a b c | d ...    the same pages; the first write copies the last one
    # branch    [prompt | a b c | e ...

    >>> import paged_jax
    >>> from paged_jax.engine import Engine, EngineConfig, Sampling
    >>> from paged_jax.testing.counting import Counting
    >>> cache = paged_jax.CacheConfig(
    ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
    ... )
    >>> engine = Engine(Counting(), EngineConfig(cache, prompt_sizes=(16,)))
    >>> handle = engine.submit([1, 2, 3], Sampling(max_new_tokens=4))
    >>> while not handle.tokens[0]:
    ...   _ = engine.step()
    >>> branches = handle.fork(2, Sampling(max_new_tokens=6))
    >>> while engine.step():
    ...   pass
    >>> [branch.tokens for branch in branches]
    [[[4, 5, 6, 7, 8, 9]], [[4, 5, 6, 7, 8, 9]]]

    Args:
      count: How many.
      sampling: How each goes on, by default as the sample does; `max_new_tokens` counts from the
        prompt. If one for all, branch i draws with its seed + i.
      sample: Which one of the request's; may be left out if it has one.

    Raises:
      ValueError: It is a beam, or a branch could never run.
      RuntimeError: The engine has failed, or is closed.
    """
    if whole("count", count) < 1:
      raise ValueError(f"count must be at least 1, got {count}")
    with self._desk.lock:
      self._desk.check_open()
      parent = self._sample(sample)
      if not isinstance(sampling, Sequence):
        sampling = branches.seeds(sampling or branches.alone(parent), count)
      if len(sampling) != count:
        raise ValueError(f"sampling must be one for each of {count} branches, got {len(sampling)}")
      for each in sampling:
        self._check_branch(len((parent.change or parent).tokens), each)
      made = branches.fork(parent, sampling, self._desk.numbers)
      self._desk.change([parent])
      for branch in made:
        self._desk.arrive(branch)
      return [RequestHandle(self._desk, branch) for branch in made]

  def rollback(
    self, num_tokens: int, sampling: Sampling | None = None, *, sample: int | None = None
  ) -> None:
    """Forgets all but the first `num_tokens` new tokens, and goes on from there.

    A sample that rests, or has ended, goes on, too.

    >>> import paged_jax
    >>> from paged_jax.engine import Engine, EngineConfig, Sampling
    >>> from paged_jax.testing.counting import Counting
    >>> cache = paged_jax.CacheConfig(
    ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
    ... )
    >>> engine = Engine(Counting(), EngineConfig(cache, prompt_sizes=(16,)))
    >>> handle = engine.submit([1, 2, 3], Sampling(max_new_tokens=4))
    >>> while engine.step():
    ...   pass
    >>> handle.rollback(1, Sampling(max_new_tokens=3, logit_bias={9: 50.0}))
    >>> handle.tokens
    [[4]]
    >>> while engine.step():
    ...   pass
    >>> handle.tokens
    [[4, 9, 9]]

    Args:
      num_tokens: How many to keep; all of them to go on as it is.
      sampling: How to go on, by default as before: equal seeds draw the same tokens again. Sample i
        of a request draws with its seed + i.
      sample: Which one of the request's; may be left out if it has one.

    Raises:
      ValueError: It is a beam, or has fewer tokens, or could never run.
      RuntimeError: The engine has failed, or is closed.
    """
    with self._desk.lock:
      self._desk.check_open()
      this = self._sample(sample)
      known = len((this.change or this).tokens)
      if not 0 <= whole("num_tokens", num_tokens) <= known:
        raise ValueError(f"num_tokens must be in [0, {known}], got {num_tokens}")
      if sampling is not None and sampling.seed + this.nth >= 2**32:
        raise ValueError(f"seed is out of range for sample {this.nth}: {sampling.seed}")
      self._check_branch(num_tokens, sampling or branches.alone(this))
      branches.roll_back(this, num_tokens, sampling or (this.change or this).sampling)
      self._desk.change([this])

  def commit(self) -> None:
    """The sample that this branch was forked from goes on with the branch's text and pages.

    This branch and the others of that sample end as cancelled, unless they are done; branches of
    theirs go on by themselves.

    # before    request [prompt | a b c]    branch [prompt | a b c | d e]
    # after     request [prompt | a b c | d e]    on the branch's row and pages; its own are freed

    >>> import paged_jax
    >>> from paged_jax.engine import Engine, EngineConfig, Sampling
    >>> from paged_jax.testing.counting import Counting
    >>> cache = paged_jax.CacheConfig(
    ...   num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, num_rows=4, max_length=64
    ... )
    >>> engine = Engine(Counting(), EngineConfig(cache, prompt_sizes=(16,)))
    >>> handle = engine.submit([1, 2, 3], Sampling(max_new_tokens=4))
    >>> while not handle.tokens[0]:
    ...   _ = engine.step()
    >>> branch, other = handle.fork(2, Sampling(max_new_tokens=6))
    >>> while engine.step():
    ...   pass
    >>> branch.commit()
    >>> handle.tokens
    [[4, 5, 6, 7, 8, 9]]

    Raises:
      ValueError: It is no branch, or one of its sample's branches has been committed since.
      RuntimeError: The engine has failed, or is closed.
    """
    with self._desk.lock:
      self._desk.check_open()
      parent = self._request.parent
      if parent is None:
        raise ValueError("only a branch can be committed; this request was not forked")
      if self._request not in parent.branches:
        raise ValueError("a branch of this one's parent has been committed already")
      self._desk.change(branches.commit(self._request, parent))

  def _sample(self, nth: int | None) -> Sample:
    """The sample that a command is about."""
    samples = self._request.samples
    if nth is None and len(samples) > 1:
      raise ValueError(f"the request has {len(samples)} samples: say which with `sample`")
    if not 0 <= whole("sample", nth or 0) < len(samples):
      raise ValueError(f"sample must be in [0, {len(samples)}), got {nth}")
    if samples[nth or 0].searching:
      raise ValueError("a beam can neither be forked nor rolled back")
    return samples[nth or 0]

  def _check_branch(self, num_tokens: int, sampling: Sampling) -> None:
    self._desk.check(tuple(self._request.prompt), sampling)
    if sampling.width > 1 or sampling.max_new_tokens <= num_tokens:
      raise ValueError(
        f"sampling must be of one sample with max_new_tokens above {num_tokens}, got {sampling}"
      )
