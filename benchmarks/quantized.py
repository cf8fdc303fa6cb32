"""What GPT-2 XL takes in memory when its 6.2 GB of float32 are quantized while they are read, and how exact it is.

    python benchmarks/quantized.py            # makes the weights in a temporary folder (6.2 GB), removed afterwards

Each case runs in a process of its own. "held" is what its tensors and scales take, "process" its anonymous memory beside
that of an empty model, "peak" the most of that while loading. Every quantized layer is then compared with what
bitsandbytes' own functions make of the same weight: values and scales must be equal, and the error is theirs.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "4 bits, fp4, plain scales": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16"},
}
SHARD = 600_000_000


def skeleton() -> Any:
    """GPT-2 XL without values."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from accelerate import init_empty_weights

    with init_empty_weights():
        model = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25, use_cache=False))
        model.tie_weights()
    return model.eval()


def write(folder: Path) -> None:
    """Random weights in shards, so that no more than one shard is in memory."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in skeleton().named_parameters():  # tied ones once
        value = torch.empty(parameter.shape)
        shard[name] = value.fill_(1.0) if ".ln_" in name and name.endswith("weight") else value.normal_(std=0.02)
        if sum(value.nbytes for value in shard.values()) > SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def anonymous() -> int:
    """Bytes of this process's memory that are backed by no file."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


class Peak(threading.Thread):
    """Looks at the memory until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._done = 0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, anonymous())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.most


def held(model: Any) -> int:
    """Bytes of all that the model's state consists of."""
    sizes = {value.data_ptr(): value.nbytes for value in model.state_dict().values()}
    return sum(sizes.values())


def compare(model: Any, folder: Path, four: bool) -> tuple[int, int, float]:
    """Layers, those equal to what bitsandbytes makes of the weight, and the mean error beside the mean weight."""
    import bitsandbytes
    from safetensors import safe_open

    functional = bitsandbytes.functional
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    layers = equal = 0
    error = size = 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)):
            continue
        with safe_open(folder / places[f"{name}.weight"], framework="pt") as file:
            weight = file.get_tensor(f"{name}.weight").t().contiguous()  # a Conv1D's
        if four:
            options = {"quant_type": layer.weight.quant_type, "compress_statistics": layer.weight.compress_statistics}
            values, state = functional.quantize_4bit(weight, **options)
            same = bool((values == layer.weight.data).all()) and state == layer.weight.quant_state
            restored = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            values, scales, _ = functional.int8_vectorwise_quant(weight.half())
            same = bool((values == layer.weight.data).all() and (scales == layer.weight.SCB).all())
            restored = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        layers, equal = layers + 1, equal + same
        error += float((restored.float() - weight).abs().sum())
        size += float(weight.abs().sum())
    return layers, equal, error / size


def measure(case: str, folder: Path) -> None:
    """One case; prints a line."""
    import torch

    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

    torch.set_num_threads(2)
    import bitsandbytes  # noqa: F401 - not to be counted

    model = skeleton()
    gc.collect()
    before = anonymous()
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    load_and_quantize_model(model, BnbQuantizationConfig(**CASES[case]), folder)
    seconds = time.perf_counter() - start
    most, now = peak.stop() - before, anonymous() - before
    layers, equal, error = compare(model, folder, four="load_in_4bit" in CASES[case])
    with torch.no_grad():
        finite = bool(model(torch.arange(16)[None]).logits.isfinite().all())
    print(
        f"{case:26} held {held(model) / 1e9:.2f} GB, process {now / 1e9:.2f} GB, peak {most / 1e9:.2f} GB, {seconds:.0f} s; "
        f"{equal} of {layers} layers equal, error {error:.2%} of the weights; forward {'finite' if finite else 'NOT FINITE'}"
    )


def main() -> None:
    """Makes the weights and runs each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="only this one, on the weights in --folder")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.case is not None:
        measure(given.case, given.folder)
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        write(Path(place))
        for case in CASES:
            subprocess.run([sys.executable, __file__, "--case", case, "--folder", place], check=True)


if __name__ == "__main__":
    main()
