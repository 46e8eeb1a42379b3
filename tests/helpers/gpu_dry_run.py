"""Dry run of one part of the GPU check, with all its rows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.gpu.__main__ import main

EXPECTED = {
    1: ["torch", "attention xformers", "torch.compile", "xformers.info: .*", "xformers.info after our import: .*"],
    2: ["tests marked not gpu.*"],
    3: [
        f"{shape}.*: {name}"
        for shape in ("encoder", "decoder", "clusters", "VideoMAE")
        for name in ("plain", "xformers")
    ],
    4: [
        *(
            "peak bf16 matmul throughput",
            "VideoMAE, sdpa: training",
            "ARVideo, sdpa, compiled: training",
            "ARVideo, xformers",
        ),
        *(
            ".*: share of the matmul peak",
            ".*graph breaks",
            ".*difference of .* losses.*",
            ".*fastest of each so far: training",
        ),
        ".*fastest of each so far: memory.*",
    ],
    5: ["from disk, .*", "share of that time.*"],
    6: ["cross-entropy.*logits .*", "cross-entropy.*peak memory"],
    7: ["one process: killed after step .*", "one process: two whole runs.*"],
    8: ["encoding in bf16.*", "held-out PSNR.*", "share of its .*", "tokenize .* videos.*"],
    9: [
        "tokenizer after .*",
        "codes that the tokenizer uses",
        "pre-training.*",
        "held-out bits.*",
        "probe accuracy, linear.*",
    ],
}
"""Rows of each part, as patterns of their names."""


def check_part(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a part on the CPU in small, check that it has all its rows, and return their values by name."""
    pytest.importorskip("transformers", reason="VideoMAE, to compare with, is not installed")
    # Waiting threads of several processes must sleep.
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    code = main(["--dry", "--parts", str(number), "--out", str(folder)])
    (part,) = json.loads((folder / "gpu.json").read_text())["parts"]
    assert (code, part["status"]) == (0, "ok"), (folder / "gpu.log").read_text()
    rows: dict[str, Any] = {row["what"]: row["ours"] for row in part["rows"]}
    for pattern in EXPECTED[number]:
        assert any(re.fullmatch(pattern, what) for what in rows), f"no row {pattern}: {sorted(rows)}"
    # Only kernels that need CUDA may fail.
    failed = {what: value for what, value in rows.items() if isinstance(value, str) and value.startswith("failed")}
    assert all("CUDA" in value for value in failed.values()), failed
    return rows
