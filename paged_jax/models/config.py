"""What a decoder is: its sizes, and which of its layers are alike."""

import dataclasses
import functools
import math
from typing import NamedTuple

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
  activation: str = "silu"  # silu or gelu_tanh
  norm_eps: float = 1e-6
  norm_offset: bool = False  # RMSNorm multiplies by 1 + weight (Gemma)
  norm_wide: bool = False  # RMSNorm rounds after its weight, not before it (Gemma, gpt-oss)
  post_norms: bool = False  # attention and MLP outputs are normalised too (Gemma)
  qk_norm: bool = False  # queries and keys are normalised per head (Qwen3, Gemma 3)
  qkv_bias: bool = False  # Qwen2, gpt-oss
  output_bias: bool = False  # of attention (gpt-oss)
  sinks: bool = False  # each head may attend to nothing, by a logit of its own (gpt-oss)
  experts: Experts | None = None  # in place of the MLP
  latent: Latent | None = None  # then `num_kv_heads` and `head_dim` are those of what is cached
  tied: bool = False  # logits reuse the embedding
  embed_scale: float = 1.0
  attention_scale: float | None = None  # None = head_dim**-0.5
  attention_softcap: float | None = None
  logit_softcap: float | None = None

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"{self.num_heads=} must be a multiple of {self.num_kv_heads=}")
    if self.rope_dim % 2:
      name = "head_dim" if self.latent is None else "latent.rope_dim"
      raise ValueError(f"{name} must be even, got {self.rope_dim}")
    if self.latent and (self.num_kv_heads, self.head_dim) != (1, self.latent.rank + self.rope_dim):
      raise ValueError(
        f"{self.num_kv_heads=} and {self.head_dim=} must be 1 and {self.latent.rank + self.rope_dim}"
        " for this latent attention"
      )
    if not len(self.windows) == len(self.ropes) == self.num_layers:
      raise ValueError(f"windows and ropes must have {self.num_layers=} entries")
    if self.experts and not 1 <= self.experts.per_token <= self.experts.num_experts:
      raise ValueError(f"{self.experts.per_token=} must be in [1, {self.experts.num_experts=}]")

  @property
  def rope_dim(self) -> int:
    """Channels of a head that turn with the position."""
    return self.head_dim if self.latent is None else self.latent.rope_dim

  @functools.cached_property
  def groups(self) -> tuple[Group, ...]:
    """The layers by the cache that they need; the longest window first, and all tokens before it.

    Groups with equal windows are in the order of their first layers.

    >>> import dataclasses
    >>> from paged_jax import models
    >>> config = models.load(models.embedded()).config
    >>> config = dataclasses.replace(config, windows=(8, 8, 8, None))
    >>> [(group.window, group.layers) for group in config.groups]
    [(None, (3,)), (8, (0, 1, 2))]
    """
    windows = dict.fromkeys(self.windows)
    layers = {w: tuple(i for i, each in enumerate(self.windows) if each == w) for w in windows}
    groups = [self.uniform._replace(window=w, layers=layers[w]) for w in windows]
    return tuple(sorted(groups, key=lambda group: -(group.window or math.inf)))

  @functools.cached_property
  def uniform(self) -> Group:
    """All layers as one group, which keeps all tokens."""
    layers, value_dim = tuple(range(self.num_layers)), self.latent.rank if self.latent else None
    return Group(None, self.num_kv_heads, self.head_dim, layers, value_dim)
