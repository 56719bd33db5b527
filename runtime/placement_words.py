"""A placement plan in sentences, and what would make one fit that does not."""

from __future__ import annotations

from typing import Any

_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
_SMALLER = {"int8": 8.5, "int4": 4.5}  # `engram quantize --backbone`: bits a value, scales included


def words_of(result: dict[str, Any]) -> list[str]:
    """The plan in a few sentences."""
    held, own = result["resident"], result["codecs"][0]
    share = percent(own["cached_share"])
    if result["fits"] is False:
        need = sum(part["bytes"] or 0 for part in result["parts"][:2])
        room = result["ram_bytes"] + result["vram_bytes"]
        out = [f"Does not fit: {result['parts'][1]['part']} and KV cache need {_size(need)}, RAM and VRAM have "
               f"{_size(room)} together.",
               f"What would help: {'; or '.join(result['would_fit'])}. Another codec for the tables would not: they "
               "stay on the disk."]  # fmt: skip
    else:
        start = "It fits" if result["fits"] else "As far as sizes are known it fits"
        taken = f"{_size(held['ram_bytes'])} of RAM"
        taken += f" and {_size(held['vram_bytes'])} of VRAM are taken" if held["vram_bytes"] else " are taken"
        if result["parts"][-1]["place"] == "ram":
            out = [f"{start}: {taken}, tables included; reading them at the start spares every cold read."]
        else:
            out = [f"{start}: {taken}. The {_size(held['cache_bytes'])} of RAM left can hold {share} of the tables in "
                   "the page cache."]  # fmt: skip
    many = "a token's row is one read" if own["reads_per_token"] == 1 else f"a token is {own['reads_per_token']} reads"
    span = " to ".join(dict.fromkeys(map(_ms, own["cold_ms_per_1000"])))
    out.append(f"As stored {many} of the disk: {_ms(own['cold_ms_per_token'])} cold, "
               f"{_ms(own['cached_ms_per_token'])} from pages that are cached but new to the process, "
               f"{_ms(own['warm_ms_per_token'])} warm. 1,000 tokens of prompt take {span} cold and "
               f"{_ms(own['warm_ms_per_1000'])} warm.")  # fmt: skip
    small = next((entry for entry in result["codecs"][1:] if entry["codec"] == "nf4"), own)
    if small["disk_bytes"] < own["disk_bytes"]:
        more = "" if own["cached_share"] == 1 else f", the page cache can hold {percent(small['cached_share'])}"
        out.append(f"As nf4 the tables take {_size(small['disk_bytes'])} instead of {_size(own['disk_bytes'])}{more}. "
                   "In a table file of ours a cold row is one read with every codec: a smaller one saves room, not "
                   "waiting.")  # fmt: skip
    return out


def would_fit(plan: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What would make a plan fit that does not; `found` is what `engram inspect` says of the model."""
    cache, weights = (part["bytes"] or 0 for part in plan["parts"][:2])
    room = plan["ram_bytes"] + plan["vram_bytes"]
    over = cache + weights - room
    out = []
    if cache > over and (context := (cache - over) * plan["context"] // cache) > 0:
        out.append(f"--context {context}")
    bits = _BITS.get(found.get("backbone", {}).get("type", ""), 0)
    for kind, fewer in _SMALLER.items() if bits else ():
        if weights * fewer / bits + cache <= room:
            out.append(f"engram quantize --backbone {kind} (about {_size(weights * fewer / bits)})")
            break
    return [*out, f"{_size(over)} more RAM or VRAM"]


def _size(number: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number:.0f} bytes"


def _ms(milliseconds: float) -> str:
    if milliseconds >= 1e4:
        return f"{milliseconds / 1e3:,.0f} s"
    if milliseconds >= 10:
        return f"{milliseconds:,.0f} ms"
    return f"{milliseconds:.2g} ms" if milliseconds >= 0.1 else f"{1e3 * milliseconds:.2g} µs"


def percent(share: float) -> str:
    """A share for people: `8 %`."""
    return f"{100 * min(1.0, share):.0f} %" if share >= 0.01 or share == 0 else f"{100 * share:.1g} %"
