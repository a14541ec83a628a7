"""Trains the embedded model: a small Llama on one text file. Needs the `train` extra.

python examples/train_embedded.py --text FILE --out DIR
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
import typer
from flax import nnx
from matplotlib.figure import Figure
from rich import progress
from tokenizers import decoders, models, pre_tokenizers, trainers

from paged_jax.models import Decoder, DecoderConfig, Rope, loading
from paged_jax.models import decoder as decoder_lib

CARD = """# A small language model

A Llama of {parameters:,} parameters in bfloat16, trained by paged_jax: {layers} layers, context \
{length}, byte-level BPE of {vocab} tokens.

- **Data**: `{name}`, {about}: {chars:,} characters, of which the first 90% were learned \
({tokens:,} tokens).
- **Training**: {steps} steps of {batch:,} tokens, AdamW, seed {seed}, by \
`python examples/train_embedded.py`.
- **Loss**: {loss:.4f} nats per character on the last 10%, all of it, measured on these weights \
(computed in float32, windows of {length} tokens that overlap by half).
- **Use**: it shows a cache at work; it writes like its text, and knows nothing.
- **Licence**: the weights are under the licence of paged_jax; the text is {about}.

![Loss over the run](loss.png)
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Everything that a step changes."""

  params: nnx.State  # f32 weights of the decoder
  optimizer: optax.OptState
  step: jax.Array  # i32[] steps taken


class Recipe(NamedTuple):
  """How to train."""

  steps: int = 1500
  batch_tokens: int = 2048  # per step
  learning_rate: float = 2e-3  # at its peak
  weight_decay: float = 0.3
  seed: int = 0


class Curve(NamedTuple):
  """Losses over a run."""

  train: list[float]  # nats per token, of every step
  validation: list[tuple[int, float]]  # (steps taken, nats per character), now and then


def split(text: str) -> tuple[str, str]:
  """The first 90%, to learn from, and the last 10%, to validate on."""
  cut = len(text) * 9 // 10
  return text[:cut], text[cut:]


def learn_tokenizer(text: str, vocab_size: int = 512) -> tokenizers.Tokenizer:
  """A byte-level BPE, which encodes any text."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator([text], trainer)
  return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
  """i32[C] tokens of a newline and `text`: the newline is the context of the first token."""
  return np.array(tokenizer.encode("\n").ids + tokenizer.encode(text).ids, np.int32)


