"""The host's side of a cache: a manager of sequences, prefix cache, swap, pressure. Provisional."""

from paged_jax.host import errors as errors
from paged_jax.host import eviction as eviction
from paged_jax.host.config import ManagerConfig as ManagerConfig
from paged_jax.host.config import Request as Request
from paged_jax.host.manager import Manager as Manager
from paged_jax.host.persistence import Persisted as Persisted
from paged_jax.host.prefixes import Prefix as Prefix
from paged_jax.host.prefixes import PrefixStats as PrefixStats
from paged_jax.host.pressure import Level as Level
from paged_jax.host.reclaim import Collected as Collected
from paged_jax.host.report import AuditReport as AuditReport
from paged_jax.host.report import Stats as Stats
from paged_jax.host.sequences import Handle as Handle
from paged_jax.host.sequences import SequenceStats as SequenceStats
from paged_jax.host.state import Ticket as Ticket
from paged_jax.host.store import FileStore as FileStore
from paged_jax.host.store import Store as Store

__all__ = [
  "AuditReport", "Collected", "FileStore", "Handle", "Level", "Manager", "ManagerConfig",
  "Persisted", "Prefix", "PrefixStats", "Request", "SequenceStats", "Stats", "Store", "Ticket",
  "errors", "eviction",
]  # fmt: skip
