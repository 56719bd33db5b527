"""From the study's figures to docs/quantization.md, its picture, and results/quantization.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outcome import RESULTS, say

from engram.builders.atomic import write_whole
from engram.runtime import bench_report

NAMES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270M"}
DOMAINS = {"python": "Python documentation and source", "bible": "the King James Bible"}
WANTED = {"int8": 0.999, "nf4": 0.995, "q4_0": 0.995, "h4": 0.995, "h2": 0.97}  # share of the gain
LEVELS = (0.999, 0.995, 0.97)


def write(found: Mapping[str, Any], memories: Mapping[str, Any], page: Path) -> None:
    """The page, its picture beside it, and the JSON."""
    page.parent.mkdir(parents=True, exist_ok=True)
    studies = {name: {group: part for group, part in study.items() if group != "key"} for name, study in found.items()}
    content = {"machine": bench_report.machine(), "memories": _placeless(memories), "study": studies}
    bench_report.save_json(RESULTS / "quantization.json", content)
    picture(found, page.with_suffix(".png"))
    parts = [_head(found, memories, page.with_suffix(".png").name)]
    parts += [_memory(name, found[name], memories[name]) for name in found]
    write_whole(page, "\n\n".join(parts).encode() + b"\n")
    say(f"wrote {page}, {page.with_suffix('.png')} and {RESULTS / 'quantization.json'}")


def _placeless(value: Any) -> Any:
    """The same with paths cut to their last name: where files lay is nobody's business."""
    if isinstance(value, Mapping):
        return {key: _placeless(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_placeless(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _head(found: Mapping[str, Any], memories: Mapping[str, Any], image: str) -> str:
    rows = []
    for name, study in found.items():
        told, controls = memories[name], study["controls"]
        text = controls["text"]
        gain = text["backbone"] - text["float"]
        low, high = told["gain"]["ci95"]
        rows.append(
            f"| {title(told)} | {sum(told['rows'].values()):,} rows of {told['settings']['head_dim']} "
            f"| {text['tokens']:,} of {text['documents']} documents | {text['backbone']:.4f} "
            f"| {text['float']:.4f} | {gain:.4f} | {low:.4f} to {high:.4f} ({told['eval_tokens']:,} tokens) "
            f"| {controls['shuffled rows']['loss']:.4f} |"
        )
    return """# What tables in fewer bits cost

Made by `python benchmarks/memories.py WORK && python benchmarks/quantization_study.py WORK`. Real backbones, memories
made by this tool (`engram fill`, then `engram train`), text that neither tables nor training nor calibration have
seen. Everything is computed in float32 with the rows that an artifact would hold, bit for bit; intervals are 95 %,
from documents drawn with replacement. *Gain kept* is the share of the memory's gain over the backbone alone that is
left; KL is the divergence of the next-token distribution from that of the float model, in nats. Figures of real but
small models: they show the shape; for yours, run `engram quantize --gate`.

| memory | tables | compared tokens | backbone alone | float memory | gain, nats | the same, more text | shuffled rows |
|---|---|---|---|---|---|---|---|
""" + "\n".join(rows) + f"""

Where shuffled rows are better than the backbone alone, that part of the gain is in what all rows share, not in which
row is read.

![share of the gain kept, and KL divergence, against bits a value]({image})

## In short

{_short(found)}

## How few bits a memory tolerates

{_tolerance(found, memories)}"""


def _short(found: Mapping[str, Any]) -> str:
    """The figures that most people come for, over all memories."""
    lines = ["| codec | bits a value | gain kept, least to most of all memories | wanted | KL mean, least to most |"]
    lines.append("|---|---|---|---|---|")
    for codec in ("int8", "nf4", "q4_0", "h4", "h3", "h2", "h1"):
        arms = [study["codecs"][codec] for study in found.values()]
        kept = [100 * arm["gain_kept"]["share"] for arm in arms]
        kl = [arm["kl"]["mean"] for arm in arms]
        wanted = f"at least {100 * WANTED[codec]:g} %" if codec in WANTED else ""
        lines.append(
            f"| {codec} | {arms[0]['bits_per_value']:.2f} | {min(kept):.2f} to {max(kept):.2f} % | {wanted} "
            f"| {min(kl):.1e} to {max(kl):.1e} |"
        )
    sentences = []
    for plan in next(iter(found.values()))["mixed"]:
        pairs = [(study["mixed"][plan], study["codecs"]["nf4"]) for study in found.values()]
        ratio = [mixed["kl"]["mean"] / nf4["kl"]["mean"] for mixed, nf4 in pairs]
        kept = [100 * mixed["gain_kept"]["share"] for mixed, _ in pairs]
        bits = [mixed["bits_per_value"] for mixed, _ in pairs]
        sentences.append(
            f"- {plan} ({_span(bits, '.2f')} bits): {_span(kept, '.2f')} % of the gain, {_span(ratio, '.2f')} of nf4's "
            "KL divergence"
        )
    far = [study["grid"]["f32 x int8"]["kl"]["mean"] / study["codecs"]["h2"]["kl"]["mean"] for study in found.values()]
    return "\n".join(lines) + f"""

Mixed tables, all memories:

{chr(10).join(sentences)}

A backbone in int8 alone moves the next-token distribution {_span(far, ".0f")} times as far as tables in h2 (2.26 bits)
do: bits are better saved in the tables."""


def _span(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def title(told: Mapping[str, Any]) -> str:
    """A memory's name for people."""
    layers = ", ".join(map(str, told["settings"]["layers"]))
    return f"{NAMES[told['settings']['backbone']]}, {DOMAINS[told['settings']['domain']]}, layer {layers}"


def _tolerance(found: Mapping[str, Any], memories: Mapping[str, Any]) -> str:
    lines = ["| memory | " + " | ".join(f"keeps {100 * level:g} %" for level in LEVELS) + " |"]
    lines.append("|---" * (1 + len(LEVELS)) + "|")
    for name, study in found.items():
        arms = [(arm["bits_per_value"], codec, arm["gain_kept"]) for codec, arm in study["codecs"].items()]
        cells = []
        for level in LEVELS:
            good = [(bits, codec) for bits, codec, kept in arms if kept["share"] >= level]
            sure = [(bits, codec) for bits, codec, kept in arms if kept["ci95"][0] >= level]
            cells.append(f"{_least(good)}; {_least(sure)}")
        lines.append(f"| {title(memories[name])} | " + " | ".join(cells) + " |")
    words = "The smallest codec whose measured gain kept reaches a level; and the smallest whose whole interval does:"
    return words + "\n\n" + "\n".join(lines)


def _least(found: list[tuple[float, str]]) -> str:
    return "{1}, {0:.2f} bits".format(*min(found)) if found else "none"


def _memory(name: str, study: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    order = sorted(study["codecs"].items(), key=lambda item: (-item[1]["bits_per_value"], item[0]))
    parts = [f"## {title(told)}", _table("codec", dict(order), True)]
    controls = {key: value for key, value in study["controls"].items() if key != "text"}
    parts += ["Controls:", _table("instead of the tables", controls, False)]
    if "mixed" in study:
        parts += [
            "Mixed tables: every row has its codec, chosen by how often the text that made the memory reads it, and "
            "how far the gate opens:", _table("plan", study["mixed"], True),
            "\n".join(f"- {plan}: " + "; ".join(_classes(figures)) for plan, figures in study["mixed"].items()),
        ]  # fmt: skip
    if "grid" in study:
        parts += ["Tables and backbone together, against float tables on the float backbone:", _grid(study)]
    return "\n\n".join(parts)


def _classes(figures: Mapping[str, Any]) -> list[str]:
    return [
        f"layer {layer}: " + ", ".join(f"{c['rows']:,} rows {c['codec'] or 'dropped'}" for c in classes)
        for layer, classes in figures["classes"].items()
    ]


def _table(what: str, arms: Mapping[str, Any], sized: bool) -> str:
    bits = "bits a value | gate-weighted row error | " if sized else ""
    lines = [f"| {what} | {bits}change of loss, nats | gain kept | KL mean | KL p99 | top-1 the same |"]
    lines.append("|---" * (8 if sized else 6) + "|")
    for name, arm in arms.items():
        low, high = arm["change"]["ci95"]
        kept = arm["gain_kept"]
        size = ""
        if sized:
            errors = "/".join(f"{100 * e:.2f} %" for e in arm["row_error"].values())
            size = f"{arm['bits_per_value']:.2f} | {errors} | "
        lines.append(
            f"| {name} | {size}{arm['change']['nll']:+.6f} ({low:+.6f} to {high:+.6f}) | {100 * kept['share']:.2f} % "
            f"({100 * kept['ci95'][0]:.2f} to {100 * kept['ci95'][1]:.2f}) | {arm['kl']['mean']:.2e} "
            f"| {arm['kl']['p99']:.2e} | {100 * arm['top1']:.2f} % |"
        )
    return "\n".join(lines)


def _grid(study: Mapping[str, Any]) -> str:
    kinds = list(dict.fromkeys(name.split(" x ")[1] for name in study["grid"]))
    tables = list(dict.fromkeys(name.split(" x ")[0] for name in study["grid"]))
    lines = ["| tables | " + " | ".join(f"backbone {kind}: loss, nats (KL)" for kind in ("float", *kinds)) + " |"]
    lines.append("|---" * (2 + len(kinds)) + "|")
    text = study["controls"]["text"]
    for codec in tables:
        if codec == "f32":
            cells = [f"{text['float']:.5f}"]
        elif codec == "none":
            cells = [f"{text['backbone']:.5f}"]
        else:
            cells = [f"{study['codecs'][codec]['loss']:.5f} ({study['codecs'][codec]['kl']['mean']:.1e})"]
        for kind in kinds:
            arm = study["grid"][f"{codec} x {kind}"]
            cells.append(f"{arm['loss']:.5f} ({arm['kl']['mean']:.1e})")
        lines.append(f"| {'no memory' if codec == 'none' else codec} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Share of the gain that is kept, and KL, against bits a value; a mark each, codecs named above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    colours = ["#1b5e9e", "#d1495b", "#2a9d5c", "#8a5fbf", "#c78a00"]
    names: dict[float, dict[str, None]] = {}  # codecs by their bits, those of about as many together
    for place, (colour, study) in enumerate(zip(colours, found.values(), strict=False)):
        aside = 1 + 0.012 * (place - (len(found) - 1) / 2)  # so that intervals do not hide one another
        for group, mark in (("codecs", "o"), ("mixed", "D")):
            for label, arm in study.get(group, {}).items():
                kept, bits = arm["gain_kept"], arm["bits_per_value"]
                left.plot([bits * aside] * 2, [100 * end for end in kept["ci95"]], color=colour, alpha=0.4, linewidth=1)
                left.plot(bits * aside, 100 * kept["share"], mark, color=colour, markersize=4)
                right.plot(bits * aside, arm["kl"]["mean"], mark, color=colour, markersize=4)
                if group == "codecs":
                    near = next((known for known in names if 0.9 < known / bits < 1.1), bits)
                    names.setdefault(near, {})[label] = None
    for colour, name in zip(colours, found, strict=False):
        left.plot([], [], "o", color=colour, label=name)
    left.axhline(100, color="#888888", linewidth=0.8)
    left.set(ylabel="share of the memory's gain kept, %; lines: 95 % intervals")
    right.set(ylabel="KL divergence from the float model, nats", yscale="log")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="bits a value (diamonds: mixed tables)")
        axis.set_xticks([1, 2, 3, 4, 6, 8, 16], ["1", "2", "3", "4", "6", "8", "16"])
        axis.grid(True, which="major", alpha=0.3)
        above = axis.secondary_xaxis("top")
        above.set_xticks(list(names), ["\n".join(alike) for alike in names.values()], fontsize=7)
        above.minorticks_off()
    left.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
