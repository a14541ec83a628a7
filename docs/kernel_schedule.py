"""Draws kernel_schedule.png: what the TPU attention kernel fetches while it computes."""

import pathlib

import matplotlib.pyplot as plt

IDS, PAGES, COMPUTE = 2, 1, 0
BLOCKS = {"g": ("#4878a8", 3), "g+1": ("#d8853b", 2), "g+2": ("#6a9f58", 1)}


def main():
  """Writes the picture beside this file."""
  figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")

  def bar(lane, start, width, block, text):
    color = BLOCKS[block][0]
    axes.barh(lane, width - 0.06, left=start + 0.03, height=0.62, color=color, alpha=0.9)
    axes.text(start + width / 2, lane, text, ha="center", va="center", color="white", fontsize=9)

  bar(IDS, 0, 0.45, "g", "g")
  bar(PAGES, 0.5, 0.9, "g", "g 0")
  start = 1.4
  order = [(block, chunk) for block, (_, count) in BLOCKS.items() for chunk in range(count)]
  for i, (block, chunk) in enumerate(order):
    bar(COMPUTE, start + i, 1, block, f"{block}: chunk {chunk}")
    if i + 1 < len(order):
      following = order[i + 1]
      bar(PAGES, start + i, 0.9, following[0], f"{following[0]} {following[1]}")
  bar(IDS, start, 0.45, "g+1", "g+1")
  bar(IDS, start + BLOCKS["g"][1], 0.45, "g+2", "g+2")
  axes.set_yticks([IDS, PAGES, COMPUTE], ["table row by DMA", "pages by DMA", "compute"])
  axes.set_xlabel("time")
  axes.set_xticks([])
  axes.set_title("Each chunk is fetched while the one before it is computed, also across blocks")
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
  main()
