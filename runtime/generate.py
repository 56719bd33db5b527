"""Text in, text out: sampling, streaming, chat turns, and the figures of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram import Progress
from engram.builders.process_memory import resident_bytes
from engram.kernels import dispatch
from engram.quantize.package import open_package
from engram.runtime.engine import EngineError, Model, Session, check_table_io, probabilities
from engram.runtime.llama import LlamaSlots
from engram.runtime.llama_hook import LlamaError, library
from engram.runtime.llama_native import NativeSlots
from engram.runtime.slots import OneSlot

ENGINES = ("auto", "torch", "llama")


@dataclass(frozen=True)
class RunConfig:
    """What `engram run` needs to know."""

    package: Path
    prompt: str | None = None
    offload: str = "disk"
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    table_cache: int | None = None  # bytes of mapped table that may be resident
    chat: bool = False  # put the prompt through the tokenizer's chat template
    dtype: str | None = None
    verify: str = "first-touch"
    table_io: str = "auto"
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if self.max_tokens < 1:
            raise EngineError(f"max_tokens {self.max_tokens} must be at least 1")
        if self.temperature < 0:
            raise EngineError(f"temperature {self.temperature} must not be negative")
        if self.engine not in ENGINES:
            raise EngineError(f"engine {self.engine!r} is not known", hint="use one of: " + ", ".join(ENGINES))
        if not 0 < self.top_p <= 1:
            raise EngineError(f"top_p {self.top_p} must be above 0 and at most 1")


class Sampler:
    """Picks tokens; the same seed picks the same tokens from the same logits."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def pick(self, logits_V: Tensor) -> int:
        """One token id; the likeliest at temperature 0."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        weights = probabilities(logits_V, self.temperature, self.top_p)
        return int(torch.multinomial(weights, 1, generator=self._generator))


def generate(session: Session | OneSlot, ids: list[int], sampler: Sampler, max_tokens: int) -> Iterator[int]:
    """Feed `ids`, then yield sampled tokens up to `max_tokens` or a stop token (not yielded).

    The rows of a token are asked for the moment it is sampled.
    """
    stops = session.model.stop_ids()
    logits = session.feed(ids)
    for step in range(max_tokens):
        token = sampler.pick(logits)
        if token in stops:
            return
        more = step + 1 < max_tokens and session.length + 1 <= session.model.context
        if more:
            session.ask([token])
        yield token
        if not more:
            return
        logits = session.feed([token])


def render_chat(tokenizer: Any, special: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """The messages through the tokenizer's chat template; without one a line each.

    transformers renders in jinja's sandbox. Raises jinja2.TemplateError where the template refuses the messages.
    """
    template = special.get("chat_template")
    if not template:
        return "".join(message["content"] + "\n" for message in messages)
    from transformers import PreTrainedTokenizerFast

    named = {f"{name}_token": special.get(name) for name in ("bos", "eos", "pad")}
    renderer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, **{key: value for key, value in named.items() if value}
    )
    rendered = renderer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return str(rendered)


class Conversation:
    """A model and one session: single prompts, or turns of a chat that reuse what they share."""

    def __init__(self, model: Model | LlamaSlots | NativeSlots, config: RunConfig) -> None:
        self.model, self.config = model, config
        self.session: Session | OneSlot = model.session()
        self._messages: list[dict[str, str]] = []

    def complete(self, prompt: str, on_text: Callable[[str], None]) -> dict[str, Any]:
        """Go on from a text; the object of `engram run --json`."""
        return self._write(self.model.begin() + self.model.encode(prompt) if prompt else [], on_text)

    def turn(self, text: str, on_text: Callable[[str], None]) -> dict[str, Any]:
        """Answer one message of a chat (through the chat template; without one the text is simply continued)."""
        self._messages.append({"role": "user", "content": text})
        prompt = render_chat(self.model.tokenizer, self.model.special, self._messages)
        result = self._write(self.model.encode(prompt), on_text)
        self._messages.append({"role": "assistant", "content": result["text"]})
        return result

    def _write(self, ids: list[int], on_text: Callable[[str], None]) -> dict[str, Any]:
        from tokenizers.decoders import DecodeStream

        if not ids:
            raise EngineError("the prompt is empty", hint="pass some text with --prompt")
        before = self.model.reader.counters()
        fed = self.session.reuse(ids)
        stream = DecodeStream(skip_special_tokens=True)
        sampler = Sampler(self.config.temperature, self.config.top_p, self.config.seed)
        tokens: list[int] = []
        pieces: list[str] = []
        begin = time.perf_counter()
        first = begin
        for token in generate(self.session, fed, sampler, self.config.max_tokens):
            if not tokens:
                first = time.perf_counter()
            tokens.append(token)
            piece = stream.step(self.model.tokenizer, token)
            if piece:
                pieces.append(piece)
                on_text(piece)
        end = time.perf_counter()
        first = first if tokens else end
        after = self.model.reader.counters()
        return {
            "text": "".join(pieces), "token_ids": tokens, "prompt_tokens": len(ids), "prefilled_tokens": len(fed),
            "prefill_tokens_per_second": len(fed) / max(first - begin, 1e-9),
            "decode_tokens_per_second": max(0, len(tokens) - 1) / max(end - first, 1e-9),
            "engine": self.model.engine, "offload": self.config.offload, "row_io": self.model.reader.row_io,
            "kernels": dispatch.name(),
            "table_bytes": self.model.reader.table_bytes,
            "table_resident_bytes": self.model.reader.resident_bytes(),
            **{name: after[name] - before[name] for name in after}, **resident_bytes(),
        }  # fmt: skip


def open_session(config: RunConfig, progress: Progress | None = None) -> Conversation:
    """Open a package for a chat: a GGUF backbone through llama.cpp where that is installed, any other through torch.

    An engine that was asked for by name and cannot be had is an error; where llama.cpp cannot be had, that is said.
    """
    progress = progress or Progress()
    if config.package.suffix == ".gguf" and config.package.is_file():
        with progress.task(f"open {config.package.name}"):
            return Conversation(open_native(config), config)
    engine = choose_engine(config, progress)
    with progress.task(f"open {config.package.name}"):
        if engine == "llama":
            return Conversation(open_llama(config), config)
        return Conversation(open_torch(config), config)


def choose_engine(config: RunConfig, progress: Progress) -> str:
    """The engine asked for by name, else the one that a package's backbone asks for: torch or llama."""
    if config.engine != "auto":
        return config.engine
    package = open_package(config.package, verify="off")
    try:
        place = package.backbone.place(package.folder)
    finally:
        package.close()
    if place is None or place.suffix != ".gguf":
        return "torch"
    try:
        library()
    except LlamaError as wrong:
        progress.say(f"backbone through torch, dequantized: {wrong}")
        return "torch"
    return "llama"


