"""Everything that the table of targets asks for, in one run: prints it with what was met and what was missed.

    python benchmarks/targets.py [--quick] [--only rows_kernels,rows_disk,hash_decode] [--plot FILE.png]

Each part runs in a process of its own, so that none measures in the memory that another left behind, and writes its
JSON file to results/ (with --quick: nowhere). The Triton lines are tests: tests/test_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from outcome import RESULTS, Target, say, show

PARTS = ("rows_kernels", "rows_disk", "hash_decode", "encode_rows", "quantize_stream")
HERE = Path(__file__).resolve().parent


def run(name: str, options: list[str], out: Path) -> list[Target]:
    """One script; the targets that it wrote. A script that fails is one target without a value."""
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out), *options]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    if done.returncode:
        return [Target(name, ">= 0", None, f"the script ended with {done.returncode}; see its words above")]
    found = json.loads(out.read_text())["targets"]
    return [Target(target["what"], target["bound"], target["value"], target["note"]) for target in found]


def main() -> None:
    """Parse the arguments, run the parts one after another, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tables, few rounds: shows that everything runs")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--plot", type=Path, help="draw the rows of a file, warm and cold, into this PNG")
    chosen = parser.parse_args()
    targets: list[Target] = []
    with tempfile.TemporaryDirectory(prefix="engram-targets-") as folder:
        for name in chosen.only.split(","):
            if name not in PARTS:
                raise SystemExit(f"error: part {name!r} is not known; use some of: {', '.join(PARTS)}")
            options = ["--quick"] if chosen.quick else []
            if name == "rows_disk" and chosen.plot is not None:
                options += ["--plot", str(chosen.plot.resolve())]
            say(f"== {name}")
            targets += run(name, options, (Path(folder) if chosen.quick else RESULTS) / f"{name}.json")
    show(targets)
    counts = [sum(target.met is state for target in targets) for state in (True, False, None)]
    words = " (quick: no figures)" if chosen.quick else ""
    say(f"{counts[0]} met, {counts[1]} missed, {counts[2]} not measured{words}")
    raise SystemExit(any(target.what in PARTS for target in targets))  # a script that failed


if __name__ == "__main__":
    main()
