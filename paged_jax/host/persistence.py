"""Stored prefixes that outlive the process: into a store, and back into the prefix cache.

An entry has the tokens of one prefix, its logits, and for each group the names of its pages. A page
is named by a digest of its bytes, so pages that prefixes share are in the store once. Lookups compare
tokens, as the prefix index does; names only find files.

    # prefix cache    a b c ┬ d e         entry  a b c d e   pages 1 2      1 is in the store once
    #                       └ f g         entry  a b c f g   pages 1 3

What is in a page does not depend on the platform: neither padding nor the dtype of storage is kept.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from paged_jax import pages as pages_lib
from paged_jax.host import records
from paged_jax.host.holds import Held, pages_of
from paged_jax.host.pools import Pools
from paged_jax.host.prefix import TOKEN_BYTES, encoded
from paged_jax.host.store import Store
from paged_jax.host.turn import Turn
from paged_jax.types import Pages

FORMAT = 1  # of records; a change of what they mean raises it

_log = logging.getLogger("paged_jax.host.store")


class Persisted(NamedTuple):
  """What `Manager.save_prefixes` or `Manager.load_prefixes` did.

  >>> import tempfile
  >>> from paged_jax import CacheConfig, host
  >>> manager = host.Manager(CacheConfig(1, 1, 4, num_pages=8, num_rows=2, max_length=64))
  >>> manager.save_prefixes(host.FileStore(tempfile.mkdtemp()), "my weights").num_prefixes
  0
  """

  num_prefixes: int = 0  # that are in the store now, or in the prefix cache
  num_pages: int = 0  # whose bytes moved; those that were there already are left out
  num_bytes: int = 0  # of records that were written or read
  num_missed: int = 0  # prefixes that are not: no room, expired, or a reason that was logged


class _Unusable(ValueError):
  """A record cannot be used here; the message says why."""


_UNUSABLE = (_Unusable, records.Damaged)


class _Saved(NamedTuple):
  """What an entry says."""

  namespace: Hashable
  key: bytes  # the tokens, `encoded`
  last_logits: Any
  ttl: float | None  # seconds that are left
  pinned: bool
  pages: list[list[str]]  # names of each group's pages


class Persistence:
  """Saves and loads stored prefixes. Not inside a `turn.change`: it makes changes of its own.

  Args:
    turn: Each prefix is one change; bytes are written and read between changes.
    pools: Have the prefixes.
  """

  def __init__(self, turn: Turn, pools: Pools):
    self._turn, self._pools, self._state = turn, pools, turn.state
    self._layout = [
      dict(
        num_layers=each.num_layers,
        num_kv_heads=each.num_kv_heads,
        head_dim=each.head_dim,
        value_dim=each.value_dim,
        dtype=np.dtype(each.dtype).name,
        page_size=each.page_size,
        window=each.window,
        copy_on_write=each.copy_on_write,
      )
      for each in self._state.configs
    ]

  # Saving

  def save(self, store: Store, weights: str) -> Persisted:
    """Puts every stored prefix into a store, the one used last at the end."""
    with self._turn.change(wait=False):
      prefixes = self._pools.stored()
    done, written = Persisted(), {}
    for namespace, key in prefixes:
      saved = self._save(store, weights, namespace, key, written)
      done = Persisted(*map(sum, zip(done, saved)))
    return done

  def _save(
    self, store: Store, weights: str, namespace: Hashable, key: bytes, written: dict[Held, str]
  ) -> Persisted:
    """Puts one prefix into a store.

    Args:
      store: Where to.
      weights: Their fingerprint.
      namespace: Of the prefix.
      key: Its tokens, `encoded`.
      written: Names of the pages that this save knows; it adds to them.
    """
    there = {*store.names()}
    if (name := self._name(weights, namespace, key)) is None:
      _log.warning("a prefix is not saved: its namespace %r is no JSON", namespace)
      return Persisted(num_missed=1)
    known = self._known(store.get(name) if name in there else None, weights, key)
    with self._turn.change(wait=False):
      entry, parts = self._pools.ends.entry(namespace, key), self._pools.has(namespace, key)
      if entry is None or any(count != len(held) for count, held in parts):
        return Persisted(num_missed=1)  # it has left meanwhile, or part of a tail is evicted
      for (_, held), names, each in zip(parts, known, self._state.configs):
        # Only part of the last page may be the prefix's, and an older save may have had another
        # page there, with fewer tokens.
        whole = held[:-1] if len(key) // TOKEN_BYTES % each.page_size else held
        written |= {x: page for x, page in zip(whole, names) if page in there}
      images = self._images([[x for x in held if written.get(x) not in there] for _, held in parts])
      ttl = entry.expires - self._pools.clock()
      logits = entry.last_logits
    fresh: dict[str, bytes] = {}
    for held, image in images:
      data, digest = records.pack({}, pages_lib.portable(image))
      written[held] = page = f"page-{digest}"
      if page not in there:
        fresh[page] = data
    names = [[written[held] for held in own] for _, own in parts]
    expires = None if ttl == math.inf else time.time() + ttl
    about = self._about(weights, namespace, expires=expires, pinned=entry.pinned, pages=names)
    data, _ = records.pack(about, {"tokens": np.frombuffer(key, "<i4")} | _logits(logits))
    pages = {page: fresh.get(page) for own in names for page in own}
    if not store.put(pages | {name: data}):
      return Persisted(num_missed=1)
    return Persisted(1, len(fresh), sum(map(len, fresh.values())) + len(data))

  def _images(self, held: Sequence[list[Held]]) -> list[tuple[Held, Pages]]:
    """The images of held pages of each group. Those of device pages are on their way to the host."""
    images: list[tuple[Held, Pages]] = []
    for group, own in enumerate(held):
      there = [x for x in own if x.page is not None]
      images += zip(there, self._state.offload(group, pages_of(there)))
      images += [(x, x.image) for x in own if x.image is not None]
    return images

  def _known(self, data: bytes | None, weights: str, key: bytes) -> list[list[str]]:
    """The names of a prefix's pages in an older entry for the same tokens."""
    try:
      saved = None if data is None else self._read(data, weights)
    except _UNUSABLE:  # it is written anew
      saved = None
    return [] if saved is None or saved.key != key else saved.pages

  def _about(self, weights: str, namespace: Hashable, **fields: Any) -> dict[str, Any]:
    """The text of an entry."""
    made = dict(format=FORMAT, weights=weights, layout=self._layout, namespace=namespace)
    return made | fields

  def _name(self, weights: str, namespace: Hashable, key: bytes) -> str | None:
    """The name of a prefix's entry; None if its namespace cannot be written as JSON and read back."""
    try:
      text = json.dumps(self._about(weights, namespace), sort_keys=True)
      if _namespace(json.loads(text)["namespace"]) != namespace:
        return None
    except (TypeError, ValueError):
      return None
    return f"entry-{hashlib.sha256(text.encode() + key).hexdigest()}"

  # Loading

  def load(self, store: Store, weights: str) -> Persisted:
    """Puts the prefixes of a store into the prefix cache, the newest first, while there is room."""
    done, loaded = Persisted(), []
    for name in store.names():
      data = store.get(name) if name.startswith("entry-") else None
      if data is None:
        continue
      try:
        saved = self._read(data, weights)
        if self._name(weights, saved.namespace, saved.key) != name:
          raise _Unusable("its tokens or its namespace are others than its name says")
        one = self._load(store, saved)
      except _UNUSABLE as error:
        _log.warning("%s is not used: %s", name, error)
        one = Persisted(num_missed=1)
      else:
        if one.num_prefixes:
          loaded.append(saved)
          one = one._replace(num_bytes=one.num_bytes + len(data))
      done = Persisted(*map(sum, zip(done, one)))
    with self._turn.change(wait=False):
      for saved in reversed(loaded):  # the newest counts as used last
        self._pools.find(saved.namespace, saved.key, lambda length, logits: length, touch=True)
    return done

  def _read(self, data: bytes, weights: str) -> _Saved:
    """What an entry says.

    Raises:
      _Unusable, Damaged: It is damaged, or of another format, other weights or another layout.
    """
    about, arrays, _ = records.unpack(data)
    here = self._about(weights, None)
    for part in ("format", "weights", "layout"):
      if about.get(part) != here[part]:
        raise _Unusable(f"it has {part} {about.get(part)!r}, and not {here[part]!r}")
    try:
      namespace, expires = _namespace(about["namespace"]), about["expires"]
      hash(namespace)
      return _Saved(
        namespace,
        encoded(arrays["tokens"]),
        arrays.get("logits"),
        None if expires is None else float(expires) - time.time(),
        bool(about["pinned"]),
        [[str(page) for page in own] for own in about["pages"]],
      )
    except (KeyError, TypeError, ValueError) as error:
      raise _Unusable(f"no entry ({error!r})") from None

  def _load(self, store: Store, saved: _Saved) -> Persisted:
    """Puts one prefix into the prefix cache: all its groups or none.

    Raises:
      _Unusable: A page is missing or damaged.
    """
    missed = Persisted(num_missed=1)
    if saved.ttl is not None and saved.ttl <= 0:
      return missed
    with self._turn.change():
      if self._pools.ends.entry(saved.namespace, saved.key) is not None:
        return Persisted(1)
      places = self._places(saved)
      if places is None:
        return missed
      counts = [count for count, _ in self._pools.has(saved.namespace, saved.key)]
      if counts != [len(own) for own in saved.pages]:
        raise _Unusable("it has other pages than its tokens need")
      like = [self._state.offload(n, [x.num_pages])[0] for n, x in enumerate(self._state.configs)]
    read: list[list[Pages]] = []
    num_bytes = 0
    for own, (first, _), image in zip(saved.pages, places, like):
      read.append([])
      for name in own[first:]:
        data = store.get(name)
        num_bytes += len(data or b"")
        read[-1].append(_page(store, name, data, image))
    with self._turn.change():
      if self._places(saved) != places:
        return missed  # others came or went meanwhile
      self._put(saved, read, places)
    return Persisted(1, sum(map(len, read)), num_bytes)

  def _places(self, saved: _Saved) -> list[tuple[int, bool]] | None:
    """Of each group how many first pages of a prefix are there, and whether the others go to the
    device, or to host memory; None if there is no room.

    # free device pages, beyond the low watermark     ──▶ the device
    # else with `spill`, free host pages              ──▶ host memory
    """
    if not self._pools.takes(saved.namespace, saved.key):
      return None
    places = []
    for kept, (count, held) in zip(self._pools.kept, self._pools.has(saved.namespace, saved.key)):
      config, options = kept.config, self._turn.options
      needed = count - len(held)
      free = kept.book.num_free - math.ceil(options.low_watermark * config.num_pages)
      fits = len(saved.key) // TOKEN_BYTES <= config.pages_per_row * config.page_size
      on_device = needed <= max(free, 0)
      if not fits or not (on_device or (options.spill and needed <= kept.num_free_host)):
        return None
      places.append((len(held), on_device))
    return places

  def _put(
    self, saved: _Saved, read: Sequence[list[Pages]], places: Sequence[tuple[int, bool]]
  ) -> None:
    """Puts a prefix into the indexes, with the pages that are there and those that were read.

    # there    [a][b]          the index has them
    # read           [c][d]    new held pages
    """
    pools = self._pools
    held = [list(own) for _, own in pools.has(saved.namespace, saved.key)]
    for kept, own, images, (_, on_device) in zip(pools.kept, held, read, places):
      own += kept.bring(images, to_device=on_device)

    def keep(group: int, pages: slice, first: int) -> list[Held]:
      return held[group][first:]

    gone: list[list[int]] = [[] for _ in held]
    pools.put(
      saved.namespace, saved.key, keep, gone, last_logits=saved.last_logits, ttl=saved.ttl,
      pinned=saved.pinned,
    )  # fmt: skip
    for kept, pages in zip(pools.kept, gone):
      kept.drop(pages)
    num_tokens = len(saved.key) // TOKEN_BYTES
    self._turn.event("stored", None, sum(map(len, read)), num_tokens)


def _page(store: Store, name: str, data: bytes | None, like: Pages) -> Pages:
  """The image in a page's record, stored as the image `like` is.

  Raises:
    _Unusable: It is missing, damaged, or another page.
  """
  if data is None:
    raise _Unusable(f"{name} is missing")
  try:
    _, arrays, digest = records.unpack(data)
    if name != f"page-{digest}":
      raise records.Damaged("another record")
  except records.Damaged as error:
    store.remove(name)  # so that the next save writes it again
    raise _Unusable(f"{name} is damaged: {error}") from None
  try:
    return pages_lib.stored_like(arrays, like)
  except ValueError as error:
    raise _Unusable(f"{name} is no page of this layout: {error}") from None


def _logits(last_logits: Any) -> dict[str, np.ndarray]:
  """What an entry keeps of a prefix's logits: an array of numbers, or nothing."""
  numbers = hasattr(last_logits, "dtype") and jnp.issubdtype(last_logits.dtype, jnp.number)
  return {"logits": np.asarray(last_logits)} if numbers else {}


def _namespace(value: Any) -> Hashable:
  """A namespace as it was before JSON made lists of its tuples."""
  return tuple(map(_namespace, value)) if isinstance(value, list) else value
