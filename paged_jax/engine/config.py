"""How an engine works, and what it has done."""

import dataclasses

from paged_jax.config import CacheConfig
from paged_jax.engine.device.drafts import Drafter
from paged_jax.engine.sampling import MAX_STOP_TOKENS
from paged_jax.host import ManagerConfig
from paged_jax.host.config import whole

PREEMPTIONS = ("auto", "swap", "recompute")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """How an engine works.

  Raises:
    ValueError: A field is out of range; the message names the field and its value.
  """

  cache: CacheConfig
  options: ManagerConfig = dataclasses.field(default_factory=ManagerConfig)
  num_steps: int = 8  # decode steps of a call while no prompt waits
  prompt_sizes: tuple[int, ...] = (32, 128, 512)  # compiled; the largest is a call's budget
  eos: tuple[int, ...] = ()  # tokens that end every sample
  preemption: str = "auto"  # swap, recompute, or whichever costs less
  drafter: Drafter | None = None  # speculative decoding: who guesses what comes next
  max_beams: int = 1  # the widest beam search that may be asked for

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
    if not 1 <= self.max_beams <= self.cache.num_rows:
      raise ValueError(
        f"max_beams must be in [1, {self.cache.num_rows}], the number of rows, got {self.max_beams}"
      )


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
  copies: int = 0  # pages that calls copied on write
  peak_running: int = 0
  seconds_waited: float = 0.0  # for reports: what the device takes beyond the host's own work
