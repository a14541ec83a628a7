"""Tokens that files beside `tokenizer.json` name, added as `transformers` adds them."""

from pathlib import Path
from typing import Any

import tokenizers

from paged_jax.models import fields

CONFIG, ADDED, SPECIAL = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def add(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
  """Adds the tokens that state an id, in order, then those with a role, then all others.

  Raises:
    ValueError: A file is damaged, or a token gets another id than it states; the message names
      the file and the fault.
  """
  config = _read(folder / CONFIG)
  special = {} if "added_tokens_decoder" in config else _read(folder / SPECIAL)
  if tokenizer.padding:
    config.setdefault("pad_token", tokenizer.padding["pad_token"])
  older, newer = _roles(special, folder / SPECIAL), _roles(config, folder / CONFIG)
  by_role = newer | older
  names = dict.fromkeys((*ROLES, *older, *newer))
  roles = [by_role[name] for name in names if name in by_role]
  further = [*_further(config, folder / CONFIG), *_further(special, folder / SPECIAL)]
  if "added_tokens_decoder" in config:
    file, numbered = folder / CONFIG, _decoder(config, folder / CONFIG)
  else:  # files from before 2023: if ids differ, `tokenizer.json` wins
    file, control = folder / ADDED, {token.content for token in (*roles, *further)}
    numbered = _encoder(file, control) | tokenizer.get_added_tokens_decoder()
  _add_numbered(tokenizer, numbered, {token.content for token in roles}, file)
  for token in (*roles, *further):
    known = tokenizer.get_added_tokens_decoder().values()
    if token.content not in {each.content for each in known}:
      tokenizer.add_tokens([token])
  tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))


def _add_numbered(
  tokenizer: tokenizers.Tokenizer, numbered: dict[int, tokenizers.AddedToken],
  roles: set[str], file: Path,
) -> None:  # fmt: skip
  """Adds tokens in the order of their ids. The library chooses ids itself; they must agree."""
  for stated, token in sorted(numbered.items()):
    token.special = token.special or token.content in roles
    tokenizer.add_tokens([token])
    got = tokenizer.token_to_id(token.content)
    if token.content and got != stated:
      raise ValueError(f"{file}: {token.content!r} must have the id {stated}, but gets {got}")


def _read(file: Path) -> dict[str, Any]:
  """The object in a file, empty if there is no file."""
  return fields.read(file) if file.exists() else {}


def _decoder(config: dict[str, Any], file: Path) -> dict[int, tokenizers.AddedToken]:
  """Tokens by id, each an object."""
  numbered = {}
  stated = config["added_tokens_decoder"]
  if not isinstance(stated, dict):
    raise ValueError(f"{file}: {fields.wrong('added_tokens_decoder', 'an object', stated)}")
  for index, token in stated.items():
    if not (index.isascii() and index.isdigit() and isinstance(token, dict)):
      wanted = "objects by their ids"
      raise ValueError(f"{file}: {fields.wrong('added_tokens_decoder', wanted, {index: token})}")
    numbered[int(index)] = _token(token, "added_tokens_decoder", file)
  return numbered


def _encoder(file: Path, control: set[str]) -> dict[int, tokenizers.AddedToken]:
  """Tokens by id, from a file of ids by tokens."""
  numbered = {}
  for content, index in _read(file).items():
    if type(index) is not int or index < 0:
      raise ValueError(f"{file}: {fields.wrong(repr(content), 'an id', index)}")
    special = content in control
    numbered[index] = tokenizers.AddedToken(content, special=special, normalized=not special)
  return numbered


def _roles(raw: dict[str, Any], file: Path) -> dict[str, tokenizers.AddedToken]:
  """Tokens by role; a model may have its own roles, such as `image_token`."""
  named = {name: value for name, value in raw.items() if name.endswith("_token")}
  if isinstance(raw.get("extra_special_tokens"), dict):
    named |= raw["extra_special_tokens"]
  roles = {}
  for name, value in named.items():
    own = name not in ROLES and not isinstance(value, str | dict)  # `add_bos_token` is not a token
    if value is not None and not own:
      roles[name] = _token(value, name, file)
      roles[name].special = True
  return roles


def _further(raw: dict[str, Any], file: Path) -> list[tokenizers.AddedToken]:
  """Control tokens without a role, under the newer name or else the older one."""
  newer = raw.get("extra_special_tokens")
  name = "extra_special_tokens" if newer else "additional_special_tokens"
  stated = raw.get(name)
  if stated is None or isinstance(stated, dict):
    return []
  if not isinstance(stated, list):
    raise ValueError(f"{file}: {fields.wrong(name, 'a list of tokens', stated)}")
  return [_token(value, name, file) for value in stated]


def _token(value: Any, name: str, file: Path) -> tokenizers.AddedToken:
  """A token, stated by its text or as an object with flags."""
  try:
    if isinstance(value, dict):
      flags = {flag: fields.flag(value, flag) for flag in FLAGS if flag in value}
      return tokenizers.AddedToken(fields.text({"content": ""} | value, "content"), **flags)
    return tokenizers.AddedToken(fields.text({name: value}, name), special=True)
  except ValueError as error:
    raise ValueError(f"{file}: {name}: {error}") from None
