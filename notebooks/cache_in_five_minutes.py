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
# # The cache in five minutes
#
# What a paged KV cache does with its pages, in pictures, and how to use it in a decode loop of
# your own.

# %%
try:
  import paged_jax
except ImportError:
  # For Colab: put a checkout of the repository at /content/paged_jax first.
  # %pip install -q "/content/paged_jax[demo,train]"
  import paged_jax

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from paged_jax import viz

# %% [markdown]
# ## One value
#
# A cache is an immutable pytree: the **pages** (K/V bytes), and a **ledger** of integers that says
# which **row** (sequence) holds which page. Here a page has room for 4 tokens, and the pool has 20
# pages for 4 rows.

# %%
config = paged_jax.CacheConfig(
  num_layers=2, num_kv_heads=2, head_dim=16, page_size=4, num_pages=20, num_rows=4, max_length=32,
  dtype="float32",
)  # fmt: skip
cache = paged_jax.init(config)
jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", cache.ledger.tables)

# %% [markdown]
# A **verb** is a pure function `(cache, request) -> (cache, info)` that acts on all rows at once.
# An old cache stays valid, so we can draw several in a row. (Where it need not, use
# `paged_jax.jitted`: the same verbs, donating, so that pages are updated in place.)

# %%
extend, fork, trim, slide, free = map(
  jax.jit, (paged_jax.extend, paged_jax.fork, paged_jax.trim, paged_jax.slide, paged_jax.free)
)
swap_out, swap_in, hold, drop, adopt = map(
  jax.jit,
  (paged_jax.swap_out, paged_jax.swap_in, paged_jax.hold, paged_jax.drop, paged_jax.adopt),
)


def ids(*values):
  return jnp.array(values, jnp.int32)


def film(caches):
  """Draws caches one below the other; a column is a page of the pool."""
  _, axes = plt.subplots(len(caches), figsize=(9, len(caches)), layout="constrained", squeeze=False)
  for ax, (title, cache) in zip(axes[:, 0], caches.items()):
    viz.draw(cache, ax, columns=config.num_pages)
    ax.set_title(title, loc="left", fontsize=9)
  plt.show()


# %% [markdown]
# ## Room for tokens
#
# `extend` asks for room in each row. A page is taken only when a token needs it. In the picture a
# cell is a page, coloured by row, and full as far as it holds tokens.

# %%
start, _ = extend(cache, ids(10, 6, 0, 0))
longer, _ = extend(start, ids(1, 3, 0, 0))
film({"extend by 10, 6, 0, 0": start, "extend by 1, 3, 0, 0": longer})

# %% [markdown]
# ## Sharing, and copy on write
#
# `fork` makes row 2 a second holder of row 1's pages; no bytes move. The number is the page's
# refcount, and a stripe marks each row. The rows part when one of them grows: the tail page, partly
# filled and shared, is copied first, and the last sharer keeps it. Full pages stay shared.

# %%
forked, _ = fork(start, ids(1), ids(2))
print("pages that the next token takes:", paged_jax.pages_needed(forked, ids(1, 1, 1, 0)))
parted, _ = extend(forked, ids(0, 1, 1, 0))
film({"fork row 1 into row 2": forked, "one more token in rows 1 and 2": parted})

# %% [markdown]
# ## A full pool is an answer
#
# Nothing raises and nothing is clamped: `info.ok` says which rows got what they asked for, and a
# refused row is unchanged. So the check can be made inside a jitted program. Rows are served in
# order: behind a row refused for want of pages, none that needs a page overtakes it.

# %%
full, info = extend(parted, ids(20, 25, 1, 32))
print("ok", info.ok, " pages free", info.num_free)
film({"before": parted, "extend by 20, 25, 1, 32": full})

# %% [markdown]
# ## Forgetting
#
# `trim` forgets the tail (rejected speculative tokens), `slide` the head (a sliding window), `free`
# all of a row. Whole pages return to the pool once nobody holds them.

# %%
trimmed, _ = trim(full, ids(9, 7, 8, 0))
slid, _ = slide(trimmed, ids(4, 0, 4, 0))
freed, _ = free(slid, jnp.array([False, True, False, False]))
film({
  "trim to 9, 7, 8, 0": trimmed,
  "slide to 4, 0, 4, 0": slid,
  "free row 1": freed,
})  # fmt: skip

# %% [markdown]
# ## Out and back
#
# `swap_out` takes one row's bytes out as an image, which may wait in host memory; `swap_in` puts
# them into whatever pages are free, of any empty row.

# %%
without, image, _ = swap_out(longer, jnp.int32(0))
busy, _ = extend(without, ids(0, 0, 7, 0))
back, _ = swap_in(busy, jnp.int32(3), image)
film({"swap row 0 out": without, "row 2 arrives": busy, "swap the image in as row 3": back})

# %% [markdown]
# ## A prefix hit
#
# The host may hold pages too (grey), so a prompt outlives its row. When the same prompt comes
# again, rows adopt those pages instead of computing them. An index from prompts to pages is all
# that a prefix cache adds.

