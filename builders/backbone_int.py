"""Backbones whose linear layers are int8 or int4: the plain file form, and torchao's tensors made of it at load.

Beside config.json lie two files. `int_weights.json`: {"format", "version", "modules": {name: {"type", "group"}}}.
`int_weights.safetensors`: every other parameter under its own name, and for a module `NAME` with O outputs, I inputs

- int8: `NAME.weight.int8` int8 [O, I], `NAME.weight.scale` float32 [O]; the weight is value * scale;
- int4: `NAME.weight.int4` uint8 [O, I / 2], `NAME.weight.scale` and `NAME.weight.zero` bfloat16 [O, I / group]; the
  even input's value is in the low four bits, the odd input's in the high; the weight is (value - 8) * scale + zero.

torchao's own safetensors form is a prototype, stores four bits in a byte, or packed in a way that depends on the CPU.
This form depends on neither, and no float weights are made of it when it is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engram import EngramError
from engram.builders.atomic import write_whole

MARK = "int_weights.json"
WEIGHTS = "int_weights.safetensors"
FORMAT = "engram-int-weights"
VERSION = 1
KINDS = {"int8": ("int8", "scale"), "int4": ("int4", "scale", "zero")}  # the parts of each in the file
GROUPS = (32, 64, 128)  # what torch's four-bit kernel knows
LEAST_SCALE = 1e-6  # of a group whose weights are all equal
ALIGNED = 64  # bytes; torch's int8 kernel reads weights and inputs with instructions that end the process elsewhere
KERNEL_STEP = 16  # inputs; it reads past the end of a row that is no whole number of steps
FEW_ROWS = 16  # up to here torch's int8 kernel beats a float copy of the weight (measured: bf16, AVX-512)


class IntWeightsError(EngramError):
    """A folder of int8 or int4 weights that is incomplete, or that contradicts itself or its config.json."""


@contextmanager
def torchao_importable(*, needed: bool = True) -> Iterator[None]:
    """Import torchao inside: it warns about GPU libraries that this machine cannot load, none of which is used.

    Raises IntWeightsError where it is needed and not installed.
    """
    if needed and importlib.util.find_spec("torchao") is None:
        raise IntWeightsError(
            "a backbone of int8 or int4 layers needs torchao, which is not installed",
            hint="pip install 'engram-lm[torchao]'",
        )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class Int8Linear(nn.Linear):
    """A linear layer over torchao's Int8Tensor; a few bfloat16 rows on a CPU go through torch's int8 kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] → [..., O] in the input's type."""
        weight: Any = self.weight
        rows = input.numel() // input.shape[-1]
        fast = input.dtype == torch.bfloat16 and input.device.type == "cpu" and rows <= FEW_ROWS
        if not fast or input.shape[-1] % KERNEL_STEP or input.requires_grad:  # the kernel has no gradient
            return super().forward(input)
        scale = weight.scale.flatten().to(input.dtype)
        flat = aligned(input.reshape(-1, input.shape[-1]).contiguous())
        out: Tensor = torch._weight_int8pack_mm(flat, weight.qdata, scale)
        out = out.reshape(*input.shape[:-1], out.shape[-1])
        return out if self.bias is None else out + self.bias


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where it does not begin at a multiple of ALIGNED bytes: files give such tensors."""
    return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor


def stored_form(weight: Tensor, kind: str, group: int) -> dict[str, Tensor]:
    """A float weight [O, I] as the tensors of the file form: {kind: values, "scale": scales, "zero": zeros of int4}.

    int8 is torchao's symmetric weight-only type, a scale for each output. int4 spreads 16 values from the least to the
    greatest weight of each group, as torchao's tinygemm type does; scale and zero are rounded to bfloat16 before the
    values are chosen, so the rounding costs next to nothing.
    """
    weight = weight.detach().float()
    if kind == "int8":
        with torchao_importable():
            from torchao.quantization import Int8Tensor, PerRow
        made = Int8Tensor.from_hp(weight, PerRow())
        return {"int8": made.qdata, "scale": made.scale.flatten()}
    groups = weight.reshape(len(weight), -1, group)
    least, greatest = groups.aminmax(dim=-1)
    scale = ((greatest - least) / 15).clamp(min=LEAST_SCALE).bfloat16()
    zero = (least + 8 * scale.float()).bfloat16()
    values = (groups - zero.float()[..., None]) / scale.float()[..., None] + 8
    values = values.round().clamp(0, 15).to(torch.uint8).flatten(1)
    return {"int4": values[:, 0::2] | values[:, 1::2] << 4, "scale": scale, "zero": zero}


def torchao_form(stored: dict[str, Tensor], group: int, dtype: torch.dtype) -> Tensor:
    """The tensor that computes: torchao's, on the device and from the tensors of the file form.

    int8 shares the memory of values and scales where they are aligned, else it holds copies that are. int4 is four bits
    in memory where torch has a kernel for it (bfloat16 on a CPU), else a byte a value.
    """
    with torchao_importable():
        from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
        from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
    scale = stored["scale"]
    if "int8" in stored:
        values = aligned(stored["int8"])
        int8: Tensor = Int8Tensor(values, aligned(scale).reshape(-1, 1), [1, values.shape[1]], dtype)
        return int8
    pairs, zero = stored["int4"], stored["zero"]
    values = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
    if dtype == torch.bfloat16 and pairs.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32), 1)
        scale_and_zero = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
        four: Tensor = Int4OpaqueTensor(packed, scale_and_zero, [1, group], values.shape)
        return four
    point = -(zero.float() / scale.float()).to(dtype)
    wide: Tensor = IntxUnpackedToInt8Tensor(
        values.to(torch.int8) - 8, scale.to(dtype), point, getattr(torch, "int4"), (1, group), dtype, None
    )
    return wide


def put_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Replace the linear layer `name` by one over a tensor of `torchao_form`; its bias stays."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    kind = Int8Linear if type(weight).__name__ == "Int8Tensor" else nn.Linear
    new = kind(old.in_features, old.out_features, bias=False, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = old.bias
    model.set_submodule(name, new)


def write_int_folder(
    folder: Path, model: Any, stored: dict[str, dict[str, Tensor]], modules: dict[str, dict[str, Any]]
) -> None:
    """Write the two files; `stored` holds the file form of the modules, `modules` their types and groups.

    A tensor that bfloat16 holds exactly is stored so; a tied parameter once, under its first name.
    """
    from safetensors.torch import save_file

    tensors = {f"{name}.weight.{part}": tensor for name, parts in stored.items() for part, tensor in parts.items()}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") in stored or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        short = tensor.bfloat16() if tensor.is_floating_point() else tensor
        tensors[name] = short if torch.equal(short.to(tensor.dtype), tensor) else tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    described = {"format": FORMAT, "version": VERSION, "modules": modules}
    write_whole(folder / MARK, (json.dumps(described, indent=1) + "\n").encode())


def read_mark(folder: Path) -> dict[str, dict[str, Any]]:
    """Module name → {"type", "group"}, checked. Raises IntWeightsError."""
    path = folder / MARK
    try:
        mark = json.loads(path.read_bytes())
        if (mark["format"], mark["version"]) != (FORMAT, VERSION):
            raise IntWeightsError(f"{path} has format {mark['format']!r} version {mark['version']!r}, "
                                  f"expected {FORMAT!r} version {VERSION}")  # fmt: skip
        modules: dict[str, dict[str, Any]] = mark["modules"]
        for name, entry in modules.items():
            if entry["type"] not in KINDS or (entry["type"] == "int4" and entry["group"] not in GROUPS):
                raise IntWeightsError(
                    f"{path}: module {name!r} has type {entry['type']!r} with groups of {entry['group']}",
                    hint=f"known are {', '.join(KINDS)}, with groups of {', '.join(map(str, GROUPS))} for int4",
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise IntWeightsError(f"{path} cannot be read: {wrong!r}", hint="quantize the backbone again") from None
    return modules


def load_int_folder(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The transformers model with quantized linear layers, without float weights for them.

    Raises IntWeightsError where a weight is missing, superfluous or of another shape than config.json says.
    """
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    modules = read_mark(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, trust_remote_code=False
        )
    with safe_open(folder / WEIGHTS, framework="pt", device=device) as file:
        names = set(file.keys())
        for name, entry in modules.items():
            kind = entry["type"]
            wanted = {part: f"{name}.weight.{part}" for part in KINDS[kind]}
            if missing := sorted(set(wanted.values()) - names):
                raise IntWeightsError(f"{folder / WEIGHTS} lacks {missing[0]!r}, {MARK} names its module")
            parts = {part: file.get_tensor(key) for part, key in wanted.items()}
            _check_shapes(folder, model, name, entry, parts)
            put_weight(model, name, torchao_form(parts, entry.get("group", 0), dtype))
            names -= set(wanted.values())
            del parts  # the file's own pages, before the next module's are read
        plain = {name: file.get_tensor(name) for name in sorted(names)}
    own = model.state_dict()
    for name, tensor in plain.items():
        if name not in own or own[name].shape != tensor.shape:
            raise IntWeightsError(f"{folder / WEIGHTS} holds {name!r} {list(tensor.shape)}, "
                                  f"which is no parameter of the {config.model_type} of config.json")  # fmt: skip
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in plain.items()}
    model.load_state_dict(cast, assign=True, strict=False)
    model.tie_weights()
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if parameter.device.type == "meta":
            raise IntWeightsError(f"{folder / WEIGHTS} lacks the weight {name!r}", hint="quantize the backbone again")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False).eval()


def _check_shapes(folder: Path, model: Any, name: str, entry: dict[str, Any], parts: dict[str, Tensor]) -> None:
    """Refuse values or scales that are not what the layer of config.json needs."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise IntWeightsError(f"{folder / MARK} names the module {name!r}, config.json makes no linear layer of it")
    rows, columns = layer.out_features, layer.in_features
    if entry["type"] == "int8":
        need = {"int8": (torch.int8, [rows, columns]), "scale": (torch.float32, [rows])}
    else:
        each = (torch.bfloat16, [rows, columns // entry["group"]])
        need = {"int4": (torch.uint8, [rows, columns // 2]), "scale": each, "zero": each}
    for part, (dtype, shape) in need.items():
        if (parts[part].dtype, list(parts[part].shape)) != (dtype, shape):
            raise IntWeightsError(
                f"{folder / WEIGHTS}: {name}.weight.{part} is {parts[part].dtype} {list(parts[part].shape)}, "
                f"needed is {dtype} {shape}"
            )
