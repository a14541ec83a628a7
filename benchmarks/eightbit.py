"""What do 8-bit pages cost in quality, and what do they save?

`int8` and `fp8` are pages of int8 and float8_e4m3fn, with a scale per token and head for keys and
for values. Their contender is the same model on bfloat16 pages. `--model` names the folder of a
checkpoint (the embedded model without), `--text` a text file whose last `--tokens` tokens are read
(the LICENSE without). The model computes in `--dtype`: float32 shows the pages' error alone.

`text`: perplexity in windows of 2,048 tokens, or the model's length if that is less. A window goes
through the paged cache in 4 pieces, and a token's attention reads its own piece from the pages, too.
`ppl_ratio_*` is the perplexity over that on bfloat16 pages. `logp_mean_*` and `logp_p99_*` are of
|log-probability - that on bfloat16 pages| of the text's tokens, in nats. `argmax_equal_*` is the
share of tokens whose most probable successor is the same.

`greedy`: texts of 500 greedy tokens behind `--prompts` pieces of the text. `greedy_prefix_*` is the
share of a text before its first difference, `greedy_forced_*` the share of equal choices behind equal
tokens (those of bfloat16).

`needle`: "The secret number of X is 123456." at five depths of a text of `--haystack` tokens (at
most the model's length), then a question for each. `needle_*` is the share of the five numbers that
a greedy decoder would give back whole, `needle_digits_*` the share of their tokens, `needle_logp_*`
the mean log-probability of these tokens; the table has each depth.

`scales`: perplexity of the first window with scales per token and head, against one static scale per
layer for all keys and one for all values (`per tensor`: the largest of the first piece; `scale 1`:
none at all). The keys have outliers: one channel, and the one that it turns with, are `x`
(`--outliers`) times as large, and the queries' as much smaller, so the model computes the same. A
model with QK norm stays as it is. `outlier_ppl_*` are ratios with x = 64.

`attention`: error of one call's outputs, over the outputs without the outlier, in the shape of a
Qwen2-7B's layer (28 queries, 4 heads of 128, no QK norm), on random keys and values with one channel
of the keys, the values of one token, or one head 64 times as large: `attention_token_*` and so on.

The others are costs: see `eightbit_cost.py`. `--parts` names what to run.
"""

import measure  # first: it sets XLA's flags

import jax  # isort: skip
import dataclasses
import functools
import pathlib
from typing import Any

import eightbit_cost
import eightbit_scales
import jax.numpy as jnp
import numpy as np
from eightbit_cost import EIGHT, FORMATS
from eightbit_scales import LARGE, per_tensor
from flax import nnx

import paged_jax
from paged_jax import groups, models, quantization

