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

  several: bool = False  # whether an image of a page is a tuple, one for each group
  rows: list = dataclasses.field(default_factory=list)  # by `swap_out`; `swap_in` takes one away
  pages: list = dataclasses.field(default_factory=list)  # by `offload`; `restore` leaves them

  def keep(self, images: Any) -> None:
    """Keeps what `offload` returned."""
    self.pages += zip(*images) if self.several else images

  def chosen(self, indices: list[int]) -> Any:
    """What `restore` is given."""
    images = [self.pages[i] for i in indices]
    return tuple(zip(*images)) if self.several else tuple(images)


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
    dtype=draw(st.sampled_from(["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"])),
    storage_head_dim=draw(st.sampled_from([None, 5])),
    value_dim=draw(st.sampled_from([None, None, 1])),
    copy_on_write=draw(st.sampled_from([True, True, False])),
    window=draw(st.sampled_from([None, None, 1, 3, 8])),
  )
  return dataclasses.replace(config, **fixed)


@st.composite
def several_configs(draw, **fixed) -> tuple[CacheConfig, ...]:
  """Small caches for the groups of one model: the same rows, everything else their own."""
  first = draw(configs(**fixed))
  shared = {name: getattr(first, name) for name in ("num_rows", "max_length", "copy_on_write")}
  more = draw(st.lists(configs(**(fixed | shared)), min_size=1, max_size=2))
  return first, *more


@st.composite
def histories(
  draw, config: CacheConfig | tuple[CacheConfig, ...], max_steps: int = 30
) -> list[Step]:
  """A list of up to `max_steps` steps for a cache of this `config`, or for a tuple of caches."""
  model = Model(config)
  images = Images(model.several)
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
      images.keep(model.offload(pages))
      ok = True
    case "restore", (indices, count):
      return model.restore(images.chosen(indices), count)
    case verb, operands:
      ok = getattr(model, verb)(*operands)
  return ok


def _counts(draw, model, images):
  del images
  size = model.groups[0].size
  most = draw(st.sampled_from([1, size + 1, model.capacity + 1, 2**31 - 1]))
  return (draw(_ints(-1, most, model.num_rows)),)


def _tokens(draw, model, images):
  """A run of tokens of one or two rows, each from some position on, with padding between."""
  del images
  rows, positions = [], []
  for row in draw(st.permutations(range(-1, model.num_rows + 1)))[:2]:
    length = model.length(row) if 0 <= row < model.num_rows else 1
    begin = draw(st.integers(-1, max(length - 1, 0)))
    run = draw(st.integers(1, TOKENS // 2 - 1))
    rows += [row] * run + [model.num_rows]
    positions += [*range(begin, begin + run), 0]
  if draw(st.integers(0, 3)) == 0:  # out of order
    rows[-2], positions[-2] = rows[0], draw(st.sampled_from(positions))
  pad = TOKENS - len(rows)
  return rows + [model.num_rows] * pad, positions + [0] * pad, draw(_ints(1, 255, TOKENS))


def _forks(draw, model, images):
  del images
  rows = st.integers(-1, model.num_rows)
  src, dst = draw(_list(rows, FORKS)), draw(_list(rows, FORKS))
  lengths = [model.length(s) for s in src]
  return src, dst, [draw(st.sampled_from([n, n, n - 1, n // 2, n + 1])) for n in lengths]


def _sources(draw, model, images):
  del images
  own = list(range(model.num_rows))
  return ([draw(st.sampled_from([r, r, *own, -1, len(own), len(own) + 1])) for r in own],)


def _lengths(draw, model, images):
  del images
  lengths = map(model.length, range(model.num_rows))
  return ([draw(st.sampled_from([n, n, n - 1, n // 2, n + 1])) for n in lengths],)


def _marks(draw, model, images):
  del images
  return (draw(_list(st.sampled_from([False, False, True]), model.num_rows)),)


def _pages(draw, model, images):
  del images
  listed = []
  for group in model.groups:
    used = [page for page in range(group.num_pages) if group.refcount(page) > 0]
    some = st.sampled_from([*used, *used, 0, group.num_pages - 1, group.num_pages, -1])
    listed.append(draw(_list(some, PAGES)))
  return (model.like(listed),)


def _adopted(draw, model, images):
  del images
  rows = draw(_list(st.integers(-1, model.num_rows), ADOPTED))
  size = max(group.size for group in model.groups)
  lengths = draw(_ints(-1, min(2 * size, model.capacity + 1), ADOPTED))
  pages, starts = [], []
  for group in model.groups:
    held = [page for page in range(group.num_pages) if group.holds[page] > 0]
    some = st.sampled_from([*held * 3, 0, -1, group.num_pages])
    pages.append([draw(_list(some, group.capacity // group.size)) for _ in range(ADOPTED)])
    begins = ([0, 0, group.latest_start(n), n // 2, n, n + 1] for n in lengths)
    starts.append([draw(st.sampled_from(each)) for each in begins])
  return rows, model.like(pages), lengths, model.like(starts)


def _taken(draw, model, images):
  """Pages that somebody holds, since a free one may hold anything, and no pages."""
  del images
  listed = []
  for group in model.groups:
    used = [page for page in range(group.num_pages) if group.refcount(page) > 0]
    listed.append(draw(_list(st.sampled_from([*used * 2, -1, group.num_pages]), IMAGES)))
  return (model.like(listed),)


def _stored(draw, model, images):
  index = st.integers(0, len(images.pages) - 1)
  counts = [draw(st.integers(-1, IMAGES + 1)) for _ in model.groups]
  return draw(_list(index, IMAGES)), model.like(counts)


def _row(draw, model, images):
  del images
  return (draw(st.integers(-1, model.num_rows)),)


def _returning(draw, model, images):
  return draw(st.integers(-1, model.num_rows)), draw(st.integers(0, len(images.rows) - 1))


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