# %%
prompt_pages = longer.block_tables[0, :2]  # full pages: tokens 0 to 7
held, _ = hold(longer, prompt_pages)
gone, _ = free(held, jnp.array([True, False, False, False]))
hit, _ = adopt(gone, ids(2, 3), jnp.stack([prompt_pages] * 2), ids(8, 8))
grown, _ = extend(hit, ids(0, 0, 3, 6))
dropped, _ = drop(grown, prompt_pages)
film({
  "hold two pages of row 0, then free it": gone,
  "rows 2 and 3 adopt them": hit,
  "rows 2 and 3 go on, the host drops its holds": dropped,
})  # fmt: skip

# %% [markdown]
# ## Layers that differ
#
# In many models most layers see only the last tokens, and a few see all. Each such group of layers
# has a cache of its own, and every verb takes a tuple of caches with the same rows. A row gets room
# in all of them or in none. In a cache with a `window`, `extend` first releases the pages that no
# later token sees: below, the first pages of rows 0 and 1 are free again.

# %%
windows = dataclasses.replace(config, num_layers=5, num_pages=12, window=6)
caches, _ = extend(paged_jax.init((config, windows)), ids(14, 10, 3, 0))
after, info = extend(caches, ids(1, 1, 1, 0))
print("pages free before", [int(each.num_free) for each in caches])
print("after", [int(count) for count in info.num_free], "ok", info.ok)
for each in (caches, after):
  viz.draw(each, columns=config.num_pages)
  plt.show()

# %% [markdown]
# ## Your own decode loop
#
# A toy model in plain JAX. All the cache asks of a model is in the loop over layers: `write` this
# step's K/V, then `attend`. A `plan` describes the step's tokens once, for all layers; prefill and
# decode are the same call.

# %%
vocab_size, hidden, num_heads = 64, 32, 4  # 4 query heads to 2 KV heads of 16
seeds = jax.random.split(jax.random.key(0), 4)
embedding = jax.random.normal(seeds[0], (vocab_size, hidden))
qkv = jax.random.normal(seeds[1], (config.num_layers, hidden, num_heads + 4, 16)) / 4
out = jax.random.normal(seeds[2], (config.num_layers, num_heads, 16, hidden)) / 4
readout = jax.random.normal(seeds[3], (hidden, vocab_size))


def forward(cache, tokens, rows, positions):
  """The most likely token after each of `tokens` i32[B]."""
  plan = paged_jax.plan(cache, rows, positions)
  x = embedding[tokens]
  for layer in range(config.num_layers):
    heads = jnp.einsum("be,ehd->bhd", x, qkv[layer])
    q, k, v = jnp.split(heads, [num_heads, num_heads + 2], axis=1)
    cache = paged_jax.write(cache, layer, k, v, plan)
    x += jnp.einsum("bhd,hde->be", paged_jax.attend(cache, layer, q, plan), out[layer])
  return cache, jnp.argmax(x @ readout, axis=-1).astype(jnp.int32)


# %% [markdown]
# The loop is one program. Each step extends every row by a token, which takes a page now and then,
# and copies one after a fork. A row that gets no page sits the step out.


# %%
def decode(cache, tokens, num_steps):
  """Greedy tokens i32[K,S] of all rows from `tokens` i32[S] on, and which are real."""
  rows = jnp.arange(config.num_rows, dtype=jnp.int32)

  def step(carry, _):
    cache, tokens = carry
    cache, info = paged_jax.extend(cache, jnp.ones_like(rows))
    active = jnp.where(info.ok, rows, config.num_rows)  # num_rows = no row
    cache, drawn = forward(cache, tokens, active, cache.lengths - 1)
    tokens = jnp.where(info.ok, drawn, tokens)
    return (cache, tokens), (tokens, info.ok)

  (cache, _), (drawn, ok) = jax.lax.scan(step, (cache, tokens), length=num_steps)
  return cache, drawn, ok


# %% [markdown]
# Rows 0, 2 and 3 read the same prompt, each for itself, in one ragged batch. Row 1 forks row 0.
# Then rows 0 and 1 are given different next tokens, and so are rows 2 and 3.

# %%
prompt = jax.random.randint(jax.random.key(1), (10,), 0, vocab_size, jnp.int32)
cache, _ = extend(paged_jax.init(config), ids(10, 0, 10, 10))
cache, _ = jax.jit(forward)(
  cache, jnp.tile(prompt, 3), jnp.repeat(ids(0, 2, 3), 10), jnp.tile(jnp.arange(10), 3)
)
cache, _ = fork(cache, ids(0), ids(1))
done, drawn, ok = jax.jit(decode, static_argnames="num_steps")(cache, ids(5, 9, 5, 9), num_steps=8)
film({"prompts read, row 0 forked into row 1": cache, "8 decode steps later": done})
print(drawn.T)

# %% [markdown]
# Rows 0 and 1 shared the prompt's pages and parted; they say the same as rows 2 and 3, which shared
# nothing. And the books balance: an audit counts how often each law is broken.

# %%
assert ok.all()
assert (drawn[:, :2] == drawn[:, 2:]).all()  # shared pages, same tokens
assert (drawn[:, 0] != drawn[:, 1]).any()  # and two different texts
keys, values = paged_jax.gather(done, 1, ids(0, 1, 2, 3))  # layer 1, [S,C,H,D]
np.testing.assert_allclose(keys[:2], keys[2:], rtol=1e-3, atol=1e-3)
np.testing.assert_allclose(values[:2], values[2:], rtol=1e-3, atol=1e-3)

audit = paged_jax.audit(done)
assert not any(audit)
{law: int(count) for law, count in audit._asdict().items()}
