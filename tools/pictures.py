"""Draws the pictures of docs/ that come from results in bench/results/:

    PYTHONPATH=. python tools/pictures.py

docs/bytes.png: what a rank sends in a step, from train_bytes.json, which `make train` writes.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS, OTHERS = "#0072B2", "#A6A6A6"


def bytes_of_a_step(summary: dict, path: Path) -> None:
    """A bar chart of the bytes that each method's ranks send, the fewest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(summary["methods"], key=lambda row: row["bytes_sent_per_step"])
    sent = [row["bytes_sent_per_step"] / 1e6 for row in rows]
    figure, axes = pyplot.subplots(figsize=(7.2, 0.42 * len(rows) + 0.9))
    is_vote = [row["method"] in ("majority", "average") for row in rows]
    colors = [OURS if votes else OTHERS for votes in is_vote]
    bars = axes.barh([row["label"] for row in rows], sent, color=colors)
    axes.bar_label(bars, [f"{each:.2f} MB" for each in sent], padding=4)
    axes.invert_yaxis()
    axes.set_title(
        f"Sent by a rank in one step, {summary['parameters'] / 1e6:.1f}M parameters, "
        f"{summary['ranks']} ranks",
        loc="left",
        fontsize=11,
    )
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    figure.savefig(path, dpi=160, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    results = ROOT / "bench" / "results" / "train_bytes.json"
    bytes_of_a_step(json.loads(results.read_text()), ROOT / "docs" / "bytes.png")
