"""Draws roofline_*.png: what the TPU kernel can reach on each generation, by the compiler's bundles.

Reads `benchmarks/results/kernels_tpu_aot-jax0.10.2.json`. The clock is that at which a core's four
matrix units reach its published peak.
"""

import json
import pathlib

import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results" / "kernels_tpu_aot-jax0.10.2.json"
# generation: bfloat16 FLOP/s and bytes/s of one core, as published by Google, side of a matrix unit
CHIPS = {
  "v5e": (197e12, 819e9, 128),
  "v6e": (918e12, 1.64e12, 256),
  "tpu7x": (1153e12, 3.69e12, 256),
}
GROUP, TOKENS, BYTES = 4, 2048, 4096  # Llama-3-8B: heads of a KV head, bytes of a token and layer


def main():
  """Writes the pictures beside this file."""
  rows = json.loads(RESULTS.read_text())["rows"]
  for name, (peak, bandwidth, side) in CHIPS.items():
    clock = peak / (4 * 2 * side**2)
    mine = [row for row in rows if row["tpu"] == name and row["what"] == "block"]
    draw(name, peak, bandwidth, clock, mine)


def draw(name: str, peak: float, bandwidth: float, clock: float, blocks: list[dict]):
  """One generation."""
  figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
  ridge = peak / bandwidth
  axes.plot([1, ridge, 2000], [bandwidth / 1e12, peak / 1e12, peak / 1e12], color="#888888")
  axes.text(12, 4 * bandwidth / 1e12, f"memory, {bandwidth / 1e12:.2f} TB/s", color="#666666")
  axes.text(
    2000, peak / 1e12 * 1.2, f"peak, {peak / 1e12:.0f} TFLOP/s", color="#666666", ha="right"
  )
  for row in blocks:
    per_byte = GROUP * row["queries"]
    flops = per_byte * TOKENS * BYTES
    issue = flops / (row["bundles_2048"] / clock) / 1e12
    found = min(issue, per_byte * bandwidth / 1e12)
    axes.plot(per_byte, issue, "o", mfc="none", color="#d8853b")
    axes.plot(per_byte, found, "o", color="#4878a8")
    axes.annotate(str(row["queries"]), (per_byte, found), (4, -13), textcoords="offset points")
  axes.plot([], [], "o", color="#4878a8", label="with memory; the number: tokens of a block")
  axes.plot([], [], "o", mfc="none", color="#d8853b", label="instructions alone")
  axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of keys and values", ylabel="TFLOP/s")
  axes.set_ylim(top=10 * peak / 1e12)
  axes.set_title(f"{name}, one core at {clock / 1e9:.2f} GHz: Llama-3-8B heads, pages of 64")
  axes.legend(loc="upper left", frameon=False)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  figure.savefig(HERE / f"roofline_{name}.png", dpi=110)


if __name__ == "__main__":
  main()
