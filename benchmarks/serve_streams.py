"""Eight streams at once against one over a real socket, and a soak with random cancels.

    python benchmarks/serve_streams.py [--package PKG | --torch] [--soak MINUTES]

By default SmolLM2-135M as a Q4_1 GGUF through llama.cpp, with two layers of random rows on disk. Clients and
server share this machine's cores. Rounds of one stream and of eight alternate; figures are the clients'.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import outcome
import psutil
from outcome import Target, say
from scratch_model import write_gguf_package, write_package

from engram.builders.fetch import SMOLLM2_GGUF
from engram.quantize.package import open_package

STREAMS, ROUNDS, TOKENS, PROMPT_WORDS = 8, 5, 64, 60
ROOT = Path(__file__).resolve().parents[1]


def start(package: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """The server as a user starts it, and its port."""
    words = [sys.executable, "-m", "engram.cli.main", "serve", str(package), "--port", "0", "--slots", str(STREAMS)]
    child = subprocess.Popen([*words, *options], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if found := re.search(r"serving .* at http://.*:(\d+)$", line.strip()):
            threading.Thread(target=child.stderr.read, daemon=True).start()
            return child, int(found[1])
    raise RuntimeError("the server did not start")


def write(port: int, prompt: str, tokens: int, most: int | None = None) -> list[float]:
    """Ask for one stream; when it was asked and when each token came. Hangs up after `most` tokens."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    times = [time.perf_counter()]
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "logprobs": 0}
    try:
        line.request("POST", "/v1/completions", json.dumps(body))
        response = line.getresponse()
        if response.status != 200:
            response.read()
            return times
        while part := response.readline():
            if part.startswith(b'data: {') and b'"tokens": [' in part:
                times.append(time.perf_counter())
                if most is not None and len(times) > most:
                    break
    finally:
        line.close()
    return times


def prompts(count: int, seed: int) -> list[str]:
    """Stretches of this project's own documents."""
    words = " ".join(path.read_text("utf-8") for path in sorted(ROOT.glob("*.md"))).split()
    draw = random.Random(seed)
    begins = [draw.randrange(len(words) - PROMPT_WORDS) for _ in range(count)]
    return [" ".join(words[begin : begin + PROMPT_WORDS]) for begin in begins]


