"""`engram convert` on a large published table: memory, speed against `cp`, and going on after a kill.

    python benchmarks/convert_stream.py [--gib 8] [--folder FOLDER] [--in-place] [--rounds 2] [--out FILE.json]

A checkpoint in DeepSeek-V4.1's layout: one layer, fp8 rows of 256 values and their scales in two tensors, random bytes,
not sparse. In turns, each with the page cache emptied of the checkpoint (proven by mincore) and nothing left to write:
`cp` of its file, then an fsync of the copy; and the command in a process of its own from its start to its exit (its
files are fsynced), its resident memory sampled. Then the command is killed (SIGKILL) when its journal says that half of
the rows are on the disk, started again, and its table compared with that of an uninterrupted run by SHA-256. Random
rows are compared with the source byte for byte. Needs two and a half times the table on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from outcome import Target, arguments, finish, say
from quantize_stream import COMMAND, OFTEN, Run, make_cold, sha256
from tokenizers import Tokenizer, models

from engram.builders.atomic import MARK
from engram.builders.families.known import find_published
from engram.builders.fetch import cache_folder
from engram.builders.hash_constants import prime_moduli
from engram.quantize.foreign_rows import ForeignRows
from engram.quantize.package import open_package

WIDTH, LAYER, ORDERS, HEADS = 256, 1, 3, 8
_BLOCK = 1 << 16  # rows


def make_checkpoint(folder: Path, gib: float, seed: int) -> Path:
    """The published checkpoint; the file that holds its table."""
    folder.mkdir()
    base = int(gib * 2**30) // (264 * ORDERS * HEADS)
    rows = sum(map(sum, prime_moduli([LAYER], [base] * ORDERS, HEADS)[LAYER]))
    text = {
        "engram_layer_ids": [LAYER], "engram_num_embeddings": [rows], "engram_max_ngram_size": ORDERS + 1,
        "engram_vocab_size": base, "engram_n_heads": HEADS, "engram_head_dim": WIDTH, "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 26, "hidden_size": 32, "hc_mult": 2, "vocab_size": 26,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text}))
    letters = {chr(ord("a") + i): i for i in range(26)}
    Tokenizer(models.WordLevel(letters, unk_token="a")).save(str(folder / "tokenizer.json"))
    start, streams, wide = f"layers.{LAYER}.engram.", 2, ORDERS * HEADS * WIDTH
    shapes = {
        start + "embed.weight": ("F8_E4M3", [rows, WIDTH]), start + "embed.scale": ("F8_E8M0", [rows, 8]),
        start + "wkv.weight": ("F8_E4M3", [32 * (streams + 1), wide]),
        start + "q_weight": ("BF16", [streams, 32]), start + "k_weight": ("BF16", [streams, 32]),
    }  # fmt: skip
    header, reached = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = shape[0] * shape[1] * (2 if dtype == "BF16" else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [reached, reached + size]}
        reached += size
    words = json.dumps(header).encode()
    generator = np.random.Generator(np.random.SFC64(seed))
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name, (dtype, shape) in shapes.items():
            for first in range(0, shape[0], _BLOCK):
                count = min(_BLOCK, shape[0] - first)
                block = generator.integers(0, 256, (count, shape[1] * (2 if dtype == "BF16" else 1)), dtype=np.uint8)
                block &= 0x77 if dtype == "F8_E4M3" else 0xFF  # no NaN
                file.write((block if name.endswith("weight") else block // 64 + 118).data)
    return path


def copy_with_cp(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp`, and until the copy is on the disk."""
    make_cold(source)
    begin = time.monotonic()
    subprocess.run(["cp", str(source), str(target)], check=True)
    copied = time.monotonic() - begin
    with target.open("rb") as file:
        os.fsync(file.fileno())
    synced = time.monotonic() - begin
    target.unlink()
    return copied, synced


def noted(folder: Path) -> int:
    """Bytes of rows that the unfinished run says are done."""
    try:
        note = json.loads((folder / "out.partial" / MARK).read_bytes())["notes"][str(LAYER)]
        return int(note["rows"]) * 264 if "rows" in note else int(note["map"]["blocks"]) * 4096
    except (OSError, KeyError):
        return 0


