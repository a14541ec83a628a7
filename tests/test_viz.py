import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

import paged_jax
from paged_jax import jitted, viz

matplotlib.use("agg")


def story():
  """Rows a and b share a page, b has copied the next, c is alone, the host holds one page."""
  config = paged_jax.CacheConfig(
    num_layers=1, num_kv_heads=1, head_dim=4, page_size=4, num_pages=12, num_rows=4, max_length=16,
    dtype="float32",
  )  # fmt: skip
  ids = lambda *values: np.array(values, np.int32)  # noqa: E731
  cache, _ = jitted.extend(jitted.init(config), ids(6, 0, 5, 0))
  cache, _ = jitted.fork(cache, ids(0, 4), ids(1, 4))
  cache, _ = jitted.extend(cache, ids(1, 2, 0, 4))
  cache, _ = jitted.hold(cache, cache.block_tables[3, :1])
  cache, _ = jitted.free(cache, np.arange(4) == 3)
  return cache


def test_pages_tell_rows_holders_and_fill():
  pages = viz.pages(story())
  assert sorted(page for page in pages if page.refcount) == [
    ((), 1, 0.0),
    ((0,), 1, 0.75),
    ((0, 1), 2, 1.0),
    ((1,), 1, 1.0),
    ((2,), 1, 0.25),
    ((2,), 1, 1.0),
  ]
  assert sum(page.refcount == 0 for page in pages) == 6


def test_page_map_is_legible_without_colours():
  console = Console(width=80, no_color=True)
  with console.capture() as capture:
    console.print(viz.page_map(story(), columns=6))
  lines = capture.get().splitlines()
  assert [len(line.rstrip()) for line in lines] == [17, 17]
  assert sorted(capture.get().split()) == sorted(
    ["2", "a", "b", "c", "c", "*", "·", "·", "·", "·", "·", "·"]
  )


def test_rows_have_different_colours_and_letters():
  assert len({viz.colour(row) for row in range(32)}) == 32
  assert [viz.label(row) for row in (0, 1, 26, 51, 52)] == ["a", "b", "A", "Z", "a"]


def test_draw_marks_shared_pages_and_names_busy_rows():
  axes = viz.draw(story())
  assert [text.get_text() for text in axes.texts] == ["2"]
  labels = [text.get_text() for text in axes.get_legend().get_texts()]
  assert labels == ["row 0: 7 tokens", "row 1: 8 tokens", "row 2: 5 tokens"]
  matplotlib.pyplot.close(axes.figure)


def test_draw_of_an_empty_cache_has_no_legend():
  _, given = plt.subplots()
  cache, _ = jitted.free(story(), np.array([True, True, True, False]))
  axes = viz.draw(cache, given)
  assert axes is given
  assert axes.get_legend() is None
  matplotlib.pyplot.close(axes.figure)


def both():
  """Rows a and b of 7 and 3 tokens in two groups: all tokens, and the last 3 in pages of 2."""
  sizes = dict(num_kv_heads=1, head_dim=4, num_rows=2, max_length=8, dtype="float32")
  full = paged_jax.CacheConfig(num_layers=1, page_size=4, num_pages=6, **sizes)
  window = paged_jax.CacheConfig(num_layers=5, page_size=2, num_pages=8, window=3, **sizes)
  caches, _ = jitted.extend(jitted.init((full, window)), np.array([6, 2], np.int32))
  return jitted.extend(caches, np.array([1, 1], np.int32))[0]


def test_pages_of_a_tuple_are_a_list_of_each_cache():
  caches = both()
  assert viz.pages(caches) == tuple(map(viz.pages, caches))
  assert [[page.rows for page in pages if page.rows] for pages in viz.pages(caches)] == [
    [(0,), (0,), (1,)],
    [(0,), (1,), (0,), (1,)],
  ]


def test_page_map_of_a_tuple_has_a_title_for_each_cache():
  assert viz.page_map(both(), columns=4).plain.split("\n") == [
    "1 layer, all tokens: 3 of 6 pages taken",
    " a  a  b  ·",
    " ·  ·",
    "",
    "5 layers, the last 3 tokens: 4 of 8 pages taken",
    " ·  ·  a  b",
    " a  b  ·  ·",
  ]


def test_draw_of_a_tuple_is_a_plot_of_each_cache_with_one_legend():
  axes = viz.draw(both(), columns=8)
  assert [each.get_title(loc="left")[:7] for each in axes] == ["1 layer", "5 layer"]
  assert axes[0].get_position().y0 > axes[1].get_position().y0
  assert [each.get_legend() is not None for each in axes] == [False, True]
  given = tuple(plt.subplots(2)[1])
  assert viz.draw(both(), given) is given
  with pytest.raises(ValueError, match="ax must be a tuple of 2, as the cache is, got Axes"):
    viz.draw(both(), given[0])
  plt.close("all")
