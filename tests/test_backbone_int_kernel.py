"""What torch's int8 kernel must never be given: it ends the process, so each case runs in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engram.builders.backbone import BackboneRef
from engram.builders.backbone_int import WEIGHTS
from engram.quantize.backbone import BackboneConfig, quantize_backbone

pytest.importorskip("torchao", reason="the extra `torchao` is not installed")

CHECK = """
import sys
import torch
from engram.builders.backbone_int import Int8Linear, WEIGHTS, load_int_folder
from pathlib import Path
from safetensors.torch import load_file

torch.manual_seed(3)
folder = Path(sys.argv[1])
model, stored, tested = load_int_folder(folder, torch.bfloat16), load_file(folder / WEIGHTS), 0
for name, layer in model.named_modules():
    if not isinstance(layer, Int8Linear):
        continue
    assert layer.weight.qdata.data_ptr() % 64 == layer.weight.scale.data_ptr() % 64 == 0, name
    weight = stored[f"{name}.weight.int8"].double() * stored[f"{name}.weight.scale"].double()[:, None]
    for rows in range(1, 21):
        for shift in (0, 4):  # inputs that begin 0 and 8 bytes after an aligned address
            values = torch.randn(rows * layer.in_features + shift).bfloat16()
            x = values[shift:].reshape(rows, layer.in_features)
            truth = x.double() @ weight.T
            with torch.inference_mode():
                found = layer(x).double()
            assert ((found - truth).abs() <= 0.02 * truth.abs().max()).all(), (name, rows, shift)
            tested += 1
print("compared", tested)
"""


def int8_folder(tmp_path: Path, width: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=50, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    source = BackboneRef.find(str(tmp_path / "float"))
    quantize_backbone(BackboneConfig(source, Path(), tmp_path, "int8"))
    return tmp_path / "backbone"


@pytest.mark.parametrize(
    ("width", "place"),
    [(64, 0), (64, 24), (72, 24)],  # 72 is no multiple of the kernel's 16 inputs
)
def test_misaligned_weights_of_any_width_compute_the_formula(tmp_path: Path, width: int, place: int) -> None:
    """`place`: the bytes past a multiple of 64 at which the file gives an int8 tensor."""
    folder = int8_folder(tmp_path, width)
    tensors = load_file(folder / WEIGHTS)
    found = set[int]()
    for padding in range(0, 64, 8):
        save_file(tensors, folder / WEIGHTS, {"format": "pt", "padding": "x" * padding})
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            places = {file.get_tensor(key).data_ptr() % 64 for key in tensors if key.endswith(".int8")}
        found |= places
        if place in places:
            break
    else:
        pytest.fail(f"no padding places an int8 tensor at {place}: {sorted(found)}")
    child = subprocess.run(
        [sys.executable, "-c", CHECK, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.split() == ["compared", str(7 * 20 * 2)]
