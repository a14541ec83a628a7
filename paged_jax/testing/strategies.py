"""Hypothesis strategies: configurations, and histories of verbs, about half of them granted.

A history is a list of steps `(verb, operands)` in plain Python. While it is drawn the plain-Python
model runs it, so that it often names busy rows, held pages and full pools, and wrong ones too.
"""

import dataclasses
from typing import Any

from hypothesis import strategies as st

from paged_jax.config import CacheConfig
from paged_jax.testing.model import Model

FORKS, PAGES, ADOPTED, TOKENS, IMAGES = 3, 4, 2, 6, 3  # entries of a request: one trace per verb

VERBS = (
  "extend", "extend", "extend", "write", "write", "write", "fork", "fork", "reorder", "unshare",
  "trim", "slide", "free", "hold", "hold", "drop", "adopt", "adopt", "offload", "restore",
  "restore", "swap_out", "swap_in",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
  """One call: a verb's name and its operands, lists of plain ints and bools."""

  verb: str
  operands: tuple


@dataclasses.dataclass
class Images:
  """What a history has taken out of a cache so far."""

  rows: list = dataclasses.field(default_factory=list)  # by `swap_out`; `swap_in` takes one away
  pages: list = dataclasses.field(default_factory=list)  # by `offload`; `restore` leaves them


@st.composite
def configs(draw, **fixed) -> CacheConfig:
  """Small caches around the corners: one page, one row, pages of one token."""
  config = CacheConfig(
    num_layers=draw(st.integers(1, 2)),
    num_kv_heads=draw(st.integers(1, 2)),
    head_dim=2,
    page_size=draw(st.sampled_from([1, 2, 3, 4])),
    num_pages=draw(st.sampled_from([1, 2, 7, 31, 32, 33])),
    num_rows=draw(st.integers(1, 5)),
    max_length=draw(st.integers(1, 14)),
    dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
    storage_head_dim=draw(st.sampled_from([None, 5])),
    value_dim=draw(st.sampled_from([None, None, 1])),
    copy_on_write=draw(st.sampled_from([True, True, False])),
  )
  return dataclasses.replace(config, **fixed)


@st.composite
def histories(draw, config: CacheConfig, max_steps: int = 30) -> list[Step]:
  """A list of up to `max_steps` steps for a cache of this `config`."""
  model = Model(config)
  images = Images()
  steps = []
  for _ in range(draw(st.integers(1, max_steps))):
    verb = draw(st.sampled_from(VERBS))
    if (verb == "swap_in" and not images.rows) or (verb == "restore" and not images.pages):
      continue
    operands = _OPERANDS[verb](draw, model, images)
    steps.append(Step(verb, operands))
    apply(model, images, steps[-1])
  return steps


def apply(model: Model, images: Images, step: Step) -> Any:
  """Runs a step on the model; what leaves the cache is kept in `images`."""
  match step.verb, step.operands:
    case "swap_out", (row,):
      image, ok = model.swap_out(row)
      images.rows += [image] if ok else []
    case "swap_in", (row, index):
      ok = model.swap_in(row, images.rows[index])
      if ok:
        images.rows.pop(index)
    case "offload", (pages,):
      images.pages += model.offload(pages)
      ok = True
    case "restore", (indices, count):
      return model.restore([images.pages[i] for i in indices], count)
    case verb, operands:
      ok = getattr(model, verb)(*operands)
  return ok


def _counts(draw, model, images):
  del images
  most = draw(st.sampled_from([1, model.size + 1, model.capacity + 1, 2**31 - 1]))
  return (draw(_ints(-1, most, len(model.rows))),)


def _tokens(draw, model, images):
  """A run of tokens of one or two rows, each from some position on, with padding between."""
  del images
  rows, positions = [], []
  for row in draw(st.permutations(range(-1, len(model.rows) + 1)))[:2]:
    length = model.rows[row].length if 0 <= row < len(model.rows) else 1
    begin = draw(st.integers(-1, max(length - 1, 0)))
    run = draw(st.integers(1, TOKENS // 2 - 1))
    rows += [row] * run + [len(model.rows)]
    positions += [*range(begin, begin + run), 0]
  if draw(st.integers(0, 3)) == 0:  # out of order
    rows[-2], positions[-2] = rows[0], draw(st.sampled_from(positions))
  pad = TOKENS - len(rows)
  return rows + [len(model.rows)] * pad, positions + [0] * pad, draw(_ints(1, 255, TOKENS))


def _forks(draw, model, images):
  del images
  rows = st.integers(-1, len(model.rows))
  src, dst = draw(_list(rows, FORKS)), draw(_list(rows, FORKS))
  lengths = [model.rows[s].length if 0 <= s < len(model.rows) else 0 for s in src]
  return src, dst, [draw(st.sampled_from([n, n, n - 1, n // 2, n + 1])) for n in lengths]


def _sources(draw, model, images):
  del images
  own = list(range(len(model.rows)))
  return ([draw(st.sampled_from([r, r, *own, -1, len(own), len(own) + 1])) for r in own],)


def _lengths(draw, model, images):
  del images
  return ([draw(st.sampled_from([r.length, r.length, r.length - 1, r.length // 2, r.length + 1]))
           for r in model.rows],)  # fmt: skip


def _marks(draw, model, images):
  del images
  return (draw(_list(st.sampled_from([False, False, True]), len(model.rows))),)


def _pages(draw, model, images):
  del images
  ids = range(model.num_pages)
  used = [page for page in ids if model.refcount(page) > 0]
  some = st.sampled_from([*used, *used, 0, model.num_pages - 1, model.num_pages, -1])
  return (draw(_list(some, PAGES)),)


def _adopted(draw, model, images):
  del images
  held = [page for page in range(model.num_pages) if model.holds[page] > 0]
  some = st.sampled_from([*held * 3, 0, -1, model.num_pages])
  width = model.capacity // model.size
  rows = draw(_list(st.integers(-1, len(model.rows)), ADOPTED))
  pages = [draw(_list(some, width)) for _ in range(ADOPTED)]
  lengths = draw(_ints(-1, min(2 * model.size, model.capacity + 1), ADOPTED))
  return rows, pages, lengths, [draw(st.sampled_from([0, 0, n // 2, n, n + 1])) for n in lengths]


def _taken(draw, model, images):
  """Pages that somebody holds, since a free one may hold anything, and no pages."""
  del images
  used = [page for page in range(model.num_pages) if model.refcount(page) > 0]
  return (draw(_list(st.sampled_from([*used * 2, -1, model.num_pages]), IMAGES)),)


def _stored(draw, model, images):
  del model
  index = st.integers(0, len(images.pages) - 1)
  return draw(_list(index, IMAGES)), draw(st.integers(-1, IMAGES + 1))


def _row(draw, model, images):
  del images
  return (draw(st.integers(-1, len(model.rows))),)


def _returning(draw, model, images):
  return draw(st.integers(-1, len(model.rows))), draw(st.integers(0, len(images.rows) - 1))


def _list(elements, size):
  return st.lists(elements, min_size=size, max_size=size)


def _ints(low, high, size):
  return _list(st.integers(low, high), size)


_OPERANDS = {
  "extend": _counts,
  "write": _tokens,
  "fork": _forks,
  "reorder": _sources,
  "unshare": _lengths,
  "trim": _lengths,
  "slide": _lengths,
  "free": _marks,
  "hold": _pages,
  "drop": _pages,
  "adopt": _adopted,
  "offload": _taken,
  "restore": _stored,
  "swap_out": _row,
  "swap_in": _returning,
}