def equal_rows(source: Path, package: Path, seed: int) -> int:
    """Random rows compared byte for byte, the first and the last among them; how many."""
    rows = ForeignRows.of(find_published(source)[0].tables[0])
    wanted = np.random.default_rng(seed).integers(0, rows.rows, 20_000)
    wanted[:2] = 0, rows.rows - 1
    with open_package(package) as opened:
        table: Any = opened.layers[LAYER]
        if not np.array_equal(table.gather(wanted), rows.read_rows(wanted)):
            raise SystemExit("a row of the package is not the source's")
    return len(wanted)


def measure(chosen: argparse.Namespace) -> list[Target]:
    """Every line, printed and written."""
    gib = 0.5 if chosen.quick else chosen.gib
    chosen.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="engram-convert-", dir=chosen.folder) as name:
        folder = Path(name)
        say(f"making a table of {gib:g} GiB")
        source = make_checkpoint(folder / "published", gib, chosen.seed)
        wanted = ["convert", str(folder / "published"), *(["--in-place"] if chosen.in_place else [])]
        copies, synced, ours, peaks, whole, report = [], [], [], [], "", {}
        for number in range(1 if chosen.quick else chosen.rounds):
            make_cold(source)
            run = Run(COMMAND, folder, wanted)
            found = run.wait()
            assert found is not None
            report = found
            ours.append(run.seconds)
            peaks.append(run.peak_bytes)
            compared = equal_rows(folder / "published", folder / "out", chosen.seed)
            (table,) = (folder / "out" / "tables").iterdir()
            whole, name_ = sha256(table), table.name
            shutil.rmtree(folder / "out")
            seconds = copy_with_cp(source, folder / "copy")
            copies.append(seconds[0])
            synced.append(seconds[1])
            say(f"round {number + 1}: convert {ours[-1]:.2f} s, cp {copies[-1]:.2f} s, {synced[-1]:.2f} s with fsync, "
                f"{peaks[-1] / 2**20:.0f} MiB resident")  # fmt: skip
        make_cold(source)
        killed = Run(OFTEN, folder, wanted)
        if killed.wait(stop=lambda: noted(folder) * 2 >= report["bytes"]) is not None:
            raise SystemExit("the command ended before it could be killed: take a larger --gib")
        kept = noted(folder) / report["bytes"]
        again = Run(COMMAND, folder, wanted)
        again.wait()
        went_on = "going on at" in again.said
        same = sha256(folder / "out" / "tables" / name_) == whole
        say(f"killed at {kept:.0%}, again {again.seconds:.2f} s: {again.said.strip()}")
    peak = max(*peaks, killed.peak_bytes, again.peak_bytes)
    speed = statistics.median(copies) / statistics.median(ours)
    of = f"convert{' --in-place' if chosen.in_place else ''}, {gib:g} GiB"
    targets = [
        Target(f"{of}: most resident memory, MiB", "<= 1024", peak / 2**20),
        Target(f"{of}: speed against cp (not synced)", ">= 0.7", speed),
        Target(f"{of}: killed and started again, the same file (1 is yes)", ">= 1", float(same)),
        Target(f"{of}: killed and started again, went on where it was (1 is yes)", ">= 1", float(went_on)),
    ]
    method = {"gib": gib, "in_place": chosen.in_place, "width": WIDTH, "rounds": len(ours), "words": __doc__}
    results = {
        "convert_s": ours, "cp_s": copies, "cp_and_fsync_s": synced, "peak_resident_bytes": peaks,
        "bytes": report["bytes"], "million_bytes_per_second": report["bytes"] / statistics.median(ours) / 1e6,
        "killed_at_share": kept, "rest_s": again.seconds, "rows_compared": compared, "sha256": whole,
    }  # fmt: skip
    return finish("convert_stream" + ("_in_place" if chosen.in_place else ""), chosen, targets, method, results)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--gib", type=float, default=8.0, help="size of the table")
    parser.add_argument("--folder", type=Path, default=cache_folder(), help="on the disk that is measured")
    parser.add_argument("--in-place", action="store_true", help="map the rows instead of copying them")
    parser.add_argument("--rounds", type=int, default=2)
    measure(parser.parse_args())