def at_once(port: int, count: int, tokens: int, seed: int) -> dict[str, Any]:
    """`count` streams at once: tokens a second of all, and every latency."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda prompt: write(port, prompt, tokens), prompts(count, seed)))
    took = time.perf_counter() - begun
    decoding = max(times[-1] for times in found) - max(times[1] for times in found)
    first = max(times[1] for times in found)
    return {
        "tokens_per_second": sum(len(times) - 1 for times in found) / took,
        "decode_tokens_per_second": sum(sum(t > first for t in times) for times in found) / max(decoding, 1e-9),
        "first": [times[1] - times[0] for times in found],
        "between": [b - a for times in found for a, b in zip(times[1:], times[2:], strict=False)],
    }


def percentile(values: list[float], share: float) -> float:
    """In milliseconds."""
    ordered = sorted(values)
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def compare(port: int, rounds: int, tokens: int) -> dict[str, Any]:
    """One stream and eight, in turn."""
    at_once(port, 1, 8, 999)
    runs: dict[int, list[dict[str, Any]]] = {1: [], STREAMS: []}
    for number in range(rounds):
        for count in runs:
            runs[count].append(at_once(port, count, tokens, 100 * number + count))
    results = {}
    for count, found in runs.items():
        first, between = ([t for run in found for t in run[name]] for name in ("first", "between"))
        results[str(count)] = {
            **{n: median(run[n] for run in found) for n in ("tokens_per_second", "decode_tokens_per_second")},
            "first_token_ms": {"p50": percentile(first, 0.5), "p99": percentile(first, 0.99)},
            "inter_token_ms": {"p50": percentile(between, 0.5), "p99": percentile(between, 0.99)},
        }
    for name in ("tokens_per_second", "decode_tokens_per_second"):
        ratios = [many[name] / one[name] for one, many in zip(runs[1], runs[STREAMS], strict=True)]
        results[f"ratio_{name}"] = median(ratios)
    return results


def soak(child: subprocess.Popen[str], port: int, minutes: float, seed: int) -> dict[str, Any]:
    """Random requests, half of them hung up in the middle; what the server holds in its first and its last tenth."""
    until, process = time.monotonic() + 60 * minutes, psutil.Process(child.pid)
    counts = {"requests": 0, "hung_up": 0, "tokens": 0}
    lock, samples = threading.Lock(), []

    def client(number: int) -> None:
        draw = random.Random(seed * 100 + number)
        while time.monotonic() < until:
            most = draw.randrange(1, 30) if draw.random() < 0.5 else None
            times = write(port, prompts(1, draw.randrange(1 << 30))[0], draw.randrange(4, 48), most)
            with lock:
                counts["requests"] += 1
                counts["hung_up"] += most is not None
                counts["tokens"] += len(times) - 1

    clients = [threading.Thread(target=client, args=(n,)) for n in range(STREAMS + 4)]  # some always wait
    for one in clients:
        one.start()
    while time.monotonic() < until:
        time.sleep(min(2.0, 6 * minutes))
        if child.poll() is not None:
            raise RuntimeError(f"the server ended with {child.returncode} in the middle")
        samples.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    for one in clients:
        one.join()
    time.sleep(1)
    idle = (process.memory_info().rss, process.num_fds(), process.num_threads())
    tenth = max(1, len(samples) // 10)
    warm = samples[tenth : 2 * tenth] or samples[:tenth]  # the first tenth fills caches and buffers
    halves = samples[len(samples) // 2 :]
    found: dict[str, Any] = {"minutes": minutes, **counts, "samples": len(samples)}
    for place, name in enumerate(("rss_bytes", "files", "threads")):
        found[name] = {
            "second_tenth": median(sample[place] for sample in warm),
            "middle": median(sample[place] for sample in halves[:tenth]),
            "last_tenth": median(sample[place] for sample in samples[-tenth:]),
            "most": max(sample[place] for sample in samples), "idle_at_the_end": idle[place],
        }  # fmt: skip
    return found


def main() -> None:
    """The two measurements."""
    parser = outcome.arguments(__doc__ or "")
    parser.add_argument("--package", type=Path, help="another package")
    parser.add_argument("--torch", action="store_true", help="the same backbone in float32 through torch")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    chosen = parser.parse_args()
    rounds, tokens = (1, 8) if chosen.quick else (ROUNDS, TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        rows = 20_000 if chosen.quick else 400_000
        package = chosen.package
        if package is None and chosen.torch:
            package = write_package(Path(folder), rows)
        elif package is None:
            package = write_gguf_package(Path(folder), SMOLLM2_GGUF, rows)
        with open_package(package, verify="off") as opened:
            backbone = opened.backbone.place(package) or package
        child, port = start(package, "--queue", "64")
        try:
            results: dict[str, Any] = {"streams": compare(port, rounds, tokens)}
            say(json.dumps(results["streams"], indent=1))
            if chosen.soak:
                results["soak"] = soak(child, port, chosen.soak, chosen.seed)
                say(json.dumps(results["soak"], indent=1))
        finally:
            child.terminate()
            child.wait(60)
    one = results["streams"]
    by_torch = "" if backbone.suffix == ".gguf" else "the torch backbone steps slot after slot"
    targets = [
        Target(f"{STREAMS} streams over one, tokens/s", ">= 3", one["ratio_tokens_per_second"], by_torch),
        Target(f"{STREAMS} streams over one, decoding only", ">= 3", one["ratio_decode_tokens_per_second"]),
    ]  # fmt: skip
    if chosen.soak:
        held = results["soak"]
        for name, bound in (("rss_bytes", "<= 1.02"), ("files", "<= 1"), ("threads", "<= 1")):
            ratio = held[name]["last_tenth"] / held[name]["second_tenth"]
            targets.append(Target(f"soak, {name}: last over second tenth", bound, ratio))
    method = {"streams": STREAMS, "rounds": rounds, "tokens": tokens, "prompt_words": PROMPT_WORDS,
              "package": package.name, "backbone": backbone.name}  # fmt: skip
    outcome.finish("serve_streams", chosen, targets, method, results)


if __name__ == "__main__":
    main()
