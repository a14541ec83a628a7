"""What a decoder is: its sizes, and which of its layers are alike."""

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

from paged_jax.models.ropes import Rope


class Group(NamedTuple):
  """Layers that share a cache: their keys and values have one shape and one lifetime.

  >>> from paged_jax import models
  >>> models.Group(window=512, num_kv_heads=1, head_dim=256, layers=(0, 1, 2, 3, 4)).window
  512
  """

  window: int | None  # tokens that its layers see, the newest included; None = all
  num_kv_heads: int
  head_dim: int
  layers: tuple[int, ...]  # in order; layer `layers[i]` of the model is layer i of the cache
  value_dim: int | None = None  # None: keys and values apart; n: a value is n channels of its key


class Shape(NamedTuple):
  """Sizes of one layer, in a model whose layers differ (Gemma 4).

  >>> from paged_jax import models
  >>> models.Shape(num_kv_heads=4, head_dim=512, intermediate_size=9216).own
  True
  """

  num_kv_heads: int
  head_dim: int
  intermediate_size: int
  own: bool = True  # False: it reads keys and values of the last layer with its window that has any
  values: bool = True  # False: a value is the key, before norm and rope


@dataclasses.dataclass(frozen=True)
class Experts:
  """MLPs of which each token takes a few, as the router says (gpt-oss).

  >>> from paged_jax import models
  >>> models.Experts(num_experts=32, per_token=4).limit
  7.0
  """

  num_experts: int
  per_token: int
  gain: float = 1.702  # of the sigmoid in the activation
  limit: float = 7.0  # of what the activation takes


