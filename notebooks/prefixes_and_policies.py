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
# The manager keeps the pages of finished prompts for the next request that begins the same way.
# Which of them go first when room is needed is a policy: a value that you pass in.

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
# Request `a` brings its prompt, and computes its keys and values (here it only takes the pages).
# Stored with its last logits, the prompt outlives the request; `b` starts where it parts from `a`.

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
# Pages 0 and 1 are the same physical pages for everybody. Page 2 has the last two tokens of
# `system`, but also the first of what follows: it was shared, and copied when `b` took its slot.
#
# ## Four policies on one workload
#
# Four system prompts come again and again; in between, long documents are read once each. Under
# "first in, first out" the documents push the system prompts out whether they are used or not.

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
  """Share of all prompt tokens that the prefix cache had."""
  options = ManagerConfig(eviction=policy, max_prefixes=1000, min_prefix_length=4)
  manager = Manager(config, options)
  for number, tokens in enumerate(workload):
    handle = manager.allocate(Request(number, tokens=tokens))
    manager.store_prefix(handle, tokens[:-8])  # what may come again: not the question at its end
    manager.deallocate(number)
  assert manager.audit().clean
  stats = manager.prefix_stats()
  return stats.tokens_hit / stats.tokens_queried


# %% [markdown]
# A policy ranks what could go by how it was used: the lowest rank goes first. One of our own: what
# was never hit goes first, whatever its age.

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
# The manager says when the pool fills up; a subscriber may do anything, even free what it can spare.

# %%
manager = Manager(config)
manager.on_pressure(
  lambda change: print(f"{change.left.name} -> {change.entered.name}, {change.num_free} pages free")
)
for name in "cdef":
  manager.allocate(Request(name, 48))
manager.deallocate_many("cdef")
