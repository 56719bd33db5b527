"""A text's gates as one HTML file: no script, nothing from elsewhere, read by pointing, by Tab, or as a table."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from typing import Any

from engram.runtime.gates_scale import share

_STEPS = "".join(f".a{n}{{--all:{n / 100:g}}}.f{n}{{--fit:{n / 100:g}}}" for n in range(101))
_STYLE = (
    """
:root { --ground: #ffffff; --raised: #f3f4f6; --ink: #16181d; --soft: #50555f; --line: #9aa0ab; --link: #0b57b0;
  --heat: #f5a524; --bar: #a85b00; }
@media (prefers-color-scheme: dark) { :root { --ground: #14161a; --raised: #1f2329; --ink: #f1f2f4; --soft: #b4bac4;
  --line: #6f7785; --link: #8ab8ff; --heat: #a65200; --bar: #ffb454; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1rem 12rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.6 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; margin: 0 0 .5rem; }
h2 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
h2 small { color: var(--soft); font-weight: normal; font-size: .85rem; margin-left: .5rem; }
a { color: var(--link); }
dl { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: 0 0 .75rem; font-size: .9rem; }
dl div { display: flex; gap: .4rem; }
dt { color: var(--soft); white-space: nowrap; }
dd { margin: 0; }
fieldset { border: 1px solid var(--line); border-radius: .4rem; font-size: .9rem; }
legend { color: var(--soft); padding: 0 .3rem; }
label { margin-right: 1rem; display: inline-block; }
.scale { display: inline-block; width: 8rem; height: .9rem; border: 1px solid var(--line); vertical-align: middle;
  background: linear-gradient(to right, transparent, color-mix(in srgb, var(--heat) 85%, transparent)); }
.text { white-space: pre-wrap; margin: 0; font-size: 1.1rem; line-height: 1.9; }
mark { --open: var(--all); color: inherit; padding: .1em 0; cursor: default; print-color-adjust: exact;
  background: color-mix(in srgb, var(--heat) calc(var(--open) * 85%), transparent);
  box-shadow: inset 0 calc(var(--open) * -3px) 0 var(--bar); }
body:has(#fit:checked) mark { --open: var(--fit); }
mark.part { display: inline-block; width: .5em; height: 1.2em; vertical-align: text-bottom; }
mark:hover, mark:focus { outline: 2px solid var(--link); outline-offset: 1px; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.tip { display: none; position: fixed; left: 0; right: 0; bottom: 0; z-index: 1; max-height: 11rem; overflow-y: auto;
  padding: .6rem 1rem; background: var(--raised); border-top: 2px solid var(--line); white-space: pre-wrap;
  font-size: .9rem; line-height: 1.5; user-select: none; }
mark:focus > .tip { display: block; }
mark:hover > .tip { display: block; z-index: 2; }
.tip b { color: var(--soft); font-weight: 600; }
.box { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; overflow-wrap: normal; white-space: nowrap; padding: .2rem .8rem .2rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td code { white-space: pre; }
code { font: .95em ui-monospace, monospace; }
"""
    + _STEPS
    + "\n"
)


def page(result: dict[str, Any]) -> str:
    """The whole file, of the object of `engram gates --json`."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    layers = result["layers"]
    facts = {
        "package": result["package"], "backbone": f"{result['backbone']}, through {result['engine']}",
        "layers": ", ".join(layers), "n-grams": ", ".join(map(str, result["orders"])),
        "rows in": ", ".join(result["codecs"]), "tokens": f"{len(result['tokens']):,}",
    }  # fmt: skip
    listed = "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    fit = result["scale"] == "fit"
    blocks = "\n".join(_layer(result, name) for name in layers)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{digest}'; form-action 'none'; base-uri 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Gates: {_text(result["package"])}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>How far the gates open</h1>
<dl>{listed}</dl>
<fieldset><legend>Colour: how far the gate opens at a token</legend>
<label><input type="radio" name="scale" id="full"{"" if fit else " checked"}> 0 % <span class="scale"></span> 100 %</label>
<label><input type="radio" name="scale" id="fit"{" checked" if fit else ""}> lowest <span class="scale"></span> highest of each layer</label>
</fieldset>
<p>Point at a token, or move to one with Tab, to see its n-grams, rows and codec. <a href="#table">All figures as a table</a></p>
<main>
{blocks}
<h2 id="table">All figures</h2>
{_table(result)}
</main>
</body>
</html>
"""  # noqa: E501 (the lines of the page)


def _layer(result: dict[str, Any], name: str) -> str:
    """The text, coloured by one layer's gate."""
    figures = result["layers"][name]
    marks = "".join(_mark(note, name, number, figures) for number, note in enumerate(result["tokens"]))
    words = f"mean {_percent(figures['mean'])}, {_percent(figures['lowest'])} to {_percent(figures['highest'])}"
    return (
        f'<section aria-labelledby="layer-{name}"><h2 id="layer-{name}">Layer {name}<small>{words}</small></h2>\n'
        f'<div class="text" dir="auto">{marks}</div></section>'
    )


def _mark(note: dict[str, Any], name: str, number: int, figures: dict[str, Any]) -> str:
    """One token with what lies behind it."""
    value, tip = note["gates"][name], f"t{name}-{number}"
    fitted = share(value, figures["lowest"], figures["highest"])
    grams = "  ".join(map(_quoted, note["ngrams"])) or "none: the text begins here"
    behind = (
        f"<b>Token</b> <code>{_quoted(note['token'])} ({note['id']})</code>  <b>gate of layer {name}</b> "
        f"{_percent(value)}\n<b>N-grams</b> <code>{grams}</code>\n"
        f"<b>Rows</b> <code>{' '.join(map(str, note['rows'][name]))}</code>  "
        f"<b>codec</b> <code>{_text(note['codec'])}</code>"
    )
    part = "" if note["text"] else " part"  # of a character that an earlier token shows, or what begins a text
    return (
        f'<mark class="a{round(100 * value)} f{round(100 * fitted)}{part}" tabindex="0" aria-describedby="{tip}">'
        f'{_text(note["text"])}<span class="tip" role="tooltip" id="{tip}">{behind}</span></mark>'
    )


def _table(result: dict[str, Any]) -> str:
    names = list(result["layers"])
    head = "".join(f'<th scope="col">layer {name}</th>' for name in names)
    lines = "".join(
        f"<tr><td>{number}</td><td><code>{_quoted(note['token'])}</code></td><td>{note['id']}</td>"
        + "".join(f"<td>{_percent(note['gates'][name])}</td>" for name in names)
        + f"<td><code>{'  '.join(map(_quoted, note['ngrams']))}</code></td></tr>\n"
        for number, note in enumerate(result["tokens"])
    )
    return (
        f'<div class="box" tabindex="0" role="region" aria-labelledby="table"><table><thead><tr><th scope="col">'
        f'place</th><th scope="col">token</th><th scope="col">id</th>{head}<th scope="col">n-grams</th></tr></thead>'
        f"<tbody>\n{lines}</tbody></table></div>"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _quoted(text: str) -> str:
    return _text(json.dumps(text, ensure_ascii=False))


def _text(text: str) -> str:
    """Any text as HTML that shows it and does nothing; control characters, which HTML forbids, become U+FFFD."""
    kept = (c if c in "\n\t" or c >= " " and not "\x7f" <= c <= "\x9f" else "\ufffd" for c in text)
    return escape("".join(kept), quote=True)
