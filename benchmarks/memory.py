"""How much of the KV memory holds live tokens, and how often does a prefix cache hit?

`live_share_T`: tokens of all requests over the tokens that their memory could hold, for pages of T
tokens and for dense caches of one length, on the Azure 2023 conversation lengths (`--trace` its
csv; drawn from its quantiles without). `hits_at_N`: share of the blocks of Mooncake's conversation
trace (`--trace` its jsonl) that the prefix index has when it may keep N of them, in LRU order.
Pictures go to `--out`.
"""

import argparse
import pathlib

import measure  # first: it sets XLA's flags

import lengths  # isort: skip
import matplotlib
import numpy as np

from paged_jax.host.holds import Held
from paged_jax.host.prefix import PrefixIndex, encoded

matplotlib.use("agg")
import matplotlib.pyplot as plt

PAGES = (8, 16, 32, 64, 128)
DENSE = (8192, 16384)
CAPACITIES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)


def live_share(tokens: np.ndarray, size: int) -> float:
  """Tokens over the tokens that ceil(tokens / size) pages of that size hold."""
  return float(tokens.sum() / (-(-tokens // size) * size).sum())


def hit_rate(requests: list[list[int]], capacity: int) -> float:
  """Blocks found over blocks asked for; the index holds a block as a page of one token."""
  index = PrefixIndex(1, max_entries=len(requests) + 1, min_length=1, clock=lambda: 0.0)
  found = asked = kept = number = 0
  for ids in requests:
    tokens = encoded(ids)
    match = index.find(None, tokens)
    found, asked = found + match.length, asked + len(ids)
    fresh = [Held(page=number + i) for i in range(len(ids) - match.length)]
    number += len(fresh)
    index.store(None, tokens, lambda n, held=match.held + fresh: held[n:], busy=lambda held: False)
    kept += len(fresh)
    while kept > capacity:
      node = next(index.candidates(lambda held: True), None)
      assert node is not None
      kept -= len(index.forget_last(node))
  return found / asked


def picture_of_shares(shares: dict[str, float], path: pathlib.Path) -> None:
  fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
  bars = ax.barh(list(shares), [100 * x for x in shares.values()], color="#3b6fb6")
  ax.bar_label(bars, fmt="%.1f%%", padding=3)
  ax.set(xlim=(0, 112), xlabel="KV memory that holds live tokens, %")
  ax.invert_yaxis()
  ax.spines[["top", "right"]].set_visible(False)
  fig.savefig(path, dpi=120)


def picture_of_hits(hits: dict[int, float], ceiling: float, path: pathlib.Path) -> None:
  fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
  ax.plot(list(hits), [100 * x for x in hits.values()], marker="o", color="#3b6fb6")
  ax.axhline(100 * ceiling, color="gray", linestyle="--")
  ax.annotate("unlimited", (min(hits), 100 * ceiling), (0, 4), textcoords="offset points")
  ax.set(xscale="log", ylim=(0, 45), xlabel="blocks of 512 tokens kept", ylabel="blocks hit, %")
  ax.spines[["top", "right"]].set_visible(False)
  fig.savefig(path, dpi=120)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
  parser.add_argument("--trace", type=pathlib.Path, action="append", default=[],
                      help="Azure's csv, Mooncake's jsonl, or both by naming it twice")  # fmt: skip
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."), help="for pictures")
  args = parser.parse_args()
  files = {path.suffix: path for path in args.trace}
  tokens = lengths.azure(files.get(".csv")).sum(axis=1)
  shares = {f"pages of {size}": live_share(tokens, size) for size in PAGES}
  shares |= {f"dense, {size:,}": live_share(np.minimum(tokens, size), size) for size in DENSE}
  picture_of_shares(shares, args.out / "live_share.png")
  rows = [{"memory": name, "live": share} for name, share in shares.items()]
  summary = {
    "requests": len(tokens),
    "from_trace": int(".csv" in files),
    "live_share_16": shares["pages of 16"],
    "live_share_dense_8192": shares["dense, 8,192"],
  }
  if ".jsonl" in files:
    requests = lengths.mooncake(files[".jsonl"])
    hits = {capacity: hit_rate(requests, capacity) for capacity in CAPACITIES}
    ceiling = hit_rate(requests, 10**9)
    picture_of_hits(hits, ceiling, args.out / "prefix_hits.png")
    rows += [{"memory": f"{n:,} blocks", "hits": rate} for n, rate in hits.items()]
    summary |= {"hits_at_1000": hits[1_000], "hits_at_10000": hits[10_000], "ceiling": ceiling}
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
