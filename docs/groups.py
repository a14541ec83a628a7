"""Draws `docs/groups.png`: one row in two pools, of which one keeps a window."""

import dataclasses
import pathlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

import paged_jax
from paged_jax import jitted, viz

SIZE, WINDOW = 4, 6  # tokens per page, and of the window
MOMENTS = 4, 8, 10, 13, 16  # tokens of the row in each line of the picture
FULL = paged_jax.CacheConfig(
  num_layers=1, num_kv_heads=1, head_dim=4, page_size=SIZE, num_pages=4, num_rows=1, max_length=16
)
CONFIGS = FULL, dataclasses.replace(FULL, num_layers=5, num_pages=3, window=WINDOW)
TITLES = "1 layer sees all tokens", f"5 layers see the last {WINDOW} tokens"
PLACES = 0, 4.5  # of the pools, in pages from the left
WIDTH, HEIGHT, INK, PALE = 0.92, 0.62, "#202020", "#9aa0aa"


def main() -> None:
  """Writes the picture beside this file."""
  figure = plt.figure(figsize=(9, 3.2), layout="constrained")
  axes = figure.add_subplot()
  axes.set(xlim=(-0.8, PLACES[1] + CONFIGS[1].num_pages), ylim=(len(MOMENTS) - 0.35, -0.8))
  axes.set_axis_off()
  for place, config, title in zip(PLACES, CONFIGS, TITLES):
    axes.text(place, -0.55, title, fontsize=10, color=INK)
    for page in range(config.num_pages):
      x = place + page + WIDTH / 2
      axes.text(x, -0.12, f"page {page}", ha="center", fontsize=8, color=PALE)
  caches = jitted.init(CONFIGS)
  for length in range(1, MOMENTS[-1] + 1):
    caches, _ = jitted.extend(caches, np.ones(1, np.int32))
    if length in MOMENTS:
      line = MOMENTS.index(length)
      y = line + HEIGHT / 2
      axes.text(-0.12, y, f"{length} tokens", ha="right", va="center", fontsize=9, color=INK)
      for place, cache in zip(PLACES, caches):
        draw_pool(axes, place, line, cache)
  figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=160)


def draw_pool(axes: Axes, place: float, line: int, cache: paged_jax.Cache) -> None:
  """Draws all pages of a pool, and the row's tokens in them."""
  table = np.asarray(cache.block_tables[0]).tolist()
  start, length = int(cache.ledger.tables.starts[0]), int(cache.lengths[0])
  width = WIDTH / SIZE
  for page in range(cache.ledger.pool.num_pages):
    outline = FancyBboxPatch(
      (place + page, line), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.09",
      facecolor="#eef0f3", edgecolor="#d9dce1", linewidth=0.8,
    )  # fmt: skip
    axes.add_patch(outline)
    first = SIZE * table.index(page) if page in table else length
    for position in range(first, min(first + SIZE, length)):
      x, live = place + page + width * (position - first), position >= start
      cell = Rectangle(
        (x, line), width, HEIGHT, facecolor=viz.colour(0), edgecolor="white", linewidth=0.6,
        alpha=1 if live else 0.25,
      )  # fmt: skip
      axes.add_patch(cell).set_clip_path(outline)
      axes.text(
        x + width / 2, line + HEIGHT / 2, str(position), ha="center", va="center_baseline",
        fontsize=8, color=INK if live else PALE,
      )  # fmt: skip


if __name__ == "__main__":
  main()
