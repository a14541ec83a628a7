"""From which page size on is swapping a sequence cheaper than computing it again?

As in section 7.3, figure 19 of the PagedAttention paper (Kwon et al. 2023). Both ways take a running
sequence's pages and row away and bring it back to where it was, and both end when its bytes are in
the pool:

    # swap         swap_out ─ swap_in                      the same bytes, page by page
    # recompute    deallocate ─ allocate ─ one prefill     keys and values of its tokens again

The prefill is one jitted call of exactly the sequence's length and computes no logits, which is as
good as recomputation gets. Two models: the packaged one, and a random one of the same class with 8
layers of width 512. `recompute/swap` is above 1 where swapping is cheaper. On CPU no bus lies between
the pool and host memory, and arithmetic is slow: both make swapping look good.

`ratio_16`, `ratio_64`: the median of it over the lengths, for each model. `swap_wins_from`: the
smallest page size from which on this median is above 1, 0 for none. `small_pages`: swapping with the
smallest pages over swapping with pages of 64, which is the price of many small copies.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

import paged_jax
from paged_jax import models
from paged_jax.host import Manager, ManagerConfig, Request

matplotlib.use("agg")
import matplotlib.pyplot as plt

PAGE_SIZES = (1, 4, 8, 16, 32, 64, 128)
LENGTHS = (64, 128, 256, 480)
ROWS, LONGEST = 8, 512
SHADES = {
  "swap": ("#9fbfe3", "#6d9bd1", "#3b6fb6", "#1d4580"),
  "recompute": ("#f2c08a", "#e8a157", "#d9822b", "#a85a10"),
}


def packaged() -> models.Decoder:
  return models.load(models.embedded())


def larger() -> models.Decoder:
  """Random weights: 8 layers of width 512 with 8 heads, 4 of them for keys and values."""
  config = dataclasses.replace(
    packaged().config, hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8,
    num_kv_heads=4, head_dim=64, windows=(None,) * 8, ropes=(models.Rope(),) * 8,
  )  # fmt: skip
  decoder = models.Decoder(config, rngs=nnx.Rngs(0))
  return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), decoder)


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(cache, decoder, tokens, row):
  """All tokens [B] of the sequence in the empty `row`, as `Manager.run` wants it."""
  positions = jnp.arange(len(tokens), dtype=jnp.int32)
  growth = jnp.zeros(cache.ledger.num_rows, jnp.int32).at[row].set(len(tokens))
  cache, _ = paged_jax.extend(cache, growth)
  plan = paged_jax.plan(cache, jnp.full_like(positions, row), positions)
  cache = decoder(tokens, cache, plan)[1]
  return cache, paged_jax.Log(((growth[None],),), ("extend",)), None


class Sequence:
  """One running sequence, which is preempted and comes back."""

  def __init__(self, decoder: models.Decoder, page_size: int, length: int):
    config = models.cache_config(
      decoder.config, num_pages=2 * LONGEST // page_size, num_rows=ROWS, page_size=page_size,
      max_length=LONGEST,
    )  # fmt: skip
    options = ManagerConfig(num_host_pages=config.pages_per_row, prefix_cache=False)
    self.manager, self.decoder = Manager(config, options), decoder
    self.tokens = np.random.default_rng(0).integers(0, decoder.config.vocab_size, length, np.int32)
    self.begin()

  def begin(self) -> None:
    self.handle = self.manager.allocate(Request("it"))
    row = np.int32(self.handle.row)
    self.manager.run(prefill, self.decoder, self.tokens, row)
    self.manager.settle()

  def swap(self) -> jax.Array:
    self.manager.swap_out(self.handle)
    self.manager.swap_in(self.handle)
    return self.manager.cache.pages.kv

  def recompute(self) -> jax.Array:
    self.manager.deallocate("it")
    self.begin()
    return self.manager.cache.pages.kv


def measured(name: str, decoder: models.Decoder, shapes: list, rounds: int) -> list[dict]:
  """The lines of one model; all shapes take turns, so that noise falls on all alike."""
  contenders = {}
  for shape in shapes:
    contenders[*shape, "swap"] = Sequence(decoder, *shape).swap
    contenders[*shape, "recompute"] = Sequence(decoder, *shape).recompute
  times = measure.medians(contenders, rounds)
  return [
    {
      "model": name,
      "page": page,
      "tokens": length,
      "swap ms": 1e3 * times[page, length, "swap"],
      "recompute ms": 1e3 * times[page, length, "recompute"],
      "recompute/swap": times[page, length, "recompute"] / times[page, length, "swap"],
    }
    for page, length in shapes
  ]


def summary(rows: list[dict]) -> dict:
  """For each model the medians over the lengths at some page sizes, and where swapping wins."""
  found = {}
  for name in dict.fromkeys(row["model"] for row in rows):
    mine = [row for row in rows if row["model"] == name]
    of = {page: [row for row in mine if row["page"] == page] for page in PAGE_SIZES}
    ratios = {
      page: statistics.median(row["recompute/swap"] for row in each)
      for page, each in of.items()
      if each
    }
    wins = [page for page in ratios if all(ratios[x] > 1 for x in ratios if x >= page)]
    found |= {f"{name}_ratio_{page}": ratios[page] for page in (16, 64) if page in ratios}
    found[f"{name}_swap_wins_from"] = min(wins, default=0)
    small = [x["swap ms"] / y["swap ms"] for x, y in zip(of[PAGE_SIZES[0]], of[64])]
    if small:
      found[f"{name}_small_pages"] = statistics.median(small)
  return found


def picture(rows: list[dict], path: pathlib.Path) -> None:
  """Milliseconds over page size: a panel for each model, darker shades for more tokens."""
  names = list(dict.fromkeys(row["model"] for row in rows))
  fig, axes = plt.subplots(
    1, len(names), figsize=(4.8 * len(names), 4.4), layout="constrained", sharey=True, squeeze=False
  )
  for ax, name in zip(axes[0], names):
    mine = [row for row in rows if row["model"] == name]
    pages = sorted({row["page"] for row in mine})
    lengths = sorted({row["tokens"] for row in mine})
    for what, shades in SHADES.items():
      for shade, length in zip(shades, lengths):
        times = [row[f"{what} ms"] for row in mine if row["tokens"] == length]
        ax.plot(pages, times, color=shade, marker="o", ms=3.5)
        if what == "recompute" or length == lengths[0]:  # swaps of all lengths are close
          text = f"{what} {length}" if what == "recompute" else f"swap {lengths[0]}-{lengths[-1]}"
          ax.annotate(
            text, (pages[-1], times[-1]), (7, 0), textcoords="offset points", va="center",
            color=shades[-1] if what == "swap" else shade, fontsize=8,
          )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="tokens per page", title=f"{name} model")
    ax.set_xticks(pages, map(str, pages))
    ax.set_xlim(pages[0] / 1.2, pages[-1] * 4)
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.spines[["top", "right"]].set_visible(False)
  axes[0][0].set_ylabel("milliseconds to preempt and resume")
  fig.savefig(path, dpi=120)


def main(argv: list[str] | None = None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
  parser.add_argument("--rounds", type=int, default=15, help="turns of each contender")
  parser.add_argument("--picture", type=pathlib.Path, help="where to draw it")
  parser.add_argument("--smoke", action="store_true", help="one model, one shape")
  args = parser.parse_args(argv)
  decoders = {"packaged": packaged()} | ({} if args.smoke else {"larger": larger()})
  shapes = [(16, 64)] if args.smoke else [(page, x) for page in PAGE_SIZES for x in LENGTHS]
  rows = [
    row
    for name, decoder in decoders.items()
    for row in measured(name, decoder, shapes, args.rounds)
  ]
  if args.picture:
    picture(rows, args.picture)
  measure.report(rows, summary(rows), as_json=args.json)


if __name__ == "__main__":
  main()
