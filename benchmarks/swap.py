"""Is swapping a sequence out and in as fast as copying the same bytes to pinned memory and back?

`bandwidth_ratio`: the time of `jax.device_put` of one array of the same size to pinned host memory
and back, over that of `swap_out` and `swap_in` (the worse of 64 MB and 1 GB). Both wait until the
bytes have arrived. Pages are 2 MB, as those of an 8B model. `recompiles` counts compilations
after the first round.
"""

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import jax.numpy as jnp

import paged_jax
from paged_jax.host import Manager, ManagerConfig, Request

SIZE = 16
PAGE_BYTES = 2**21


class Sequence:
  """One sequence that fills the pool, and swaps out and in."""

  def __init__(self, num_bytes: int):
    num_pages = num_bytes // PAGE_BYTES
    config = paged_jax.CacheConfig(
      num_layers=32, num_kv_heads=8, head_dim=128, page_size=SIZE, num_pages=num_pages,
      num_rows=1, max_length=num_pages * SIZE, dtype="float16",
    )  # fmt: skip
    assert config.page_bytes == PAGE_BYTES
    self.manager = Manager(config, ManagerConfig(num_host_pages=num_pages))
    self.handle = self.manager.allocate(Request("all", num_pages * SIZE))

  def out(self) -> None:
    self.manager.swap_out(self.handle)
    jax.block_until_ready([each.image.kv for each in self.handle.held])

  def back(self) -> None:
    self.manager.swap_in(self.handle)
    jax.block_until_ready(self.manager.cache.pages.kv)


class Copy:
  """One array that goes to pinned host memory and back."""

  def __init__(self, num_bytes: int):
    device = jax.devices()[0]
    self.device = jax.sharding.SingleDeviceSharding(device)
    self.host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    self.array = jnp.ones(num_bytes // 2, jnp.float16)

  def out(self) -> None:
    self.array = jax.block_until_ready(jax.device_put(self.array, self.host))

  def back(self) -> None:
    self.array = jax.block_until_ready(jax.device_put(self.array, self.device))


def main():
  args = measure.arguments(__doc__.splitlines()[0])
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
  )
  rows, after = [], 0
  for num_bytes in (2**26, 2**30):
    both = {"swap": Sequence(num_bytes), "device_put": Copy(num_bytes)}
    for each in both.values():
      each.out()
      each.back()
    before = len(compiled)
    turns = {
      f"{name} {way}": getattr(each, way) for name, each in both.items() for way in ("out", "back")
    }
    times = measure.medians(turns, max(3, args.rounds if num_bytes < 2**30 else args.rounds // 3))
    after += len(compiled) - before
    ours, copy = (times[f"{name} out"] + times[f"{name} back"] for name in both)
    rows.append(
      {"MB": num_bytes // 2**20}
      | {f"{name} GB/s": num_bytes / time / 1e9 for name, time in times.items()}
      | {"ratio": copy / ours}
    )
  summary = {"bandwidth_ratio": min(row["ratio"] for row in rows), "recompiles": after}
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
