"""Every part of the GPU check runs on the CPU in small, with the code that a GPU runs."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipelines.gpu.__main__ import PARTS, main
from tests.helpers.commands import ENVIRONMENT, ROOT

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


@pytest.mark.parametrize("number", PARTS)
def test_a_part_measures_all_its_rows(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="VideoMAE, to compare with, is not installed")
    # Waiting threads of several processes must sleep.
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    code = main(["--dry", "--parts", str(number), "--out", str(tmp_path)])
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    log = (tmp_path / "gpu.log").read_text()
    assert (code, part["status"]) == (0, "ok"), log
    rows: dict[str, Any] = {row["what"]: row["ours"] for row in part["rows"]}
    for pattern in EXPECTED[number]:
        assert any(re.fullmatch(pattern, what) for what in rows), f"no row {pattern}: {sorted(rows)}"
    # Only kernels that need CUDA may fail.
    failed = {what: value for what, value in rows.items() if isinstance(value, str) and value.startswith("failed")}
    assert all("CUDA" in value for value in failed.values()), failed
    if number == 7:
        assert [value for what, value in rows.items() if "losses" in what] == [0.0, 0.0]


def test_without_a_gpu_the_check_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", "6,2", "--out", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert "no CUDA device" in line and "DRY=1" in line


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_passes_its_variables_on() -> None:
    variables = ["DRY=1", "PARTS=1,4", "OUT=some folder", "VIDEOS=my videos"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    words = ["make", "-n", "gpu", *variables]
    result = subprocess.run(
        words, cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=True
    )
    assert '.venv/bin/python -m pipelines.gpu --out "some folder" --dry --parts 1,4' in result.stdout
    assert '--videos "my videos"' in result.stdout
