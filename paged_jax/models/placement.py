"""Where the parameters of a decoder lie on a mesh: tensor parallelism (Megatron-LM, arXiv 1909.08053, §3).

Projections to heads and to the inner size of an MLP are split by their outputs, and those back by
their inputs, so that a layer adds up its parts twice: after attention and after the MLP.

    # q k v, gate up    [out/4, in] on each of 4 devices     each makes its own heads or channels
    # o, down           [out, in/4]                          each makes a part of every sum
    # embedding, head   [V/4, E]                             each knows its own tokens
"""

from jax.sharding import Mesh, PartitionSpec

from paged_jax.models.config import DecoderConfig

# The axis, from the end, of a parameter that is split, by the end of its path.
_SPLIT = {
  ("q_proj", "weight"): 2, ("q_proj", "bias"): 1, ("q_b_proj", "weight"): 2,
  ("kv_b_proj", "weight"): 2, ("o_proj", "weight"): 1, ("self_attn", "sinks"): 1,
  ("gate_proj", "weight"): 2, ("up_proj", "weight"): 2, ("down_proj", "weight"): 1,
  ("experts", "gate_up_proj"): 1, ("experts", "gate_up_proj_bias"): 1, ("experts", "down_proj"): 2,
  ("embed_tokens", "weight"): 2, ("lm_head", "weight"): 2,
}  # fmt: skip
_KV = {  # split if the devices divide the KV heads; else every device makes them all
  ("k_proj", "weight"): 2, ("k_proj", "bias"): 1, ("v_proj", "weight"): 2, ("v_proj", "bias"): 1,
}  # fmt: skip


def spec(
  config: DecoderConfig, path: tuple, shape: tuple[int, ...], mesh: Mesh, axis: str
) -> PartitionSpec:
  """How a parameter at `path` is split over the `axis` of a mesh; whole if nothing divides it.

  Raises:
    ValueError: The devices do not divide the query heads.
  """
  ways = mesh.shape[axis]
  if config.num_heads % ways:
    raise ValueError(
      f"{ways} devices of mesh axis {axis!r} do not divide the {config.num_heads} query heads"
    )
  name = path[-2:]
  from_end = _SPLIT.get(name)
  if name in _KV:
    stack = path[1] if isinstance(path[1], int) else 0
    heads = config.layers[config.stacks[stack][0]].num_kv_heads
    from_end = None if heads % ways else _KV[name]
  if from_end is None or shape[-from_end] % ways:
    return PartitionSpec()
  return PartitionSpec(*[None] * (len(shape) - from_end), axis)
