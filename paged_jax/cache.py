"""The verbs: `(cache, request) -> (cache, info)`, pure functions on one immutable pytree.

Axis letters: N pages, T tokens per page, S rows, P pages per row, L layers, H KV heads, Q query
heads, D head dim, B tokens or entries in a call. Ids and lengths are always i32 arrays; "no page"
is N and "no row" is S, and both pad a request. A wrong rank, shape or dtype raises `ValueError`
while tracing. Wrong values never raise: `Info.ok` is False for them, and what is refused changes
nothing.

    # tokens  0 ........ 48 ...... 53
    # pages   [a][b][c]  [d......]      a-c shared with the parent of a fork, d is the row's own

A model whose layers differ has a tuple of caches, one per group of layers, with the same rows. All
verbs except `write`, `attend` and `gather` take such a tuple, and grant an entry in all of the
caches or in none, so that rows are equally long in all of them. What belongs to one pool is then a
tuple, too: `Info.num_free`, page ids, starts, images, plans. Such a request and its answer:

    # cache    (windows, full)         pages    (i32[3], i32[5])
    # info     ok bool[S]              num_free (i32[], i32[])
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from paged_jax import arguments, attention, groups, meshes, plans
from paged_jax import ledger as ledger_lib
from paged_jax import pages as pages_lib
from paged_jax.config import CacheConfig
from paged_jax.ledger import pool as pool_lib
from paged_jax.ledger import tables as tables_lib
from paged_jax.types import Cache, Copies, Info, Ledger, Plan

Caches = TypeVar("Caches", Cache, tuple[Cache, ...])


def init(config: CacheConfig | tuple[CacheConfig, ...]) -> Any:
  """An empty cache: all pages free, all rows empty, all bytes zero. A tuple of configs: a tuple.

  Bytes are stored as the platform works with them best, unless the config says how
  (`CacheConfig.stored_for`).

  Raises:
    ValueError: The configs of a tuple differ in `num_rows` or `copy_on_write`.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> int(pj.init(config).num_free)
  8
  """
  config = stored(config)
  placed = any(each.split is not None for each in groups.each(config))
  # Compiled, so that each device makes its part, and none has all.
  return (jax.jit(_made, static_argnums=0) if placed else _made)(config)


def _made(config: Any) -> Any:
  """An empty cache, as the config says."""
  ledgers = groups.each(ledger_lib.init(config))
  made = []
  for each, ledger in zip(groups.each(config), ledgers, strict=True):
    if each.split is not None:
      ledger = meshes.place(ledger, each.split.mesh, PartitionSpec())
    made.append(Cache(ledger, pages_lib.init(each)))
  return groups.like(config, made)


def stored(config: Any) -> Any:
  """The config, or each of a tuple, with the storage that `init` gives it on this platform."""
  platform = jax.default_backend()
  return groups.like(config, [each.stored_for(platform) for each in groups.each(config)])


def pages_needed(cache: Caches, num_tokens: jax.Array) -> Any:
  """The pages that `extend` with the same `num_tokens` i32[S] takes for each row, i32[S].

  The copy of a shared tail page counts. Whether enough pages are free does not. A row whose
  request `extend` refuses for any other reason needs none.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> pj.jitted.pages_needed(pj.init(config), jnp.array([6, 1])).tolist()
  [2, 1]
  """
  return ledger_lib.pages_needed(ledgers(cache), num_tokens)


def extend(cache: Caches, num_tokens: jax.Array) -> tuple[Caches, Info]:
  """Makes room for `num_tokens` i32[S] more tokens in each row, which read zero until written.

  If others hold the row's partly filled tail page too, the page is copied first (copy on write), so
  a row may write all the room that it gets. The result is the same as extending row by row in
  order: of n rows that share a tail page the last one keeps it.

      # before  row 0  [a][b 4 5 . .]      a and b have two holders
      #         row 1  [a][b 4 5 . .]
      # after   row 0  [a][c 4 5 6 .]      extended by one token: c is a copy
      #         row 1  [a][b 4 5 . .]      b is row 1's alone

  In a cache with a `window`, a row that asks for tokens first gives up its pages that no later
  token sees, also if it is refused then because pages are missing:

      # window 4   row 0  [a 0 1 2 3][b 4 5 6 .]      tokens from 7 on see none before 4
      # after      row 0  -          [b 4 5 6 7]      extended by one token: a is free

  Returns:
    The next cache, and `Info` with ok bool[S]. A negative count, or more tokens than a row can
    hold, refuses that row alone. After the first row that is refused because pages are missing,
    every later row that needs a page is refused too: no row overtakes an earlier one.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, info = pj.jitted.extend(pj.init(config), jnp.array([6, 17]))
  >>> info.ok.tolist(), cache.lengths.tolist(), int(info.num_free)
  ([True, False], [6, 0], 6)
  """
  ledger, info, copies = ledger_lib.extend(ledgers(cache), num_tokens)
  return _renew(cache, ledger, copies), info


def plan(
  cache: Caches,
  rows: jax.Array,
  positions: jax.Array,
  *,
  implementation: Any = None,
  parts: Sequence[tuple[int, ...]] | None = None,
) -> Any:
  """Describes the ragged batch of tokens of one step, once for all layers.

  Args:
    cache: The cache. A later verb that changes tables or refcounts makes the plan invalid.
    rows: i32[B] row of each token. The tokens of a row are contiguous and ascend; S is padding.
    positions: i32[B] position of each token in its row, below the row's length.
    implementation: Attention backend: "reference", "xla", "tpu", "gpu" or "hopper". None takes the
      best that the platform has for this cache. A backend asked for by name is never replaced. For
      a tuple of caches: one for all, or a tuple.
    parts: Which tokens are alike, if not all are: numbers of tokens, in the batch's order, and the
      most rows that each part has; as a third number how many tokens the longest row may well
      bring, by default the average. Attention takes each part in blocks that fit it. Without
      `parts` the batch is taken for one of rows that decode if it has no more tokens than the
      cache has rows, else for prompts.

          # parts   ((4, 4), (8, 2, 8))     rows that decode, then pieces of at most 2 prompts
          # rows     0 1 2 S  3 3 3 3 3 5 5 S

  Returns:
    The plan, or one for each cache of a tuple. `plan.ok` is False for a token without a slot of its
    own: the slot is unmapped, beyond the length, or on a page that others hold too. It is also False for a token out of
    order: after the positions of its row stop ascending, or in a later piece of a row that comes
    in several pieces, or in one row more than its part may have. Such a token is not written and
    attends to nothing.

  Raises:
    ValueError: There is no such backend, or `parts` are not all tokens of the batch.
    NotImplementedError: The backend asked for cannot serve this cache; the message says why.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> pj.jitted.plan(cache, jnp.array([0, 0, 1]), jnp.array([4, 5, 0])).ok.tolist()
  [True, True, False]
  """
  rows = arguments.integers("rows", rows, (None,))
  positions = arguments.integers("positions", positions, rows.shape)
  each = ledger_lib.each(ledgers(cache))
  s = each[0].num_rows
  known = jnp.where((rows >= 0) & (rows < s), rows, s)
  if parts is not None:
    parts = tuple(arguments.parts(parts, rows.shape[0]))
  ordered = plans.ordered(known, positions, s)
  placed = [plans.place(ledger, known, positions, ordered) for ledger in each]
  own = (known < s) & groups.all_of(faults == 0 for faults, _ in placed)
  if parts is not None:
    crowded = plans.crowded(known, parts, s)
    own, ordered = own & ~crowded, ordered & ~crowded
  batch = _Batch(known, positions, jnp.where(ordered, known, s), own, own | (rows == s), parts)
  names = groups.each(implementation) * (1 if groups.several(implementation) else len(placed))
  made = [
    _planned(one, batch, slots, name)
    for one, (_, slots), name in zip(groups.each(cache), placed, names, strict=True)
  ]
  return groups.like(cache, made)


class _Batch(NamedTuple):
  """The tokens of a plan, in the rows that all groups have."""

  rows: jax.Array  # i32[B] S = padding, or no row
  positions: jax.Array  # i32[B]
  placed: jax.Array  # i32[B] row, S where the token is out of order too
  own: jax.Array  # bool[B] the token has a slot of its own in every group
  ok: jax.Array  # bool[B] that, or it is padding
  parts: tuple[tuple[int, int, int], ...] | None


def _planned(cache: Cache, batch: _Batch, slots: jax.Array, implementation: str | None) -> Plan:
  """The plan of one group, where its tokens have `slots` i32[B]."""
  beyond = cache.ledger.pool.num_pages * cache.ledger.page_size
  slots = jnp.where(batch.own, slots, beyond + jnp.arange(slots.shape[0], dtype=jnp.int32))
  implementation = attention.choose(implementation, cache.pages, cache.ledger.pages_per_row)
  return Plan(
    rows=batch.rows,
    positions=batch.positions,
    slots=slots,
    ok=batch.ok,
    parts=attention.cut(
      implementation, batch.placed, batch.positions, slots, batch.own, cache.pages,
      cache.ledger.tables, batch.parts,
    ),
    implementation=implementation,
  )  # fmt: skip


def check_plan(cache: Caches, plan: Any) -> None:
  """Raises if a token of the plan has no slot of its own, and says why for the first ten.

  For finding mistakes, since such tokens are not written and attend to nothing (`plan.ok`). Outside
  a program it reads the plan. Inside a program it is a check of `jax.experimental.checkify`, and
  the program must be wrapped in `checkify.checkify`.

  Raises:
    ValueError: Outside a program, a token has no slot.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([3, 0]))
  >>> pj.check_plan(cache, pj.jitted.plan(cache, jnp.array([0, 0]), jnp.array([2, 3])))
  Traceback (most recent call last):
  ...
  ValueError: 1 of 2 tokens have no slot: token 1 (row 0, position 3) is beyond its row's length
  """
  both = zip(groups.each(cache), groups.values_for("plan", plan, cache))
  for each, its_plan in both:
    _check_call("check_plan(cache, plan)", each, its_plan)
  plans.check(groups.each(ledgers(cache)), groups.each(plan))


def write(
  cache: Cache, layer: int | jax.Array, k: jax.Array, v: jax.Array | None, plan: Plan
) -> Cache:
  """Writes keys and values [B,H,D] of the plan's tokens in one layer, in the cache's dtype.

  In a cache of 8 bits each key and value gets a scale of its own (`quantization.quantize`): one with
  a NaN or an infinity reads NaN.

  `v` is None if values are channels of the keys (`CacheConfig.value_dim`), and only then.

  Tokens without a slot are dropped. The write is in place if the cache is donated or carried by a
  loop. Read the cache that is returned, never the one that was passed. `write` has gradients,
  except if the cache has 8 bits or keeps bits (see `CacheConfig.storage_dtype`).

  A traced `layer` out of range writes keys of NaN into the last layer, so that the mistake shows.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([2, 0]))
  >>> plan = pj.jitted.plan(cache, jnp.array([0, 0]), jnp.array([0, 1]))
  >>> k = jnp.stack([jnp.full((1, 4), 1.0), jnp.full((1, 4), 2.0)])  # [B,H,D]
  >>> cache = pj.jitted.write(cache, 0, k, -k, plan)
  >>> pj.jitted.gather(cache, 0, jnp.array([0]), num_tokens=2)[0][0, :, 0, 0].tolist()
  [1.0, 2.0]
  """
  _check_call("write(cache, layer, k, v, plan)", cache, plan)
  num_layers, h = cache.pages.kv.shape[1], pages_lib.num_kv_heads(cache.pages)
  shape = (plan.rows.shape[0], h, cache.pages.head_dim)
  k, value_dim = arguments.floats("k", k, shape), cache.pages.value_dim
  if value_dim is None:
    v = arguments.floats("v", v, shape)
  elif v is not None:
    raise ValueError(
      f"v must be None: with {value_dim=} a value is channels of its key, got {list(jnp.shape(v))}"
    )
  index = arguments.layer(layer, num_layers)
  k = _poisoned(k, layer, index, num_layers)
  index = jnp.minimum(index, num_layers - 1)
  return dataclasses.replace(cache, pages=attention.write(cache.pages, index, k, v, plan))


def attend(
  cache: Cache,
  layer: int | jax.Array,
  q: jax.Array,
  plan: Plan,
  *,
  scale: float | jax.Array | None = None,
  window: int | jax.Array | None = None,
  softcap: float | None = None,
  sinks: jax.Array | None = None,
  return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Paged attention (Kwon et al. 2023, §4.3) of the plan's tokens over their rows' past.

  Prefill, chunked prefill, decode and verification are all this one call: the token at position i
  sees the live tokens of its row up to i.

  Args:
    cache: The cache, this step's keys and values already written.
    layer: Which layer, a Python int or i32[].
    q: [B,Q,D] queries; Q is a multiple of H, and H groups of query heads share a KV head.
    plan: What `plan` returned for this step.
    scale: Factor of the logits, D**-0.5 by default.
    window: Tokens that a query sees, itself included; the largest int32 means all. In a cache with
      a window it is that one by default, and never more.
    softcap: Logits become softcap * tanh(logits / softcap).
    sinks: f32[Q] a logit per head that takes part in the softmax and carries no value.
    return_lse: Also return the log of each softmax denominator, sinks included.

  Returns:
    [B,Q,D] in q's dtype, and f32[B,Q] if `return_lse`. Padding and tokens that are not ok give 0
    and -inf. Logits and sums are float32. Live keys and values must be finite: a NaN or infinity
    may reach other tokens of its row, never another row. A traced `layer` out of range gives NaN.
    If the cache has a `value_dim`, the result is that wide: [B,Q,value_dim].

  Gradients are those of the "reference" implementation, also if another one computes the values.
  They take its time and memory: the whole row of every token.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([2, 0]))
  >>> plan = pj.jitted.plan(cache, jnp.array([0, 0]), jnp.array([0, 1]))
  >>> k = jnp.stack([jnp.full((1, 4), 1.0), jnp.full((1, 4), 2.0)])  # [B,H,D]
  >>> cache = pj.jitted.write(cache, 0, k, k, plan)
  >>> out = pj.jitted.attend(cache, 0, jnp.zeros((2, 1, 4)), plan)  # of 1, and of 1 and 2
  >>> out[:, 0, 0].tolist()
  [1.0, 1.5]
  """
  _check_call("attend(cache, layer, q, plan)", cache, plan)
  num_layers = cache.pages.kv.shape[1]
  index = arguments.layer(layer, num_layers)
  scale = cache.pages.head_dim**-0.5 if scale is None else scale
  window = _within(cache.ledger.window, window)
  scale = _poisoned(scale, layer, index, num_layers)  # a number, not all heads that come out
  out, lse = attention.attend(
    q, cache.pages, jnp.minimum(index, num_layers - 1), cache.ledger.tables, plan,
    scale=scale, window=window, softcap=softcap, sinks=sinks, lse=return_lse,
  )  # fmt: skip
  return out if lse is None else (out, lse)


