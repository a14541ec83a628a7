"""Makes `goldens/FAMILY/`: tiny random checkpoints and what transformers computes from them.

`goldens/odd.npz` has logits alone: the weights of these models come from a seed.

python tests/models/make_goldens.py [FAMILY ...]      all, and the odd ones, by default
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import odd_models
import tiny_models

GOLDENS = Path(__file__).parent / "goldens"


def model(name: str, seed: int) -> torch.nn.Module:
  """A random model whose norms, biases and scalars do something too."""
  torch.manual_seed(seed)
  config = transformers.AutoConfig.for_model(**tiny_models.CONFIGS[name])
  config._attn_implementation = "eager"
  module = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      if parameter.ndim == 1 or name.endswith("bias"):
        parameter.add_(0.3 * torch.randn_like(parameter))
    for name, buffer in module.named_buffers():
      if name.endswith("layer_scalar"):
        buffer.add_(0.3 * torch.randn_like(buffer))
  return module


def logits(module: torch.nn.Module, tokens: list[int]) -> np.ndarray:
  """f32[T,V] logits after each token, computed without a cache."""
  with torch.no_grad():
    return module(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def greedy(module: torch.nn.Module, prompt: list[int], steps: int) -> list[int]:
  """The prompt and `steps` greedy tokens after it."""
  tokens = list(prompt)
  for _ in range(steps):
    tokens.append(int(logits(module, tokens)[-1].argmax()))
  return tokens


def main(names: list[str]) -> None:
  """Writes the goldens of these families."""
  for seed, name in enumerate(tiny_models.CONFIGS):
    if name not in names:
      continue
    module = model(name, seed)
    prompt = np.random.default_rng(seed).integers(128, size=tiny_models.PROMPT).tolist()
    tokens = greedy(module, prompt, tiny_models.STEPS)
    values = logits(module, tokens)
    gap = np.diff(np.sort(values[tiny_models.PROMPT - 1 :], axis=-1)[:, -2:]).min()
    print(f"{name}: largest logit {np.abs(values).max():.1f}, smallest gap {gap:.4f}")
    assert gap > 1e-3, "two tokens nearly tie: change the seed"
    folder = GOLDENS / name
    size = "40KB" if name == tiny_models.SHARDED else "10MB"
    module.save_pretrained(folder, max_shard_size=size)
    np.savez_compressed(folder / "golden.npz", tokens=np.int32(tokens), logits=values)


def odd() -> None:
  """Writes the logits of odd models."""
  with tempfile.TemporaryDirectory() as folder:
    values = {name: odd_models.judged(name, Path(folder) / name) for name in odd_models.CONFIGS}
  values = {name: logits[odd_models.PLACES] for name, logits in values.items()}
  np.savez_compressed(GOLDENS / "odd.npz", allow_pickle=False, **values)


if __name__ == "__main__":
  main(sys.argv[1:] or [*tiny_models.CONFIGS])
  if not sys.argv[1:]:
    odd()
