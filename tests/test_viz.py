import matplotlib
import matplotlib.pyplot as plt
import numpy as np
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
