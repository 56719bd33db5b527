"""The picture of a corpus's statistics: how few n-grams make most lookups, and how many share their rows."""

from __future__ import annotations

import io
from typing import Any


def draw(statistics: dict[str, Any]) -> bytes:
    """A PNG of 1600 x 640 pixels: the Zipf curve of every order, and the collision shares of every head."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    curve, bars = figure.subplots(1, 2)
    for order, zipf in statistics["zipf"].items():
        curve.plot(zipf["curve"]["rank"], [100 * share for share in zipf["curve"]["share"]], label=f"{order}-grams")
    curve.set(
        xscale="log", xlabel="most frequent n-grams", ylabel="% of lookups", ylim=(0, 101), title="Lookups covered"
    )
    curve.grid(alpha=0.3)
    curve.legend()
    collisions = statistics["collisions"]["orders"]
    for place, (order, result) in enumerate(collisions.items()):
        heads = result["heads"]
        for step, (name, word) in enumerate((("share_of_distinct", "distinct"), ("share_of_lookups", "lookups"))):
            at = [head + 0.8 * (place * 2 + step) / (2 * len(collisions)) for head in range(len(heads))]
            bars.bar(
                at, [100 * head[name] for head in heads], width=0.75 / (2 * len(collisions)), align="edge",
                label=f"{order}-grams, {word}", color=f"C{place}", alpha=1.0 if step == 0 else 0.5,
            )  # fmt: skip
    bars.set(xlabel="head", ylabel="% sharing a row", ylim=(0, 101), title="Collisions")
    bars.set_xticks(range(len(next(iter(collisions.values()))["heads"])))
    bars.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()
