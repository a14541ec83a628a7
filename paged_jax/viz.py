"""Pictures of a cache: the rows of each page, in a terminal (rich) and as a plot (matplotlib).

All take a tuple of caches too, and show one below the other in their order.
"""

import colorsys
import string
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paged_jax import groups
from paged_jax.cache import Caches
from paged_jax.types import Cache

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from rich.text import Text

_SHARED = "#f2f2f2"  # background of a page with several holders
_INK = "#202020"


class Page(NamedTuple):
  """The part of one page that a picture shows."""

  rows: tuple[int, ...]  # rows that map it
  refcount: int  # rows and holds of the host
  fill: float  # part of its slots that hold a token


def pages(cache: Caches) -> Any:
  """Every page of the pool, in order of id: a list of `Page`, or a tuple of one for each cache.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> from paged_jax import viz
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 3]))
  >>> viz.pages(cache)[1]
  Page(rows=(0,), refcount=1, fill=0.5)
  """
  return groups.like(cache, [_pages(each) for each in groups.each(cache)])


def _pages(cache: Cache) -> list[Page]:
  size, tables = cache.ledger.page_size, np.asarray(cache.block_tables)
  lengths, refcounts = np.asarray(cache.lengths), np.asarray(cache.ledger.pool.refcount)
  rows: list[list[int]] = [[] for _ in refcounts]
  tokens = np.zeros(len(refcounts), int)
  for row, logical in zip(*np.nonzero(tables < len(refcounts))):
    page = tables[row, logical]
    rows[page].append(int(row))
    tokens[page] = max(tokens[page], min(size, lengths[row] - logical * size))
  return [Page(tuple(r), int(c), float(n / size)) for r, c, n in zip(rows, refcounts, tokens)]


def colour(row: int) -> str:
  """A colour for each row; those of neighbours differ most.

  >>> from paged_jax import viz
  >>> viz.colour(0)
  '#62a1da'
  """
  hue = (0.58 + row * 0.618034) % 1
  rgb = colorsys.hls_to_rgb(hue, 0.62, 0.62)
  return "#" + "".join(f"{round(255 * x):02x}" for x in rgb)


def label(row: int) -> str:
  """A letter for each row.

  >>> from paged_jax import viz
  >>> viz.label(0), viz.label(27)
  ('a', 'B')
  """
  return string.ascii_letters[row % len(string.ascii_letters)]


def page_map(cache: Caches, columns: int = 24) -> "Text":
  """The pool as rich text, legible without colours too.

  A letter is a page of that row. A number is a page with that many holders. `*` is a page that
  only the host holds, and a dot is a free page. Each cache of a tuple has a title.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> from paged_jax import viz
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 3]))
  >>> viz.page_map(cache).plain.strip()
  'a  a  b  ·  ·  ·  ·  ·'
  """
  from rich.text import Text

  if groups.several(cache):
    parts = [
      Text(title(each) + "\n").append(page_map(each, columns)) for each in groups.each(cache)
    ]
    return Text("\n\n").join(parts)
  text = Text()
  for index, page in enumerate(pages(cache)):
    mark, style = _cell(page)
    text.append(mark, style)
    text.append("\n" if (index + 1) % columns == 0 else " ")
  text.rstrip()
  return text


def title(cache: Cache) -> str:
  """What layers one cache of a tuple is for, and how full it is.

  >>> import paged_jax as pj
  >>> from paged_jax import viz
  >>> config = pj.CacheConfig(5, 1, 4, page_size=4, num_pages=8, num_rows=2, window=6)
  >>> viz.title(pj.init(config))
  '5 layers, the last 6 tokens: 0 of 8 pages taken'
  """
  num_layers, window = cache.pages.kv.shape[1], cache.ledger.window
  layers = "1 layer" if num_layers == 1 else f"{num_layers} layers"
  seen = "all tokens" if window is None else f"the last {window} tokens"
  total = cache.ledger.pool.num_pages
  return f"{layers}, {seen}: {total - int(cache.num_free)} of {total} pages taken"


def _cell(page: Page) -> tuple[str, str]:
  """Two characters for a page, and their style."""
  if page.refcount > 1:
    return f"{min(page.refcount, 99):2}", f"bold {_INK} on {_SHARED}"
  if page.rows:
    return f"{label(page.rows[0]):>2}", f"{_INK} on {colour(page.rows[0])}"
  if page.refcount:
    return " *", f"bold {_INK} on {_SHARED}"
  return " ·", "dim"