PARTS = ("text", "greedy", "needle", "scales", "attention", *eightbit_cost.PARTS)
WINDOW, PIECES, NEW = 2048, 4, 500
LOGITS_AT_ONCE = 64  # tokens: a Gemma has 262,144 logits for each
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
NAMES = ("Paris", "London", "Berlin", "Madrid", "Rome")


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model and a text."""

  decoder: models.Decoder
  tokenizer: Any
  tokens: np.ndarray  # i32[X]

  @property
  def begin(self) -> list[int]:
    """What the tokenizer puts in front of a text."""
    return self.tokenizer.encode("").ids

  def ids(self, text: str) -> list[int]:
    return self.tokenizer.encode(text, add_special_tokens=False).ids

  def cache(self, dtype: str, num_rows: int, max_length: int, shared: int = 0) -> Any:
    """An empty cache with room for full rows whose first tokens are `shared`."""
    num_pages = -(-shared // 16) + num_rows * (2 + -(-(max_length - shared) // 16))
    caches = models.cache_config(
      self.decoder.config, num_pages=num_pages, num_rows=num_rows,
      max_length=max_length, dtype=dtype, step_tokens=num_rows * WINDOW,
    )  # fmt: skip
    return paged_jax.init(eightbit_cost.stored(caches))


def subject(model, text, dtype: str, num_tokens: int) -> Subject:
  model = model or models.embedded()
  text = text or pathlib.Path(__file__).parents[1] / "LICENSE"
  tokenizer = models.tokenizer(model)
  content = text.read_text(encoding="utf-8")[-12 * num_tokens :]
  tokens = np.array(tokenizer.encode(content, add_special_tokens=False).ids, np.int32)
  return Subject(models.load(model, dtype), tokenizer, tokens[-num_tokens:])


# A piece of rows


@functools.partial(jax.jit, donate_argnames="cache", static_argnames=("rounded", "scored"))
def add(decoder, cache, rows, tokens, targets, scales=None, *, rounded=None, scored=True):
  """The cache with `tokens` i32[R,C] behind the `rows` i32[R], and what they predict.

  Returns:
    The cache, the log-probability f32[R,C] of `targets` i32[R,C] and the best tokens i32[R,C]. If
    not `scored`: the cache, which rows are ok, and None. `scales`, `rounded`: see `per_tensor`.
  """
  r, c = tokens.shape
  num_rows = groups.each(cache)[0].ledger.num_rows
  cache, info = paged_jax.extend(cache, jnp.zeros(num_rows, jnp.int32).at[rows].set(c))
  lengths = groups.each(cache)[0].lengths[rows]
  positions = lengths[:, None] - c + jnp.arange(c)
  plan = paged_jax.plan(cache, jnp.repeat(rows, c), positions.reshape(-1))
  with per_tensor(scales, rounded):
    hidden, cache = decoder(tokens.reshape(-1), cache, plan)
  if not scored:
    return cache, info.ok[rows], None

  def score(each):
    x, target = each
    logp = jax.nn.log_softmax(decoder.logits(x[None])[0])
    return logp[target], jnp.argmax(logp)

  logp, best = jax.lax.map(score, (hidden, targets.reshape(-1)), batch_size=LOGITS_AT_ONCE)
  logp = jnp.where(info.ok[rows][:, None], logp.reshape(r, c), jnp.nan)
  return cache, logp, best.reshape(r, c)


def add_all(decoder, cache, rows, tokens, piece: int, scales=None, **options):
  """The same piece by piece: the cache, and of all tokens but the first logp and best [R,C-1]."""
  rows, found = jnp.asarray(rows, jnp.int32), []
  targets = np.roll(tokens, -1, axis=1)
  for at in range(0, tokens.shape[1], piece):
    each = (jnp.asarray(x[:, at : at + piece], jnp.int32) for x in (tokens, targets))
    cache, *results = add(decoder, cache, rows, *each, scales, **options)
    found.append([np.asarray(x) for x in results])
  logp, best = (np.concatenate(x, axis=1)[:, :-1] for x in zip(*found))
  assert np.isfinite(logp).all()
  return cache, logp, best


# Perplexity


def windows(subject: Subject) -> tuple[np.ndarray, int]:
  """The text in rows [W,C], each behind what the tokenizer puts in front; and tokens of a piece."""
  size = min(WINDOW, subject.decoder.config.max_length)
  own = size - len(subject.begin)
  count = max(1, len(subject.tokens) // own)
  text = subject.tokens[: count * own].reshape(count, -1)
  begin = np.tile(np.array(subject.begin, np.int32), (count, 1))
  return np.concatenate([begin, text], axis=1), -(-size // PIECES)


def read(subject: Subject, dtype: str, scales=None, rounded=None, most=None) -> tuple:
  """Log-probability of the text's tokens, and the best ones [W,C-1]; of the first `most` windows."""
  text, piece = windows(subject)
  found = []
  for row in text[:most]:
    cache = subject.cache(dtype, 1, text.shape[1])
    _, logp, best = add_all(subject.decoder, cache, [0], row[None], piece, scales, rounded=rounded)
    found.append((logp[0], best[0]))
  return tuple(np.stack(x) for x in zip(*found))


def text(subject: Subject) -> tuple[list[dict], dict]:
  found = {name: read(subject, dtype) for name, dtype in FORMATS.items()}
  base, base_best = found["bf16"]
  rows, summary = [], {}
  for name, (logp, best) in found.items():
    error = np.abs(logp - base)
    results = {
      "ppl_ratio": float(np.exp(base.mean() - logp.mean())), "logp_mean": float(error.mean()),
      "logp_p99": float(np.quantile(error, 0.99)), "argmax_equal": float((best == base_best).mean()),
    }  # fmt: skip
    ppl = float(np.exp(-logp.mean()))
    rows.append({"what": "text", "pages": name, "tokens": logp.size, "ppl": ppl} | results)
    if name != "bf16":
      summary |= {f"{key}_{name}": value for key, value in results.items()}
  return rows, summary


# Greedy texts


@functools.partial(jax.jit, static_argnames="count")
def generate(decoder, cache, tokens, *, count: int):
  """The next `count` greedy tokens [R,count] behind those of all rows, i32[R]."""
  rows = jnp.arange(len(tokens))

  def step(carry, _):
    cache, tokens = carry
    cache, info = paged_jax.extend(cache, jnp.ones_like(rows))
    plan = paged_jax.plan(cache, rows, groups.each(cache)[0].lengths - 1)
    hidden, cache = decoder(tokens, cache, plan)
    tokens = jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)
    return (cache, tokens), jnp.where(info.ok, tokens, -1)

  _, found = jax.lax.scan(step, (cache, tokens), length=count)
  return found.T


