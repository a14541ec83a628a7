"""Continuous batching on a paged cache: requests in, tokens out, pages managed on the device.

Stability of the public names: all are provisional (`Engine`, `EngineConfig`, `EngineAudit`, `Counts`,
`FullRead`, `RequestHandle`, `Completion`, `Sampling`, `Token`, `PromptLookup`): a release may change
them, and the changelog says how.
"""

from paged_jax.engine.audit import EngineAudit as EngineAudit
from paged_jax.engine.config import Counts as Counts
from paged_jax.engine.config import EngineConfig as EngineConfig
from paged_jax.engine.config import FullRead as FullRead
from paged_jax.engine.device.drafts import PromptLookup as PromptLookup
from paged_jax.engine.engine import Engine as Engine
from paged_jax.engine.handle import RequestHandle as RequestHandle
from paged_jax.engine.requests import Completion as Completion
from paged_jax.engine.sampling import Sampling as Sampling
from paged_jax.engine.service import Token as Token