def draw(cache: Caches, ax: Any = None, columns: int = 16) -> Any:
  """The pool as a plot: a cell for each page, filled by the part that holds tokens.

  A shared page has a stripe for each row that maps it, and shows the number of its holders. A page
  that only the host holds is grey.

  Args:
    cache: The cache, or a tuple of caches: then each has a plot with a title, one below the other.
    ax: Where to draw, a new figure by default; for a tuple of caches a tuple of as many.
    columns: Pages in a line.

  Returns:
    The matplotlib `Axes`, or a tuple of them.

  Raises:
    ValueError: `ax` is not one of each cache.

  >>> import jax.numpy as jnp, paged_jax as pj
  >>> from paged_jax import viz
  >>> config = pj.CacheConfig(1, 1, 4, page_size=4, num_pages=8, num_rows=2, max_length=16)
  >>> cache, _ = pj.jitted.extend(pj.init(config), jnp.array([6, 3]))
  >>> viz.draw(cache).figure.savefig("/dev/null", format="png")
  """
  from matplotlib import pyplot as plt

  caches = groups.each(cache)
  if ax is None:
    lines = [-(-each.ledger.pool.num_pages // columns) for each in caches]
    titles = 0.3 * len(caches) if groups.several(cache) else 0
    figure = plt.figure(
      figsize=(0.5 * columns, 0.5 * sum(lines) + 0.5 + titles), layout="constrained"
    )
    axes = figure.subplots(len(caches), height_ratios=lines, squeeze=False)[:, 0]
    ax = groups.like(cache, list(axes))
  axes = groups.values_for("ax", ax, cache)
  for each, its_axes in zip(caches, axes):
    _draw_pool(each, its_axes, columns)
    if groups.several(cache):
      its_axes.set_title(title(each), loc="left", fontsize=9)
  _draw_legend(np.asarray(caches[0].lengths), axes[-1])
  return ax


def _draw_pool(cache: Cache, axes: "Axes", columns: int) -> None:
  """Draws all pages of one cache."""
  cells = _pages(cache)
  for index, page in enumerate(cells):
    _draw_page(axes, index % columns, index // columns, page)
  axes.set(xlim=(0, columns), ylim=(-(-len(cells) // columns), 0), aspect="equal")
  axes.set_axis_off()


def _draw_legend(lengths: np.ndarray, axes: "Axes") -> None:
  """Names the rows that hold tokens, below the plot."""
  from matplotlib.patches import Patch

  busy = np.flatnonzero(lengths).tolist()
  handles = [Patch(color=colour(row), label=f"row {row}: {lengths[row]} tokens") for row in busy]
  if handles:
    axes.legend(
      handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False,
      fontsize=8, handlelength=1, handleheight=1,
    )  # fmt: skip


def _draw_page(axes: "Axes", x: int, y: int, page: Page) -> None:
  """Draws a page into the unit square at (x, y)."""
  from matplotlib.patches import FancyBboxPatch, Rectangle

  left, top, size = x + 0.08, y + 0.08, 0.84
  held = page.refcount > 0 and not page.rows
  outline = FancyBboxPatch(
    (left, top), size, size, boxstyle="round,pad=0,rounding_size=0.16",
    facecolor="#aab0bb" if held else "#eef0f3", edgecolor="#d9dce1", linewidth=0.8,
  )  # fmt: skip
  axes.add_patch(outline)
  height = size / max(1, len(page.rows))
  for nth, row in enumerate(page.rows):
    for width, alpha in ((size, 0.25), (size * page.fill, 1.0)):
      corner = (left, top + nth * height)
      stripe = Rectangle(corner, width, height, facecolor=colour(row), alpha=alpha)
      axes.add_patch(stripe).set_clip_path(outline)
  if page.refcount > 1:
    axes.text(
      x + 0.5, y + 0.5, str(page.refcount), ha="center", va="center", fontsize=8,
      fontweight="bold", color=_INK,
      bbox=dict(boxstyle="circle,pad=0.2", facecolor="white", edgecolor="none"),
    )  # fmt: skip
