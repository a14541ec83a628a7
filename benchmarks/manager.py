"""What does the manager's bookkeeping cost, against block pools as engines write them in Python?

The baseline is a lean one: a deque of free blocks, refcounts in a list, slotted requests, prefix
blocks found by a chain of `hash` over (parent, tokens), no hashlib, tokens not compared.

`decode_256_us`: host time per step for 256 running requests, 32 steps to a dispatch: both sides
append the tokens and find a block where one is needed; ours replays the ledger log on the host,
the baseline also hashes each block that fills up, since its prefix cache needs that.
`lookup_2k_us`: a full hit of a 2,000-token prompt, given as a list of ints.
`pool_growth`: host time of allocate, extend, store_prefix and deallocate while the whole pool is full
of stored prefixes, so that each allocation must evict; a pool of 262,144 pages over one of 1,024.
"""

import collections
import time

import measure  # first: it sets XLA's flags

import numpy as np  # isort: skip

import paged_jax
from paged_jax.host import Manager, ManagerConfig, Request
from paged_jax.host.holds import Held
from paged_jax.host.prefix import PrefixIndex, encoded

SIZE, ROWS, STEPS = 16, 256, 32
CHURN = 128  # tokens of a request that evicts
PROMPT = 2000


class Pool:
  """Blocks by number: a deque of the free ones, refcounts, and a hash table of the full ones."""

  __slots__ = ("block_of", "free", "hash_of", "refcount")

  def __init__(self, num_blocks: int):
    self.free = collections.deque(range(num_blocks))
    self.refcount = [0] * num_blocks
    self.block_of: dict[int, int] = {}
    self.hash_of: list[int | None] = [None] * num_blocks

  def take(self) -> int:
    block = self.free.popleft()
    known = self.hash_of[block]
    if known is not None:
      del self.block_of[known]
      self.hash_of[block] = None
    self.refcount[block] = 1
    return block

  def release(self, blocks: list[int]) -> None:
    for block in reversed(blocks):
      self.refcount[block] -= 1
      if self.refcount[block] == 0:
        self.free.append(block)

  def find(self, tokens: list[int]) -> list[int]:
    blocks, chain = [], 0
    for begin in range(0, len(tokens) - SIZE + 1, SIZE):
      chain = hash((chain, tuple(tokens[begin : begin + SIZE])))
      block = self.block_of.get(chain)
      if block is None:
        break
      blocks.append(block)
    return blocks

  def remember(self, chain: int, block: int) -> None:
    self.block_of[chain] = block
    self.hash_of[block] = chain


class Running:
  """A request of the baseline."""

  __slots__ = ("blocks", "chain", "tokens")

  def __init__(self, tokens: list[int]):
    self.tokens, self.blocks, self.chain = tokens, [], 0

  def append(self, token: int, pool: Pool) -> None:
    self.tokens.append(token)
    length = len(self.tokens)
    if length > len(self.blocks) * SIZE:
      self.blocks.append(pool.take())
    if length % SIZE == 0:
      self.chain = hash((self.chain, tuple(self.tokens[-SIZE:])))
      pool.remember(self.chain, self.blocks[-1])


def config(num_pages: int, num_rows: int, max_length: int) -> paged_jax.CacheConfig:
  """A cache with hardly any bytes: only the bookkeeping is measured."""
  return paged_jax.CacheConfig(
    num_layers=1, num_kv_heads=1, head_dim=1, page_size=SIZE, num_pages=num_pages,
    num_rows=num_rows, max_length=max_length, dtype="float32",
  )  # fmt: skip


def decode_ours(steps: int):
  """Returns a function that accounts for one dispatch of `steps` decode steps."""
  manager = Manager(config(16384, ROWS, 1024))
  handles = manager.allocate_many([Request(i, 100 + i % SIZE) for i in range(ROWS)])
  manager.record(np.ones((116, ROWS), np.int32), np.array([100 + i % SIZE for i in range(ROWS)]))
  tokens = np.random.default_rng(0).integers(0, 50_000, (steps, ROWS), dtype=np.int32)
  counts = np.full(ROWS, steps, np.int32)
  log = paged_jax.Log(((np.ones((steps, ROWS), np.int32),),), ("extend",))
  lengths = [handle.num_tokens for handle in handles]

  def dispatch():
    manager.run(lambda cache: (cache, log, None))  # the device's part is not measured
    begin = time.perf_counter()
    manager.settle(tokens=tokens, num_tokens=counts)
    spent = time.perf_counter() - begin
    if handles[0].num_tokens > 900:
      trim = paged_jax.Log(((np.array([lengths], np.int32),),), ("trim",))
      manager.run(lambda cache: (cache, trim, None))
      manager.settle()
      manager._sequences._known[:] = lengths
    return spent

  return dispatch


