"""Continuous batching on a paged cache; pages are managed on the device. Provisional."""

from paged_jax.engine.audit import EngineAudit as EngineAudit
from paged_jax.engine.config import Counts as Counts
from paged_jax.engine.config import EngineConfig as EngineConfig
from paged_jax.engine.device.drafts import PromptLookup as PromptLookup
from paged_jax.engine.engine import Engine as Engine
from paged_jax.engine.engine import Token as Token
from paged_jax.engine.handle import RequestHandle as RequestHandle
from paged_jax.engine.requests import Completion as Completion
from paged_jax.engine.sampling import Sampling as Sampling
