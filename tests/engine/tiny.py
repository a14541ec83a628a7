"""A model in sixty lines that keeps to the engine's contract, and its greedy text without a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import paged_jax
from paged_jax.host import ManagerConfig

VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, LAYERS, HIDDEN = 31, 4, 2, 8, 2, 16
LONGEST = 48  # tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiny:
  """Two layers of attention with learned positions; no MLP."""

  embedding: jax.Array  # [V,E]
  positions: jax.Array  # [X,E]
  q: jax.Array  # [L,E,Q*D]
  kv: jax.Array  # [L,E,2*H*D]
  out: jax.Array  # [L,Q*D,E]

  def __call__(self, tokens, cache, plan):
    """What the engine calls: one write and one attend per layer."""
    x = self.embedding[tokens] + self.positions.at[plan.positions].get(mode="clip")

    def layer(carry, index):
      x, cache = carry
      q, k, v = self.qkv(index, x)
      cache = paged_jax.write(cache, index, k, v, plan)
      heads = paged_jax.attend(cache, index, q, plan)
      return (x + heads.reshape(len(x), -1) @ self.out[index], cache), None

    return jax.lax.scan(layer, (x, cache), jnp.arange(LAYERS, dtype=jnp.int32))[0]

  def logits(self, hidden):
    """f32[B,V]"""
    return 3 * hidden @ self.embedding.T

  def qkv(self, layer, x):
    """Heads of hidden states [B,E]."""
    x = jnp.tanh(x)
    kv = (x @ self.kv[layer]).reshape(len(x), 2, KV_HEADS, HEAD_DIM)
    return (x @ self.q[layer]).reshape(len(x), HEADS, HEAD_DIM), kv[:, 0], kv[:, 1]

  def dense(self, tokens):
    """Logits of a whole text [X], without a cache."""
    x = self.embedding[tokens] + self.positions[: len(tokens)]
    for layer in range(LAYERS):
      q, k, v = self.qkv(layer, x)
      heads = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
      x = x + heads.reshape(len(x), -1) @ self.out[layer]
    return self.logits(x)


def model(seed: int = 0) -> Tiny:
  """Random weights."""
  keys = jax.random.split(jax.random.key(seed), 5)
  shapes = ((VOCABULARY, HIDDEN), (LONGEST, HIDDEN), (LAYERS, HIDDEN, HEADS * HEAD_DIM),
            (LAYERS, HIDDEN, 2 * KV_HEADS * HEAD_DIM), (LAYERS, HEADS * HEAD_DIM, HIDDEN))  # fmt: skip
  return Tiny(
    *(jax.random.normal(key, shape) / shape[-2] ** 0.25 for key, shape in zip(keys, shapes))
  )


_plain = model(1)
# Attention and positions count, so that a text does not end in one token for ever.
MODEL = dataclasses.replace(_plain, out=3 * _plain.out, positions=3 * _plain.positions)
_dense = jax.jit(Tiny.dense)


@functools.cache
def following(text: tuple[int, ...]) -> int:
  """The most likely token after a text."""
  tokens = np.zeros(LONGEST, np.int32)
  tokens[: len(text)] = text
  return int(np.argmax(_dense(MODEL, tokens)[len(text) - 1]))


def greedy(prompt, max_new_tokens: int, stops=()) -> list[int]:
  """New tokens, one at a time, each from the whole text."""
  text = tuple(prompt)
  for _ in range(max_new_tokens):
    text = (*text, following(text))
    if text[-1] in stops:
      break
  return list(text[len(prompt) :])


@functools.cache
def logprobs(text: tuple[int, ...]) -> np.ndarray:
  """Of the next token, from the whole text."""
  tokens = np.zeros(LONGEST, np.int32)
  tokens[: len(text)] = text
  return np.asarray(jax.nn.log_softmax(_dense(MODEL, tokens)[len(text) - 1]))


def search(prompt, num_beams, max_new_tokens, stops=(), length_penalty=1.0, logprobs=logprobs):
  """Beam search by hand: texts and their log-probabilities, best first."""
  found = [((), 0.0, False)]
  for _ in range(max_new_tokens):
    candidates = [each for each in found if each[2]]
    for text, score, ended in found:
      if not ended:
        gains = logprobs((*prompt, *text))
        for token in np.argsort(-gains)[:num_beams].tolist():
          candidates.append(((*text, token), score + float(gains[token]), token in stops))
    found = sorted(candidates, key=lambda each: -each[1])[:num_beams]
  ranked = sorted(found, key=lambda each: -each[1] / len(each[0]) ** length_penalty)
  return [(list(text), score) for text, score, _ in ranked]


def cache(**fields) -> paged_jax.CacheConfig:
  """A small cache for it."""
  small = dict(page_size=4, num_pages=24, num_rows=4, max_length=LONGEST, dtype="float32")
  return paged_jax.CacheConfig(
    num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, **(small | fields)
  )


def options(**fields) -> ManagerConfig:
  """A manager's options with prefixes of any length."""
  return ManagerConfig(**(dict(min_prefix_length=1, num_host_pages=64) | fields))
