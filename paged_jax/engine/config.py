"""How an engine works, and what it has done."""

import dataclasses
import enum
import math
from collections import Counter

from paged_jax import attention, groups
from paged_jax.config import CacheConfig
from paged_jax.engine.device.drafts import Drafter
from paged_jax.engine.sampling import MAX_STOP_TOKENS
from paged_jax.host import ManagerConfig
from paged_jax.host.config import whole

PREEMPTIONS = ("auto", "swap", "recompute")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How an engine works.

  >>> import paged_jax
  >>> from paged_jax.engine import EngineConfig
  >>> cache = paged_jax.CacheConfig(
  ...   num_layers=2, num_kv_heads=2, head_dim=8, num_pages=64, num_rows=8, max_length=128
  ... )
  >>> EngineConfig(cache, num_steps=4, prompt_sizes=(32,), eos=(2,)).width
  1

  Raises:
    ValueError: A field is out of range; the message names the field and its value.
  """

  cache: CacheConfig | tuple[CacheConfig, ...]  # a tuple for a model with several groups of layers
  options: ManagerConfig = dataclasses.field(default_factory=ManagerConfig)
  num_steps: int = 8  # decode steps of a call without prompts
  prompt_sizes: tuple[int, ...] = (32, 128, 512)  # compiled; the largest is a call's budget
  eos: tuple[int, ...] = ()  # tokens that end every sample
  preemption: str = "auto"  # swap, recompute, or whichever costs less
  drafter: Drafter | None = None  # speculative decoding: what guesses the next tokens
  max_beams: int = 1  # the widest beam search that may be asked for
  implementation: str | None = None  # attention backend; None: the best one, see `warm_up`

  def __post_init__(self):
    if whole("num_steps", self.num_steps) < 1:
      raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
    if not self.prompt_sizes or sorted({*self.prompt_sizes}) != [*self.prompt_sizes]:
      raise ValueError(f"prompt_sizes must ascend, got {self.prompt_sizes}")
    if self.prompt_sizes[0] < 1:
      raise ValueError(f"prompt_sizes must be positive, got {self.prompt_sizes}")
    for token in self.eos:
      whole("eos", token, 0)
    if len(self.eos) > MAX_STOP_TOKENS:
      raise ValueError(f"eos must be at most {MAX_STOP_TOKENS} tokens, got {self.eos}")
    if self.preemption not in PREEMPTIONS:
      raise ValueError(f"preemption must be one of {PREEMPTIONS}, got {self.preemption!r}")
    if not 1 <= self.max_beams <= self.num_rows:
      raise ValueError(
        f"max_beams must be in [1, {self.num_rows}], the number of rows, got {self.max_beams}"
      )
    if self.implementation not in (None, *attention.implementations):
      raise ValueError(
        f"implementation must be None or one of {', '.join(attention.implementations)},"
        f" got {self.implementation!r}"
      )

  @property
  def caches(self) -> tuple[CacheConfig, ...]:
    """The cache of each group."""
    return groups.each(self.cache)

  @property
  def num_rows(self) -> int:
    """Rows of the batch, S."""
    return self.caches[0].num_rows

  @property
  def page_size(self) -> int:
    """Tokens that fill whole pages in every group."""
    return math.lcm(*(cache.page_size for cache in self.caches))

  @property
  def capacity(self) -> int:
    """Tokens that a row can hold in every group, whole pages."""
    return min(cache.pages_per_row * cache.page_size for cache in self.caches)

  @property
  def windowed(self) -> bool:
    """Whether a group forgets tokens, so that texts take their pages as they are computed."""
    return any(cache.window is not None for cache in self.caches)

  @property
  def width(self) -> int:
    """Most tokens that a row draws in a step, W."""
    return 1 if self.drafter is None else 1 + self.drafter.num_drafts


class FullRead(enum.Enum):
  """Why a round reads all reports before it goes on; otherwise one call stays in flight."""

  COMMANDS = "commands change samples, and must see all that was drawn for them"
  MOVES = "a sample gives way, moves between device and host, or starts on another one's pages"
  ENDED = "only samples that have ended are on rows, and nobody else's call would wait for this"


@dataclasses.dataclass
class Counts:
  """What an engine has done."""

  calls: int = 0
  row_steps: int = 0  # steps in which a row drew something
  drawn_tokens: int = 0
  prompt_tokens: int = 0  # computed
  cached_tokens: int = 0  # found in the prefix cache
  swaps: int = 0  # preemptions
  recomputations: int = 0
  peak_running: int = 0
  seconds_waited: float = 0.0  # for reports: what the device takes beyond the host's own work
  full_reads: Counter[FullRead] = dataclasses.field(default_factory=Counter)
