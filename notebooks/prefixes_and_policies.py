# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Prefixes and policies
#
# The manager keeps the pages of finished prompts for later requests that begin the same way. When
# it needs room, it evicts some of them. A policy, which you can pass in, decides the order.

# %%
try:
  import paged_jax
except ImportError:
  # For Colab: put a checkout of the repository at /content/paged_jax first.
  # %pip install -q "/content/paged_jax[demo,train]"
  import paged_jax

import matplotlib.pyplot as plt
import numpy as np

from paged_jax.host import Manager, ManagerConfig, Request, eviction

# %% [markdown]
# ## A hit
#
# Request `a` has a prompt. A model would compute its keys and values; here it only takes pages. The
# prompt is stored with its last logits, and stays when the request ends. Request `b` reuses the
# tokens that it shares with `a`, and starts after them.

# %%
config = paged_jax.CacheConfig(
  num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, num_pages=48, num_rows=4, max_length=128,
  dtype="float32",
)  # fmt: skip
manager = Manager(config, ManagerConfig(min_prefix_length=4))
system = list(range(10))

a = manager.allocate(Request("a", tokens=[*system, 71, 72, 73]))
manager.store_prefix(a, last_logits="the logits of token 73")
manager.deallocate("a")

b = manager.allocate(Request("b", tokens=[*system, 81, 82]))
again = manager.allocate(Request("a again", tokens=[*system, 71, 72, 73]))
print(f"b starts with {b.num_cached} of 12 tokens, on pages {b.pages}")
print(f"a again has all {again.num_cached}, and {again.last_logits}: nothing to compute")

# %% [markdown]
# Both requests use the same physical pages 0 and 1. Page 2 has the last two tokens of `system`, and
# then tokens that only `a` has. So `b` shared page 2 at first, and got a copy of it to write its own
# tokens.
#
# ## Four policies on one workload
#
# Four system prompts are used often. Between them come long documents, each used once. With "first
# in, first out" the documents push out the system prompts, even if these are in use often.

# %%
rng = np.random.default_rng(0)
systems = [[1000 * (i + 1) + j for j in range(24)] for i in range(4)]


def prompts(count):
  for _ in range(count):
    if rng.random() < 0.4:
      yield [int(x) for x in rng.integers(10**6, 10**9, 60)]  # a document
    else:
      yield systems[rng.integers(4)] + [int(x) for x in rng.integers(10**6, 10**9, 8)]


def hit_share(policy, workload):
  """The fraction of all prompt tokens that the prefix cache had."""
  options = ManagerConfig(eviction=policy, max_prefixes=1000, min_prefix_length=4)
  manager = Manager(config, options)
  for number, tokens in enumerate(workload):
    handle = manager.allocate(Request(number, tokens=tokens))
    manager.store_prefix(handle, tokens[:-8])  # not its end, which does not come again
    manager.deallocate(number)
  assert manager.audit().clean
  stats = manager.prefix_stats()
  return stats.tokens_hit / stats.tokens_queried


# %% [markdown]
# A policy gives each prefix a rank by its use; the lowest rank goes first. Here is our own policy:
# prefixes without a hit go first, at any age.

# %%
proven = eviction.Policy("proven", lambda use: (use.hits > 0, use.last))

workload = list(prompts(200))
policies = [eviction.LRU, eviction.FIFO, eviction.CLOCK, proven]
shares = {policy.name: hit_share(policy, workload) for policy in policies}
print({name: round(share, 3) for name, share in shares.items()})

# %%
fig, ax = plt.subplots(figsize=(6, 2.4), layout="constrained")
bars = ax.barh(list(shares), [100 * x for x in shares.values()], color="#3b6fb6")
ax.bar_label(bars, fmt="%.0f%%", padding=3)
ax.set(xlabel="prompt tokens found in the cache, %", xlim=(0, 42))
ax.invert_yaxis()
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Pressure
#
# The manager calls back when the pool fills up or empties. A callback may call any method, for
# example to end requests.

# %%
manager = Manager(config)
manager.on_pressure(
  lambda change: print(f"{change.left.name} -> {change.entered.name}, {change.num_free} pages free")
)
for name in "cdef":
  manager.allocate(Request(name, 48))
manager.deallocate_many("cdef")
