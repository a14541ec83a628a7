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
# # Training the embedded model
#
# How the small Llama that comes with the package was made, with Flax and Optax, in a version that
# takes a minute. The functions that train are in `examples/train_embedded.py`, which is no part of
# the package: this notebook needs a checkout of the repository.

# %%
import os
import pathlib
import sys
from importlib import metadata

try:
  import paged_jax
except ImportError:
  # For Colab: put a checkout of the repository at /content/paged_jax first.
  # %pip install -q "/content/paged_jax[demo,train]"
  import paged_jax

# The checkout's examples: beside this notebook, on Colab, or beside the package.
sys.path += ["../examples", "/content/paged_jax/examples"]
sys.path.append(str(pathlib.Path(paged_jax.__file__).parents[1] / "examples"))

if metadata.version("jaxlib").startswith("0.10."):
  # This version computes some reductions wrongly on CPU, silently.
  flag = " --xla_cpu_experimental_ynn_fusion_type=-reduce"
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import train_embedded as train

from paged_jax import models
from paged_jax.cli import progress
from paged_jax.engine import Engine, EngineConfig, Sampling

# %% [markdown]
# ## What to train
#
# The packaged model learned *tiny shakespeare*: 1.1 MB of Shakespeare's plays, in the public
# domain, which Andrej Karpathy collected for char-rnn (`data/tinyshakespeare/input.txt` in that
# repository on GitHub). Put its path in `text_path`, and the values on the right, to train the
# packaged model itself: most of an hour on two CPU cores.
# `python examples/train_embedded.py --text FILE --out DIR` does the same, and goes on from its
# checkpoint after an interruption.

# %% tags=["parameters"]
text_path = None  # None: text that the packaged model writes
steps = int(os.environ.get("PAGED_JAX_NOTEBOOK_STEPS", 40))  # 1500
hidden_size, num_layers = 96, 2  # 192, 4
batch_tokens, learning_rate = 1024, 1e-2  # 2048, 2e-3

# %% [markdown]
# ## A text
#
# So that this runs offline and in a minute, the packaged model writes the text. All samples decode
# at once, as forks of one prompt, on the paged cache.


# %%
def write(decoder, tokenizer, prompt, *, max_new_tokens, num_samples=16):
  """Continues `prompt` in several ways."""
  dtype = decoder.embed_tokens.weight.dtype
  config = models.cache_config(
    decoder.config, num_pages=num_samples * 32, num_rows=num_samples, dtype=dtype
  )
  engine = Engine(decoder, EngineConfig(config, num_steps=64, prompt_sizes=(32,)))
  wanted = Sampling(
    max_new_tokens=max_new_tokens, num_samples=num_samples, temperature=0.8, top_p=0.95
  )
  *_, update = progress.follow(engine, [(tokenizer.encode(prompt).ids, wanted)])
  print(update.summary)
  return [prompt + tokenizer.decode(tokens) for tokens in update.tokens]


packaged = models.load(models.embedded(), jnp.float32)
packaged_tokenizer = models.tokenizer(models.embedded())
if text_path is None:
  text = "\n".join(write(packaged, packaged_tokenizer, "ROMEO:\n", max_new_tokens=384))
else:
  with open(text_path, encoding="utf-8") as file:
    text = file.read()
print(f"{len(text):,} characters, which begin:\n\n{text[:300]}")

# %% [markdown]
# ## Tokens
#
# The first 90% is learned, the rest held out. The tokenizer is a byte-level BPE of 512 tokens,
# learned from the first part only.

# %%
learned, held_out = train.split(text)
tokenizer = train.learn_tokenizer(learned)
tokens, validation = train.encode(tokenizer, learned), train.encode(tokenizer, held_out)
chars_per_token = len(learned) / len(tokens)
print(f"{len(tokens):,} tokens of {chars_per_token:.2f} characters")

# %% [markdown]
# ## Training
#
# AdamW with warmup and cosine decay; each step takes random windows of the text. For training the
# decoder runs dense, without a cache. Losses are in nats per character, which does not depend on
# the tokenizer.

# %%
config = train.small_llama(tokenizer.get_vocab_size(), hidden_size, num_layers)
recipe = train.Recipe(steps=steps, batch_tokens=batch_tokens, learning_rate=learning_rate)
state = train.init(config, recipe)
curve = train.Curve([], [])
print(f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,} parameters")

for stop in np.linspace(0, steps, 5, dtype=int).tolist():
  state = train.train(state, tokens, stop, config=config, recipe=recipe, on_step=curve.train.append)
  loss = train.evaluate(state.params, validation, len(held_out), config=config)
  curve.validation.append((stop, loss))
  print(f"step {stop}: validation {loss:.3f} nats per character")

# %%
_, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(np.array(curve.train) / chars_per_token, color="0.7", label="training")
ax.plot(*zip(*curve.validation), "o-", ms=4, label="validation")
ax.set(xlabel="step", ylabel="nats per character")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Before and after
#
# The weights just trained go into the decoder as they are, and the same function writes with them.
# A short training finds common letters and the shape of a line; the packaged model, trained for
# longer on more, finds words and speakers.

# %%
prompt = "JULIET:\nO Romeo, Romeo! wherefore art thou Romeo?\n"
trained = train.decoder(state.params, config)
short = write(trained, tokenizer, prompt, max_new_tokens=100)
long = write(packaged, packaged_tokenizer, prompt, max_new_tokens=100)
print(f"\n--- trained here, {steps} steps ---\n{short[0]}")
print(f"\n--- the packaged model ---\n{long[0]}")