def small_llama(vocab_size: int, hidden_size: int = 192, num_layers: int = 4) -> DecoderConfig:
  """A Llama with heads of 32 and three queries per KV head; 1.7M parameters by default."""
  return DecoderConfig(
    vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=8 * hidden_size // 3,
    num_layers=num_layers, num_heads=hidden_size // 32, num_kv_heads=hidden_size // 96,
    head_dim=32, max_length=512, windows=(None,) * num_layers, ropes=(Rope(),) * num_layers,
    norm_eps=1e-5, tied=True,
  )  # fmt: skip


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
  """AdamW with warmup and cosine decay."""
  peak = recipe.learning_rate
  rate = optax.warmup_cosine_decay_schedule(0.0, peak, recipe.steps // 20, recipe.steps, peak / 100)
  adamw = optax.adamw(rate, b2=0.98, weight_decay=recipe.weight_decay)
  return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def init(config: DecoderConfig, recipe: Recipe) -> State:
  """A random model that has taken no step."""
  params = nnx.state(Decoder(config, rngs=nnx.Rngs(recipe.seed)), nnx.Param)
  return State(params, optimizer(recipe).init(params), jnp.zeros((), jnp.int32))


def decoder(params: nnx.State, config: DecoderConfig) -> Decoder:
  """The decoder with these weights."""
  return nnx.merge(nnx.graphdef(decoder_lib.abstract(config)), params)


def losses(params: nnx.State, windows: jax.Array, config: DecoderConfig) -> jax.Array:
  """f32[M,C] nats of each next token in i32[M,C+1] windows."""
  logits = decoder(params, config).dense(windows[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


def sample(tokens: np.ndarray, step: int, config: DecoderConfig, recipe: Recipe) -> np.ndarray:
  """i32[M,C+1] random windows for a step: full length in every fourth step, half in the others."""
  length = config.max_length if step % 4 == 3 else config.max_length // 2
  length = min(length, len(tokens) - 1)
  rng = np.random.default_rng((recipe.seed, step))
  starts = rng.integers(len(tokens) - length, size=max(1, recipe.batch_tokens // length))
  return tokens[starts[:, None] + np.arange(length + 1)]


@partial(jax.jit, static_argnames=("config", "recipe"), donate_argnames="state")
def step(
  state: State, windows: jax.Array, *, config: DecoderConfig, recipe: Recipe
) -> tuple[State, jax.Array]:
  """One step of the optimizer, and the loss before it in nats per token."""

  def mean_loss(params):
    return losses(params, windows, config).mean()

  loss, grads = jax.value_and_grad(mean_loss)(state.params)
  updates, moments = optimizer(recipe).update(grads, state.optimizer, state.params)
  params = jax.tree.map(jnp.add, state.params, updates)
  return State(params, moments, state.step + 1), loss


def train(
  state: State, tokens: np.ndarray, stop: int, *, config: DecoderConfig, recipe: Recipe,
  on_step: Callable[[float], None] = lambda loss: None,
) -> State:  # fmt: skip
  """Takes steps until `stop` are taken in all; `on_step` gets the loss of each."""
  for count in range(int(state.step), stop):
    state, loss = step(state, sample(tokens, count, config, recipe), config=config, recipe=recipe)
    on_step(float(loss))
  return state


@partial(jax.jit, static_argnames="config")
def _window_losses(params: nnx.State, windows: jax.Array, config: DecoderConfig) -> jax.Array:
  """f32[M,C] losses, four windows at a time."""
  return jax.lax.map(lambda window: losses(params, window[None], config)[0], windows, batch_size=4)


def evaluate(
  params: nnx.State, tokens: np.ndarray, num_chars: int, *, config: DecoderConfig
) -> float:
  """Nats per character of all `tokens` except the first, which is only context.

  Windows overlap by half, and a token is scored by the window that shows most before it:

      # tokens    0 1 2 3 4 5 6 7 8 9 10
      # window 0  [. s s s s s s]             s scored, . context
      # window 1        [. . . . s s s]
  """
  last = len(tokens) - 1
  length = min(config.max_length, last)
  starts = np.minimum(np.arange(0, last, max(1, length // 2)), last - length)
  scores = _window_losses(params, tokens[starts[:, None] + np.arange(length + 1)], config)
  nats = np.zeros(last)
  for start, score in zip(starts[::-1], np.asarray(scores)[::-1], strict=True):
    nats[start : start + length] = score
  return float(nats.sum() / num_chars)


def checkpoints_at(folder: Path) -> ocp.CheckpointManager:
  """Keeps the newest checkpoint of a run in a folder. `save` returns when it is on disk."""
  options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
  return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: State, curve: Curve) -> None:
  """Saves a run as it is; an interrupted save leaves the checkpoint before it."""
  notes = curve._asdict() | {"shapes": _shapes(state)}
  items = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
  checkpoints.save(int(state.step), args=items)


def restore(checkpoints: ocp.CheckpointManager, like: State) -> tuple[State, Curve]:
  """The run in the newest checkpoint, its state shaped as `like`.

  Raises:
    ValueError: The checkpoint is of another model.
  """
  newest = checkpoints.latest_step()
  notes = checkpoints.restore(newest, args=ocp.args.Composite(notes=ocp.args.JsonRestore())).notes
  if notes["shapes"] != _shapes(like):
    raise ValueError(f"{checkpoints.directory} holds another model")
  items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
  state = checkpoints.restore(newest, args=items).state
  return state, Curve(notes["train"], [(steps, loss) for steps, loss in notes["validation"]])


def _shapes(state: State) -> list[list[int]]:
  return [list(leaf.shape) for leaf in jax.tree.leaves(state)]


def draw(curve: Curve, chars_per_token: float, path: Path) -> None:
  """Draws the losses of a run in nats per character."""
  figure = Figure(figsize=(6, 3.5), layout="constrained")
  axes = figure.subplots()
  steps = np.array(curve.train) / chars_per_token
  axes.plot(np.arange(len(steps)), steps, lw=0.5, color="0.7", label="training")
  axes.plot(*np.array(curve.validation).T, "o-", ms=3, color="C0", label="validation")
  axes.set(xlabel="step", ylabel="nats per character", ylim=(0.9, 2.6))
  axes.legend(frameon=False)
  figure.savefig(path, dpi=100)


def main(
  text: Annotated[Path, typer.Option(help="File to learn.")],
  out: Annotated[Path, typer.Option(help="Folder for the model.")],
  about: Annotated[str, typer.Option(help="What it is, for the model card.")] = "a text",
  steps: Annotated[int, typer.Option(help="Optimizer steps.")] = Recipe().steps,
  seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
  hidden_size: Annotated[int, typer.Option(help="A multiple of 96.")] = 192,
  every: Annotated[int, typer.Option(help="Steps from one checkpoint to the next.")] = 250,
) -> None:
  """Trains a small Llama. After an interruption, run it again: it goes on from OUT.checkpoints."""
  recipe = Recipe(steps=steps, seed=seed)
  learned, held_out = split(text.read_text(encoding="utf-8"))
  tokenizer = learn_tokenizer(learned)
  tokens, validation = encode(tokenizer, learned), encode(tokenizer, held_out)
  config = small_llama(tokenizer.get_vocab_size(), hidden_size)
  out.mkdir(parents=True, exist_ok=True)
  state, curve = init(config, recipe), Curve([], [])

  with (
    checkpoints_at(out.with_name(f"{out.name}.checkpoints")) as checkpoints,
    progress.Progress(*progress.Progress.get_default_columns(), "{task.fields[loss]}") as bar,
  ):
    if checkpoints.latest_step() is not None:
      state, curve = restore(checkpoints, state)
    task = bar.add_task("training", total=steps, completed=int(state.step), loss="")

    def on_step(loss):
      curve.train.append(loss)
      bar.update(task, advance=1, loss=f"{loss:.3f} nats per token")

    while int(state.step) < steps:
      stop = min(int(state.step) + every, steps)
      state = train(state, tokens, stop, config=config, recipe=recipe, on_step=on_step)
      loss = evaluate(state.params, validation, len(held_out), config=config)
      curve.validation.append((stop, loss))
      save(checkpoints, state, curve)
      bar.print(f"step {stop}: validation {loss:.4f} nats per character")

  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
  loading.save(decoder(rounded, config), out)
  tokenizer.save(str(out / "tokenizer.json"))
  draw(curve, len(learned) / len(tokens), out / "loss.png")
  params = nnx.state(loading.load(out, jnp.float32), nnx.Param)
  loss = evaluate(params, validation, len(held_out), config=config)
  card = CARD.format(
    parameters=sum(leaf.size for leaf in jax.tree.leaves(params)), layers=config.num_layers,
    length=config.max_length, vocab=config.vocab_size, chars=len(learned) + len(held_out),
    tokens=len(tokens), steps=steps, batch=recipe.batch_tokens, loss=loss, name=text.name,
    about=about, seed=seed,
  )  # fmt: skip
  (out / "README.md").write_text(card, encoding="utf-8")
  print(f"{out}: validation {loss:.4f} nats per character")


if __name__ == "__main__":
  typer.run(main)