def greedy(subject: Subject, count: int) -> tuple[list[dict], dict]:
  most = min(WINDOW, subject.decoder.config.max_length)
  size = min(64, most - NEW)
  starts = np.linspace(0, len(subject.tokens) - size, count).astype(int)
  begin = np.tile(np.array(subject.begin, np.int32), (count, 1))
  prompts = np.stack([subject.tokens[at : at + size] for at in starts])
  prompts = np.concatenate([begin, prompts], axis=1)[:, :size]
  base, rows, summary = None, [], {}
  for name, dtype in FORMATS.items():
    cache = subject.cache(dtype, count, size + NEW)
    cache, _, best = add(subject.decoder, cache, jnp.arange(count), *[jnp.asarray(prompts)] * 2)
    first = best[:, -1:].astype(jnp.int32)
    others = generate(subject.decoder, cache, first[:, 0], count=NEW - 1)
    own = np.concatenate([first, others], axis=1)
    assert (own >= 0).all()
    base = own if base is None else base
    cache = subject.cache(dtype, count, size + NEW)
    both = np.concatenate([prompts, base], axis=1)
    _, _, best = add_all(subject.decoder, cache, np.arange(count), both, WINDOW // count)
    results = {
      "greedy_prefix": float(np.cumprod(own == base, axis=1).mean()),
      "greedy_forced": float((best[:, size - 1 :] == base).mean()),
    }
    rows.append({"what": "greedy", "pages": name, "tokens": own.size} | results)
    if name != "bf16":
      summary |= {f"{key}_{name}": value for key, value in results.items()}
  return rows, summary


# Needles


def needle(subject: Subject, most: int) -> tuple[list[dict], dict]:
  rng = np.random.default_rng(0)
  numbers = [str(x) for x in rng.integers(10**5, 10**6, len(NAMES))]
  sentences = [f"\nThe secret number of {x} is {y}" for x, y in zip(NAMES, numbers)]
  asked = [subject.ids(sentence) for sentence in sentences]
  heads = [len(subject.ids(sentence[:-7])) for sentence in sentences]  # without the number
  width = max(map(len, asked))
  size = min(most, subject.decoder.config.max_length) - width
  hidden = [subject.ids(f"{sentence}.\n") for sentence in sentences]
  own = size - sum(map(len, hidden)) - len(subject.begin)
  filler = np.resize(subject.tokens, own)
  ends = [*(int(depth * own) for depth in DEPTHS), own]
  pieces = [*subject.begin, *filler[: ends[0]]]
  for each, begin, end in zip(hidden, ends, ends[1:]):
    pieces += [*each, *filler[begin:end]]
  haystack = np.array(pieces, np.int32)[None]
  questions = np.zeros((len(NAMES), width + 1), np.int32)
  for row, ids in zip(questions, asked):
    row[: len(ids)] = ids
  rows, summary = [], {}
  for name, dtype in FORMATS.items():
    cache = subject.cache(dtype, 1 + len(NAMES), size + width, shared=size)
    piece = min(512, -(-size // PIECES))
    for at in range(0, size, piece):
      part = jnp.asarray(haystack[:, at : at + piece])
      cache, ok, _ = add(subject.decoder, cache, jnp.arange(1), part, part, scored=False)
      assert ok.all()
    others = jnp.arange(1, 1 + len(NAMES))
    cache, info = paged_jax.jitted.fork(cache, jnp.zeros_like(others), others)
    assert info.ok.all()
    asking, wanted = (jnp.asarray(x) for x in (questions[:, :-1], questions[:, 1:]))
    _, logp, best = add(subject.decoder, cache, others, asking, wanted)
    logp, right = np.asarray(logp), np.asarray(best == wanted)
    assert np.isfinite(logp).all()
    each = [slice(head - 1, len(ids) - 1) for head, ids in zip(heads, asked)]
    found = [
      {
        "needle": float(right[i, own].all()), "needle_digits": float(right[i, own].mean()),
        "needle_logp": float(logp[i, own].mean()),
      }
      for i, own in enumerate(each)
    ]  # fmt: skip
    rows += [
      {"what": f"needle at {depth:.0%}", "pages": name, "tokens": size} | results
      for depth, results in zip(DEPTHS, found)
    ]
    summary |= {f"{key}_{name}": float(np.mean([x[key] for x in found])) for key in found[0]}
  return rows, summary | {"needle_tokens": size}


# Scales


def with_outliers(decoder: models.Decoder, factor: float) -> models.Decoder:
  """The same function, where two channels of each key are `factor` times as large."""
  config = decoder.config
  graph, state = nnx.split(decoder)
  leaves = dict(nnx.to_flat_state(state))
  for name, leaf in leaves.items():
    times = {"k_proj": factor, "q_proj": 1 / factor}.get(name[-2], 1.0)
    if times != 1:
      dim = config.head_dim
      shape = leaf[...].shape
      rows = np.ones(dim, np.float32)
      rows[[dim // 4, dim // 4 + dim // 2]] = times
      rows = np.tile(rows, shape[1] // dim).reshape(1, -1, *[1] * (len(shape) - 2))
      leaves[name] = leaf.replace((leaf[...] * rows).astype(leaf[...].dtype))
  return nnx.merge(graph, nnx.from_flat_state(list(leaves.items())))


def static_scales(subject: Subject, dtype: str | None) -> dict:
  """The scales of `per_tensor`: the largest of the first piece, or 1 without a dtype."""
  text, piece = windows(subject)
  cache = subject.cache("float32", 1, piece)
  cache, *_ = add_all(subject.decoder, cache, [0], text[:1, :piece], piece)
  scales = {}
  for each in groups.each(cache):
    k, v = jnp.split(jnp.abs(each.pages.kv), 2, axis=-1)
    tops = (jnp.max(x, axis=(0, 2, 3, 4)) for x in (k, v))
    limit = quantization.LIMITS[dtype] if dtype else None
    scales[each.pages.kv.shape[1]] = tuple(x / limit if limit else jnp.ones_like(x) for x in tops)
  return scales


def scales(subject: Subject, factors: list[int], most: int = 1) -> tuple[list[dict], dict]:
  rows, summary = [], {}
  for factor in [1] if subject.decoder.config.qk_norm else factors:
    it = dataclasses.replace(subject, decoder=with_outliers(subject.decoder, factor))
    found = {name: read(it, dtype, most=most)[0] for name, dtype in FORMATS.items()}
    for name, dtype in EIGHT.items():
      static = {"per tensor": static_scales(it, dtype)}
      if name == "fp8":
        static["scale 1"] = static_scales(it, None)
      for what, each in static.items():
        found[f"{name}, {what}"] = read(it, "float32", each, dtype, most)[0]
    base = found["bf16"]
    for name, logp in found.items():
      ratio = float(np.exp(base.mean() - logp.mean()))
      rows.append({
        "what": f"keys with x = {factor}", "pages": name, "tokens": logp.size,
        "ppl": float(np.exp(-logp.mean())), "ppl_ratio": ratio,
        "logp_mean": float(np.abs(logp - base).mean()),
      })  # fmt: skip
      if factor == LARGE and name != "bf16":
        summary[f"outlier_ppl_{name.replace(', ', '_').replace(' ', '_')}"] = ratio
  return rows, summary


def main():
  args = measure.arguments(
    __doc__.splitlines()[0],
    model=(pathlib.Path, None, "folder of a checkpoint"),
    text=(pathlib.Path, None, "a text file"),
    tokens=(int, 20480, "of the text, from its end"),
    dtype=(str, "float32", "of the weights"),
    prompts=(int, 4, "that greedy texts have"),
    haystack=(int, 4096, "most tokens around the needles"),
    outliers=(str, f"1,16,{LARGE}", "how many times as large a channel of the keys is"),
    requests=(int, 200, "how many for the engine"),
    parts=(str, ",".join(PARTS), "what to run"),
  )
  it = subject(args.model, args.text, args.dtype, args.tokens)
  run = {
    "text": lambda: text(it),
    "greedy": lambda: greedy(it, args.prompts),
    "needle": lambda: needle(it, args.haystack),
    "scales": lambda: scales(it, [int(x) for x in args.outliers.split(",")]),
    "attention": eightbit_scales.attention_errors,
    "bytes": eightbit_cost.bytes_of_tokens,
    "engine": lambda: eightbit_cost.requests_at_once(args.requests),
    "decode": lambda: eightbit_cost.decode(args.rounds),
    "write": lambda: eightbit_cost.write(args.rounds),
  }
  rows, summary = [], {}
  for part in args.parts.split(","):
    more, found = run[part]()
    rows += more
    summary |= found
  measure.report(rows, summary, as_json=args.json)


if __name__ == "__main__":
  main()
