"""Throughput of `engram build-vocab`, statistics included, against a bare loop of `tokenizers.encode_batch`.

    python benchmarks/tokenize_throughput.py CORPUS… --tokenizer T [--rounds 1] [--out FILE.json]

The loop gets the same texts from memory, in batches of 1,000 documents, and throws the result away; ours reads the
files, tokenizes, writes the token cache, counts n-grams, measures collisions and writes the layout folder. They
alternate in this run: loop, ours, loop, ours, …, loop. Each runs in a process of its own, so that peak memory is its
own. Gate: both must count the same tokens. CPU time is given beside wall time because other programs share the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BARE = """
import json, resource, sys, time
from engram.builders.corpus import CorpusConfig, documents
from engram.builders.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
texts = [document.text for document in documents(CorpusConfig(tuple(sys.argv[2:])))]
wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
for i in range(0, len(texts), 1000):
    tokens += sum(map(len, tokenizer.encode_batch(texts[i : i + 1000], add_special_tokens=False)))
print(json.dumps({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "tokens": tokens,
                  "characters": sum(map(len, texts))}))
"""
OURS = """
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
from pathlib import Path
from engram.builders.build_vocab import BuildVocabConfig, build_vocab
from engram.builders.corpus import CorpusConfig
result = build_vocab(BuildVocabConfig(CorpusConfig(tuple(sys.argv[3:])), sys.argv[1], Path(sys.argv[2])))
names = ("tokens", "documents", "vocab_size", "compressed_size", "reduction", "distinct_ngrams", "rows_per_head",
         "rows_decided_by", "peak_rss_bytes")
print(json.dumps({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
                  **{name: result[name] for name in names},
                  "covered": {n: zipf["covered"] for n, zipf in result["zipf"].items()}}))
"""


def measure(code: str, *arguments: str, cache: Path) -> dict[str, Any]:
    """One run in a fresh process with an empty cache folder; what it printed."""
    environment = {**os.environ, "ENGRAM_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def compare(corpus: list[str], tokenizer: str, rounds: int) -> dict[str, Any]:
    """Alternate, check that both saw the same tokens, and relate the medians."""
    bare, ours = [], []
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as scratch:
        for number in range(rounds):
            bare.append(measure(BARE, tokenizer, *corpus, cache=Path(scratch)))
            print(f"loop {bare[-1]['wall_s']:.1f} s ({bare[-1]['cpu_s']:.1f} s CPU)", file=sys.stderr)
            out = Path(scratch) / f"layout-{number}"
            ours.append(measure(OURS, tokenizer, str(out), *corpus, cache=Path(scratch) / f"cache-{number}"))
            print(f"ours {ours[-1]['wall_s']:.1f} s ({ours[-1]['cpu_s']:.1f} s CPU)", file=sys.stderr)
        bare.append(measure(BARE, tokenizer, *corpus, cache=Path(scratch)))
        print(f"loop {bare[-1]['wall_s']:.1f} s ({bare[-1]['cpu_s']:.1f} s CPU)", file=sys.stderr)
    counted = {run["tokens"] for run in bare + ours}
    if len(counted) != 1:
        raise SystemExit(f"the two do not agree on the tokens: {sorted(counted)}")
    ratio = {
        name: statistics.median(run[name] for run in bare) / statistics.median(run[name] for run in ours)
        for name in ("wall_s", "cpu_s")
    }
    return {"throughput_ratio": ratio, "bare_loop": bare, "build_vocab": ours, "machine": machine()}


def machine() -> dict[str, Any]:
    """What the figures depend on, without names."""
    import numpy
    import tokenizers

    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "tokenizers": tokenizers.__version__,
    }


def main() -> None:
    """Parse the arguments, run, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tokenize_throughput.json")
    chosen = parser.parse_args()
    result = compare(chosen.corpus, chosen.tokenizer, chosen.rounds)
    text = json.dumps(result, indent=1) + "\n"
    chosen.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
