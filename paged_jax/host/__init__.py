"""The host's side of a cache: requests, handles, prefix cache, swap, pressure, statistics. Provisional."""

from paged_jax.host import errors as errors
from paged_jax.host import eviction as eviction
from paged_jax.host.config import ManagerConfig as ManagerConfig
from paged_jax.host.config import Request as Request
from paged_jax.host.manager import Manager as Manager
from paged_jax.host.prefixes import Prefix as Prefix
from paged_jax.host.pressure import Level as Level
from paged_jax.host.sequences import Handle as Handle
from paged_jax.host.state import Ticket as Ticket