def decode_baseline(steps: int):
  pool = Pool(16384)
  rng = np.random.default_rng(0)
  running = []
  for i in range(ROWS):
    request = Running([])
    for _ in range(100 + i % SIZE):
      request.append(int(rng.integers(50_000)), pool)
    running.append(request)
  tokens = rng.integers(0, 50_000, (steps, ROWS)).tolist()

  def dispatch():
    begin = time.perf_counter()
    for line in tokens:
      for request, token in zip(running, line):
        request.append(token, pool)
    spent = time.perf_counter() - begin
    if len(running[0].tokens) > 900:
      for i, request in enumerate(running):
        length = 100 + i % SIZE
        keep = -(-length // SIZE)
        pool.release(request.blocks[keep:])
        del request.tokens[length:], request.blocks[keep:]
    return spent

  return dispatch


def lookup_ours(num_entries: int):
  """Returns a function that looks up a stored prompt, a different one each time."""
  index = PrefixIndex(SIZE, max_entries=num_entries, clock=time.monotonic)
  prompts = prompts_of(num_entries)
  for prompt in prompts:
    held = [Held(page=i) for i in range(-(-PROMPT // SIZE))]
    index.store(None, encoded(prompt), lambda n, held=held: held[n:], last_logits=0)
  lists = prompts[:: max(1, num_entries // 100)].tolist()
  turn = iter(range(10**9))

  def look():
    prompt = lists[next(turn) % len(lists)]
    begin = time.perf_counter()
    match = index.find(None, encoded(prompt))
    spent = time.perf_counter() - begin
    assert match.length == PROMPT and match.last_logits == 0
    return spent

  return look


def lookup_baseline(num_entries: int):
  pool = Pool(num_entries * (PROMPT // SIZE))
  prompts = prompts_of(num_entries)
  lists = []
  for i, prompt in enumerate(prompts):
    tokens, chain = prompt.tolist(), 0
    for begin in range(0, PROMPT - SIZE + 1, SIZE):
      chain = hash((chain, tuple(tokens[begin : begin + SIZE])))
      pool.remember(chain, pool.take())
    if i % max(1, num_entries // 100) == 0:
      lists.append(tokens)
  turn = iter(range(10**9))

  def look():
    prompt = lists[next(turn) % len(lists)]
    begin = time.perf_counter()
    blocks = pool.find(prompt)
    spent = time.perf_counter() - begin
    assert len(blocks) == PROMPT // SIZE
    return spent

  return look


def prompts_of(count: int) -> np.ndarray:
  return np.random.default_rng(1).integers(0, 50_000, (count, PROMPT), dtype=np.int32)


def pages_per_second(rounds: int) -> tuple[float, float]:
  """Pages taken and released in batches of 512, one request of two pages in each of 256 rows."""
  manager = Manager(config(65536, ROWS, 64))
  take, free = [], []
  for n in range(rounds + 1):
    names = [(n, i) for i in range(ROWS)]
    requests = [Request(name, 2 * SIZE) for name in names]
    begin = time.perf_counter()
    manager.allocate_many(requests)
    middle = time.perf_counter()
    manager.deallocate_many(names)
    take.append(middle - begin)
    free.append(time.perf_counter() - middle)
  return tuple(2 * ROWS / float(np.median(times[1:])) for times in (take, free))


class NoDevice:
  """Verbs of a device that takes no time: the cache stays as it is."""

  init = staticmethod(paged_jax.jitted.init)

  def __getattr__(self, name: str):
    return lambda cache, *operands: (cache, None)


def churn(num_pages: int):
  """Returns a function that serves one request from a pool that is full of prefixes."""
  options = ManagerConfig(num_host_pages=0, swapping=False, max_prefixes=num_pages)
  manager = Manager(config(num_pages, 4, 2 * CHURN), options, verbs=NoDevice())
  rng, turn = np.random.default_rng(2), iter(range(10**9))

  def serve():
    n, prompt = next(turn), rng.integers(0, 50_000, CHURN, dtype=np.int32)
    begin = time.perf_counter()
    handle = manager.allocate(Request(n, tokens=prompt))
    manager.extend(handle, 1)
    manager.store_prefix(handle, prompt)
    manager.deallocate(n)
    return time.perf_counter() - begin

  while manager.stats().evicted_pages == 0:
    serve()
  return serve


def turns(contenders: dict, rounds: int) -> dict[str, float]:
  """Median microseconds of what each contender says it spent, in turns."""
  times = {name: [] for name in contenders}
  for n in range(rounds + 3):
    for name, run in contenders.items():
      spent = run()
      if n >= 3:
        times[name].append(1e6 * spent)
  return {name: float(np.median(each)) for name, each in times.items()}


def main():
  args = measure.arguments(__doc__.splitlines()[0])
  rows = []
  results = {}
  for steps in (STEPS, 1):
    times = turns({"ours": decode_ours(steps), "baseline": decode_baseline(steps)}, 4 * args.rounds)
    results[steps] = {name: time / steps for name, time in times.items()}
    rows.append({"what": f"decode, {steps} steps to a dispatch, us per step"} | results[steps])
  contenders = {"ours": lookup_ours(100), "baseline": lookup_baseline(100)}
  contenders |= {"ours, 10,000": lookup_ours(10_000)}
  lookups = turns(contenders, 20 * args.rounds)
  rows.append({"what": "full hit of 2,000 tokens, 100 entries, us"} | lookups)
  churns = turns({"ours": churn(1024), "ours, 262,144": churn(262_144)}, 100 * args.rounds)
  rows.append({"what": "a request that must evict, 1,024 pages, us"} | churns)
  taken, released = pages_per_second(args.rounds)
  decode = results[STEPS]
  summary = {
    "decode_256_us": decode["ours"],
    "speedup_decode": decode["baseline"] / decode["ours"],  # at least 3
    "speedup_decode_one_step": results[1]["baseline"] / results[1]["ours"],
    "lookup_2k_us": lookups["ours"],
    "speedup_lookup": lookups["baseline"] / lookups["ours"],  # at least 1
    "lookup_growth": lookups["ours, 10,000"] / lookups["ours"],  # at most 2
    "pool_growth": churns["ours, 262,144"] / churns["ours"],  # at most 1.5
    "take_pages_per_s": taken,
    "free_pages_per_s": released,
  }
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