def gather(
  cache: Cache, layer: int | jax.Array, rows: jax.Array, *, num_tokens: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Keys and values of `rows` i32[R] in token order: two arrays [R,C,H,D].

  They have the cache's dtype; those of a cache of 8 bits are float32, numbers times scales. If the
  cache has a `value_dim`, the values are that many channels of the keys. C is `num_tokens`, or a
  row's capacity by default. Where a row has no live token the result is zero, whatever its pages
  contain. A traced `layer` out of range gives NaN.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> k, v = pj.jitted.gather(cache, 0, jnp.array([0, 1]), num_tokens=6)
  >>> k.shape, v.shape
  ((2, 6, 1, 4), (2, 6, 1, 4))
  """
  rows = arguments.integers("rows", rows, (None,))
  num_layers = cache.pages.kv.shape[1]
  index = arguments.layer(layer, num_layers)
  ledger = cache.ledger
  size = ledger.capacity
  if num_tokens is not None:
    size = arguments.size("num_tokens", num_tokens, ledger.capacity)
  known = jnp.where((rows >= 0) & (rows < ledger.num_rows), rows, ledger.num_rows)
  columns = jnp.arange(-(-size // ledger.page_size), dtype=jnp.int32)
  tables = tables_lib.page_at(
    ledger.tables.block_tables, known[:, None], columns[None, :], ledger.pool.num_pages
  )
  k, v = pages_lib.gather(cache.pages, index, tables)
  positions = jnp.arange(size, dtype=jnp.int32)[None, :]
  starts = ledger.tables.starts.at[known].get(mode="fill", fill_value=0)[:, None]
  lengths = ledger.tables.lengths.at[known].get(mode="fill", fill_value=0)[:, None]
  live = ((positions >= starts) & (positions < lengths))[..., None, None]
  zero = jnp.zeros((), k.dtype)
  k, v = (jnp.where(live, pages_lib.once(x[:, :size], cache.pages), zero) for x in (k, v))
  return _poisoned(k, layer, index, num_layers), _poisoned(v, layer, index, num_layers)


def fork(
  cache: Caches, src: jax.Array, dst: jax.Array, num_tokens: jax.Array | None = None
) -> tuple[Caches, Info]:
  """Empty rows `dst` i32[B] share the first tokens of rows `src` i32[B]. No bytes move.

      # before  row 0  [a][b . . .]      row 1  -                  a 1 holder, b 1
      # after   row 0  [a][b . . .]      row 1  [a][b . . .]       a 2 holders, b 2

  `num_tokens` i32[B] is all of the source's tokens by default. Every entry reads the state before
  the call. An entry is refused if `src` is no row, `dst` is not empty or an earlier entry named it,
  or the source does not hold that many tokens. With `copy_on_write` off, an entry that would share
  part of a page is refused too.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, info = pj.jitted.fork(cache, jnp.array([0]), jnp.array([1]))
  >>> cache.block_tables[:, :2].tolist(), int(info.num_free)
  ([[0, 1], [0, 1]], 6)
  """
  return _with_ledger(cache, *ledger_lib.fork(ledgers(cache), src, dst, num_tokens))


def reorder(cache: Caches, sources: jax.Array) -> tuple[Caches, Info]:
  """Row r becomes a share of row `sources[r]`, i32[S], all rows at once; S empties the row.

      # sources  [1, 1]
      # before   row 0  [a][b]      row 1  [a][c]      a 2 holders, b 1, c 1
      # after    row 0  [a][c]      row 1  [a][c]      a 2 holders, c 2, b is free

  A step of beam search is `reorder`, then `extend`. `reorder` takes no pages. A source that is no
  row is refused, and its row keeps what it has. With `copy_on_write` off, a source that ends inside
  a page is refused too.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 3]))
  >>> cache, info = pj.jitted.reorder(cache, jnp.array([1, 1]))
  >>> cache.lengths.tolist(), int(info.num_free)
  ([3, 3], 7)
  """
  return _with_ledger(cache, *ledger_lib.reorder(ledgers(cache), sources))


def unshare(cache: Caches, starts: jax.Array) -> tuple[Caches, Info]:
  """Copies the shared pages of each row from token `starts` i32[S] on, so that it may rewrite them.

      # start at token 4, in b
      # before  row 0  [a][b]      row 1  [a][b]      a 2 holders, b 2
      # after   row 0  [a][c]      row 1  [a][b]      a 2 holders, b 1, c 1

  Row by row in order, like `extend`. A start at the row's length asks for nothing; a start outside
  0..length is refused.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, _ = pj.jitted.fork(cache, jnp.array([0]), jnp.array([1]))
  >>> cache, info = pj.jitted.unshare(cache, jnp.array([4, 6]))
  >>> cache.block_tables[:, :2].tolist()
  [[0, 2], [0, 1]]
  """
  ledger, info, copies = ledger_lib.unshare(ledgers(cache), starts)
  return _renew(cache, ledger, copies), info


def trim(cache: Caches, lengths: jax.Array) -> tuple[Caches, Info]:
  """Each row keeps its first `lengths` i32[S] tokens, and releases whole pages behind them.

  0 empties the row. A length above the row's, a negative one, or one that a window has already
  passed is refused.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, info = pj.jitted.trim(cache, jnp.array([3, 0]))
  >>> cache.lengths.tolist(), int(info.num_free)
  ([3, 0], 7)
  """
  return _with_ledger(cache, *ledger_lib.trim(ledgers(cache), lengths))


def slide(cache: Caches, starts: jax.Array) -> tuple[Caches, Info]:
  """Each row forgets its tokens before `starts` i32[S], and releases whole pages before them.

  Positions do not change. A start that the row has already passed changes nothing; a negative one
  or one above the length is refused.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, info = pj.jitted.slide(cache, jnp.array([5, 0]))
  >>> cache.block_tables[0, :2].tolist(), int(info.num_free)  # 8 is "no page"
  ([8, 1], 7)
  """
  return _with_ledger(cache, *ledger_lib.slide(ledgers(cache), starts))


def free(cache: Caches, rows: jax.Array) -> tuple[Caches, Info]:
  """The rows marked in `rows` bool[S] release everything. Freeing an empty row is refused.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, info = pj.jitted.free(cache, jnp.array([True, True]))
  >>> info.ok.tolist(), int(info.num_free)
  ([True, False], 8)
  """
  return _with_ledger(cache, *ledger_lib.free(ledgers(cache), rows))


def hold(cache: Caches, pages: Any) -> tuple[Caches, Info]:
  """Adds one hold of the host to each of `pages` i32[B]; a free or unknown page is refused.

      # before  row 0  [a]        a 1 holder
      # after   row 0  [a] host   a 2 holders, so a outlives row 0

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, info = pj.jitted.hold(cache, jnp.array([0, 7]))
  >>> cache, _ = pj.jitted.free(cache, jnp.array([True, False]))
  >>> info.ok.tolist(), int(cache.num_free)
  ([True, False], 7)
  """
  return _with_ledger(cache, *ledger_lib.hold(ledgers(cache), pages))


def drop(cache: Caches, pages: Any) -> tuple[Caches, Info]:
  """Takes one hold of the host back from each of `pages` i32[B]; without a hold it is refused.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, _ = pj.jitted.hold(cache, jnp.array([0]))
  >>> cache, info = pj.jitted.drop(cache, jnp.array([0, 0]))
  >>> info.ok.tolist()
  [True, False]
  """
  return _with_ledger(cache, *ledger_lib.drop(ledgers(cache), pages))


def adopt(
  cache: Caches, rows: jax.Array, pages: Any, lengths: jax.Array, starts: Any = None
) -> tuple[Caches, Info]:
  """Empty rows start on pages that the host holds (a prefix hit). The holds remain.

      # before  host  a b      row 1  -           a 1 holder, b 1
      # after   host  a b      row 1  [a][b]      a 2 holders, b 2

  Args:
    cache: The cache.
    rows: i32[B] distinct empty rows; S pads.
    pages: i32[B,C] the held pages of each row in order; those past its last page are ignored.
    lengths: i32[B] tokens of each row, counted from position 0.
    starts: i32[B] first live token, 0 by default; `pages` begins with the page that holds it.

  Returns:
    The next cache, and `Info` with ok bool[B]. An entry is refused if its row is unknown, not empty
    or named by an earlier entry, if a page is not held, or if the pages cannot hold the tokens.
    With `copy_on_write` off, a length inside a page is refused too.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 0]))
  >>> cache, _ = pj.jitted.hold(cache, jnp.array([0, 1]))
  >>> cache, info = pj.jitted.adopt(cache, jnp.array([1]), jnp.array([[0, 1]]), jnp.array([5]))
  >>> cache.lengths.tolist(), cache.ledger.pool.refcount[:2].tolist()
  ([6, 5], [3, 3])
  """
  return _with_ledger(cache, *ledger_lib.adopt(ledgers(cache), rows, pages, lengths, starts))


def scrub(cache: Caches, pages: Any) -> Caches:
  """Clears those of `pages` i32[B] that nobody holds. Only for secrecy: no verb shows stale bytes.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache = pj.jitted.scrub(pj.init(config), jnp.array([0, 1, 2]))
  >>> bool((cache.pages.kv[:3] == 0).all())
  True
  """
  listed = groups.values_for("pages", pages, cache)
  return groups.like(cache, [_scrub(*both) for both in zip(groups.each(cache), listed)])


def _scrub(cache: Cache, pages: jax.Array) -> Cache:
  pages = arguments.integers("pages", pages, (None,))
  n = cache.ledger.pool.num_pages
  known = jnp.where((pages >= 0) & (pages < n), pages, n)
  idle = pool_lib.refcounts(cache.ledger.pool, known) == 0
  bytes_ = pages_lib.clear(cache.pages, jnp.where(idle, known, n))
  return dataclasses.replace(cache, pages=bytes_)


def audit(cache: Caches) -> Any:
  """Counts how often each law of refcounts, bitmap and tables is broken: 0 if the cache is sound.

  Returns an `Audit`, or one of each cache of a tuple.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> sum(map(int, pj.jitted.audit(pj.init(config))))
  0
  """
  return ledger_lib.audit(ledgers(cache))


def _within(most: int | None, window: int | jax.Array | None) -> int | jax.Array | None:
  """The window of a call, at most that of the cache, whose rows forget what is before it."""
  if most is None or window is None:
    return most if window is None else window
  return jnp.minimum(window, most) if isinstance(window, jax.Array) else min(window, most)


def _poisoned(x, layer: int | jax.Array, index: jax.Array, num_layers: int):
  """`x`, or NaN if a traced `layer` is out of range, as its `index` says."""
  if isinstance(layer, int | np.integer):
    return x
  return jnp.where(index < num_layers, x, jnp.nan)


def _check_call(call: str, cache: Cache, plan: Plan) -> None:
  """Raises unless `cache` and `plan` are where they should be."""
  for name, value, kind in (("cache", cache, Cache), ("plan", plan, Plan)):
    if not isinstance(value, kind):
      raise ValueError(f"{name} must be a {kind.__name__} in {call}, got {type(value).__name__}")


def ledgers(cache: Caches) -> Any:
  """The ledger of each cache.

  Raises:
    ValueError: There is no cache, or something else.
  """
  for each in groups.each(cache):
    if not isinstance(each, Cache):
      raise ValueError(f"cache must be a Cache or a tuple of them, got {type(each).__name__}")
  return groups.like(cache, [each.ledger for each in groups.each(cache)])


def _with_ledger(cache: Caches, ledger: Any, info: Info) -> tuple[Caches, Info]:
  both = zip(groups.each(cache), groups.each(ledger))
  return groups.like(cache, [dataclasses.replace(c, ledger=each) for c, each in both]), info


def _renew(cache: Caches, ledger: Any, copies: Any) -> Caches:
  renewed = zip(*(groups.each(x) for x in (cache, ledger, copies)))
  return groups.like(cache, [_renewed(*each) for each in renewed])


def _renewed(cache: Cache, ledger: Ledger, copies: Copies) -> Cache:
  pages = pages_lib.renew(cache.pages, ledger.tables.block_tables, copies)
  return Cache(ledger=ledger, pages=pages)
