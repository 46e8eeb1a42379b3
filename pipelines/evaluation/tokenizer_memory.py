"""Peak memory of a tokenizer, measured in a new process.

A process that has allocated memory before would reuse it, so the measured increase would be too small.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines.engine.memory import Resident
from pipelines.engine.signals import child_environment, stop_with_parent
from tokenizer import load_tokenizer

_ROOT = Path(__file__).parents[2]


def memory_of(source: str, trust: bool, shape: Sequence[int], device: torch.device, bf16: bool) -> int:
    """Measure the peak memory in bytes of loading a tokenizer and encoding and decoding a batch of this shape.

    On CUDA devices this is the peak of PyTorch's allocator, on other devices the increase of the resident memory.

    Raises:
        ValueError: if the new process fails.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # free cached memory for the new process
    arguments = json.dumps([os.getcwd(), source, trust, list(shape), str(device), bf16])
    # -m puts the working directory on the import path. Start in _ROOT, because files of the user could shadow modules.
    command = [sys.executable, "-m", "pipelines.evaluation.tokenizer_memory", arguments]
    result = subprocess.run(command, cwd=_ROOT, env=child_environment(), capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.splitlines() or [f"exit code {result.returncode}"]
        raise ValueError(f"{source}: the memory of a batch cannot be measured: {lines[-1]}")
    return int(result.stdout.splitlines()[-1])


def main() -> None:
    """Print the peak memory in bytes for the arguments that `memory_of` passes."""
    stop_with_parent()
    folder, source, trust, shape, device, bf16 = json.loads(sys.argv[1])
    os.chdir(folder)  # the source may be a relative path
    with Resident() as resident:
        tokenizer = load_tokenizer(source, trust=trust).to(device)
        pixels_BTHWC = torch.zeros(shape, dtype=torch.uint8, device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            tokenizer.decode(tokenizer.encode(pixels_BTHWC))
    print(torch.cuda.max_memory_allocated(device) if "cuda" in device else resident.most - resident.before)


if __name__ == "__main__":
    main()