def open_torch(config: RunConfig) -> Model:
    """The package's backbone through torch."""
    return Model.open(
        config.package, offload=config.offload, cache_bytes=config.table_cache, dtype=config.dtype,
        verify=config.verify, table_io=config.table_io,
    )  # fmt: skip


def open_llama(config: RunConfig, **options: int) -> LlamaSlots:
    """The package's backbone through llama.cpp; `options` are LlamaSlots'. EngineError for what is torch's."""
    if config.dtype is not None:
        raise EngineError(f"dtype {config.dtype!r} is torch's: llama.cpp computes as the GGUF is stored")
    check_table_io(config.table_io, config.offload)
    return LlamaSlots.open(
        config.package, offload=config.offload, cache_bytes=config.table_cache, verify=config.verify,
        table_io=config.table_io, **options,
    )  # fmt: skip


def open_native(config: RunConfig) -> NativeSlots:
    """A GGUF with a memory of its own through llama.cpp. EngineError for settings that are for packages."""
    if config.engine == "torch" or config.dtype is not None:
        raise EngineError(f"{config.package} is a GGUF by itself, which llama.cpp alone runs",
                          hint="leave --engine out")  # fmt: skip
    if config.offload != "disk" or config.table_cache is not None or config.table_io != "auto":
        raise EngineError(f"the table in {config.package} is read by llama.cpp itself, row by row from the disk",
                          hint="leave --offload, --table-cache and --table-io out")  # fmt: skip
    return NativeSlots(config.package)


def run(config: RunConfig, on_text: Callable[[str], None], progress: Progress | None = None) -> dict[str, Any]:
    """Open, write on from the prompt, close."""
    conversation = open_session(config, progress)
    try:
        prompt = config.prompt or ""
        return conversation.turn(prompt, on_text) if config.chat else conversation.complete(prompt, on_text)
    finally:
        conversation.model.close()