@dataclasses.dataclass(frozen=True)
class Latent:
  """Keys and values that are projections of one vector per token, which is cached (DeepSeek).

  >>> from paged_jax import models
  >>> latent = models.Latent(rank=512, key_dim=128, rope_dim=64, value_dim=128)
  >>> latent.rank + latent.rope_dim  # what is cached of a token
  576
  """

  rank: int  # size of that vector
  key_dim: int  # of a head's key, what comes from the vector and is not rotated
  rope_dim: int  # of a token's rotated key, one for all heads
  value_dim: int  # of a head's value
  query_rank: int | None = None  # size of the vector that queries are a projection of, if any
  interleaved: bool = True  # ropes turn the pairs (2d, 2d + 1), not (d, d + D/2)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Everything that varies between families. Frozen and hashable.

  Raises:
    ValueError: Fields do not fit together; the message names them.

  >>> from paged_jax import models
  >>> config = models.DecoderConfig(
  ...   vocab_size=50, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2,
  ...   num_kv_heads=1, head_dim=4, max_length=64, windows=(None,), ropes=(models.Rope(),),
  ... )
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_length: int  # longest text: what the model was trained for, or its ropes hold in a cache
  windows: tuple[int | None, ...]  # per layer: tokens seen, itself included; None = all
  ropes: tuple[Rope, ...]  # per layer
  shapes: tuple[Shape, ...] = ()  # per layer, if they differ; () = the sizes above in all layers
  activation: str = "silu"  # silu or gelu_tanh
  norm_eps: float = 1e-6
  norm_offset: bool = False  # RMSNorm multiplies by 1 + weight (Gemma)
  norm_wide: bool = False  # RMSNorm rounds after its weight, not before it (Gemma, gpt-oss)
  post_norms: bool = False  # attention and MLP outputs are normalised too (Gemma)
  qk_norm: bool = False  # queries and keys are normalised per head (Qwen3, Gemma 3)
  value_norm: bool = False  # values are normalised too, without a weight (Gemma 4)
  qkv_bias: bool = False  # Qwen2, gpt-oss
  output_bias: bool = False  # of attention (gpt-oss)
  sinks: bool = False  # each head may attend to nothing, by a logit of its own (gpt-oss)
  experts: Experts | None = None  # in place of the MLP
  latent: Latent | None = None  # then `num_kv_heads` and `head_dim` are those of what is cached
  layer_scalars: bool = False  # each layer's result is multiplied by a number (Gemma 4)
  layer_input_size: int = 0  # of a vector that each layer gets for each token (Gemma 4); 0 = none
  layer_input_vocab_size: int = 0  # tokens that have such vectors
  tied: bool = False  # logits reuse the embedding
  embed_scale: float = 1.0
  attention_scale: float | None = None  # None = head_dim**-0.5
  attention_softcap: float | None = None
  logit_softcap: float | None = None

  def __post_init__(self):
    if not len(self.windows) == len(self.ropes) == len(self.layers) == self.num_layers:
      raise ValueError(f"windows, ropes and shapes must have {self.num_layers=} entries")
    for shape, rope_dim in zip(self.layers, self.rope_dims):
      if self.num_heads % shape.num_kv_heads:
        raise ValueError(
          f"{self.num_heads=} must be a multiple of num_kv_heads={shape.num_kv_heads}"
        )
      if rope_dim % 2:
        name = "head_dim" if self.latent is None else "latent.rope_dim"
        raise ValueError(f"{name} must be even, got {rope_dim}")
    if self.latent:
      wanted = Shape(1, self.latent.rank + self.latent.rope_dim, self.intermediate_size)
      if {*self.layers} != {wanted}:
        raise ValueError(f"layers of latent attention must be {wanted}, got {self.layers[0]}")
    if self.experts and not 1 <= self.experts.per_token <= self.experts.num_experts:
      raise ValueError(f"{self.experts.per_token=} must be in [1, {self.experts.num_experts=}]")
    for i, source in enumerate(self.sources):
      if self.layers[source][:2] != self.layers[i][:2]:
        raise ValueError(f"shapes: layer {i} has no layer before it whose keys it could read")

  @functools.cached_property
  def layers(self) -> tuple[Shape, ...]:
    """The sizes of each layer."""
    shape = Shape(self.num_kv_heads, self.head_dim, self.intermediate_size)
    return self.shapes or (shape,) * self.num_layers

  @functools.cached_property
  def stacks(self) -> tuple[tuple[int, ...], ...]:
    """The layers of each shape, whose parameters are stacked."""
    return tuple(_alike(self.layers).values())

  @functools.cached_property
  def stacked(self) -> tuple[tuple[int, int], ...]:
    """Of each layer, the number of its stack and its place in there."""
    found = _numbered(self.stacks)
    return tuple(found[i] for i in range(self.num_layers))

  @functools.cached_property
  def rope_dims(self) -> tuple[int, ...]:
    """Channels of a head that turn with the position, of each layer."""
    return tuple(self.latent.rope_dim if self.latent else x.head_dim for x in self.layers)

  @functools.cached_property
  def sources(self) -> tuple[int, ...]:
    """Of each layer, the layer whose keys and values it reads: itself, or one before it."""
    last, found = {}, []
    for i, (window, shape) in enumerate(zip(self.windows, self.layers)):
      if shape.own:
        last[window] = i
      if window not in last:
        raise ValueError(f"shapes: layer {i} has no layer before it whose keys it could read")
      found.append(last[window])
    return tuple(found)

  @functools.cached_property
  def groups(self) -> tuple[Group, ...]:
    """The layers by the cache that they need; the longest window first, and all tokens before it.

    Groups with equal windows are in the order of their first layers. A layer that reads the keys
    and values of another one is in no group.

    >>> import dataclasses
    >>> from paged_jax import models
    >>> config = models.load(models.embedded()).config
    >>> config = dataclasses.replace(config, windows=(8, 8, 8, None))
    >>> [(group.window, group.layers) for group in config.groups]
    [(None, (3,)), (8, (0, 1, 2))]
    """
    groups = self._groups(self.windows)
    return tuple(sorted(groups, key=lambda group: -(group.window or math.inf)))

  @functools.cached_property
  def uniform(self) -> Group:
    """All layers as one group, which keeps all tokens.

    Raises:
      ValueError: Their keys and values have several shapes.
    """
    groups = self._groups((None,) * self.num_layers)
    if len(groups) > 1:
      raise ValueError(f"the layers need a cache per group: they have {len(groups)} shapes")
    return groups[0]

  def places(self, groups: Sequence[Group]) -> list[tuple[int, int]]:
    """Of each layer, the number of the group that it reads, and the layer of that group's cache."""
    found = _numbered([group.layers for group in groups])
    return [found[source] for source in self.sources]

  def _groups(self, windows: Sequence[int | None]) -> list[Group]:
    """Groups of layers with these windows, in the order of their first layers."""
    value_dim = self.latent.rank if self.latent else None
    kinds = [(w, *shape[:2]) if shape.own else None for w, shape in zip(windows, self.layers)]
    alike = _alike(kinds)
    return [Group(*kind, alike[kind], value_dim) for kind in alike if kind is not None]


T = TypeVar("T", bound=Hashable)


def _alike(kinds: Sequence[T]) -> dict[T, tuple[int, ...]]:
  """The layers of each kind."""
  return {kind: tuple(i for i, each in enumerate(kinds) if each == kind) for kind in kinds}


def _numbered(lists: Sequence[Sequence[int]]) -> dict[int, tuple[int, int]]:
  """Of each layer in `lists`, the number of its list and its place in there."""
  return {i: (n, j) for n, each in enumerate(lists) for j, i in enumerate(each)}
