"""The average of the weights follows its formula, survives an interruption, and is validated and saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from data.clip_spec import ClipSpec
from data.source_clips import held_out_clips
from data.sources import load_source
from pipelines.engine import checkpoints, training
from pipelines.engine.averaging import WeightAverage
from pipelines.engine.training import make_optimizer
from pipelines.evaluation.reconstruction import reconstruct
from pipelines.settings.training import Training
from tests.helpers.commands import TINIEST, Call
from tests.pipelines.engine.test_training_resume import logged
from tokenizer import load_tokenizer


class Part(nn.Module):
    """Weights in two memory layouts, and buffers of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, (1, 2, 2))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("started", torch.tensor(False))
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def set_state(part: Part, step: int) -> None:
    """Set the weights and buffers to those of a step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for value in [*part.parameters(), part.get_buffer("mean")]:
            value.copy_(torch.randn(value.shape, generator=generator))
    part.get_buffer("count").fill_(step + 1)
    part.get_buffer("started").fill_(True)


def doubles(part: nn.Module) -> dict[str, Tensor]:
    return {name: value.double().clone() for name, value in part.state_dict().items()}


@pytest.mark.parametrize("decay", [0.05, 0.4, 0.9, 0.999])
def test_the_average_follows_the_formula(decay: float) -> None:
    part = Part()
    average = WeightAverage(part, decay)
    expected: dict[str, Tensor] = {}
    kept = [min(decay, (1 + n) / (10 + n)) for n in range(30)]
    assert (kept[1] == decay) == (decay == 0.05) and (kept[29] == decay) == (decay < 0.7)
    for n in range(30):
        set_state(part, n)
        average.update()
        now = doubles(part)
        if n == 0:
            expected = now
        expected = {name: kept[n] * value + (1 - kept[n]) * now[name] for name, value in expected.items()}
        actual = doubles(average.module)
        for name in ("conv.weight", "conv.bias"):
            assert (actual[name] - expected[name]).abs().max() < 2e-6, (n, name)
        for name in ("mean", "count", "started"):
            assert torch.equal(actual[name], now[name]), "buffers are copied, because codebooks are already averages"


def test_the_average_is_in_evaluation_mode_and_has_no_gradients() -> None:
    part = Part().train()
    average = WeightAverage(part, 0.9)
    average.update()
    assert part.training and not any(module.training for module in average.module.modules())
    part.conv(torch.zeros(1, 3, 1, 2, 2)).sum().backward()
    assert all(p.grad is None for p in average.module.parameters())


def test_a_saved_and_loaded_average_continues_bit_for_bit(tmp_path: Path) -> None:
    part = Part()
    straight = WeightAverage(part, 0.9)
    optimizer = make_optimizer(part, Training())
    for step in range(5):
        set_state(part, step)
        straight.update()
    checkpoints.save(tmp_path, part, optimizer, {"step": 5}, extra_modules={"average": straight.state}, keep=2)
    other = Part()
    resumed = WeightAverage(other, 0.9)
    assert checkpoints.load(tmp_path, other, optimizer, extra_modules={"average": resumed.state}) == {"step": 5}
    for step in range(5, 9):
        for module, average in ((part, straight), (other, resumed)):
            set_state(module, step)
            average.update()
    assert int(resumed.state.n_averaged) == 9
    for name, value in straight.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_a_checkpoint_without_its_average_is_skipped(tmp_path: Path) -> None:
    part = Part()
    average, optimizer = WeightAverage(part, 0.9), make_optimizer(part, Training())
    for step in (1, 2):
        checkpoints.save(tmp_path, part, optimizer, {"step": step}, extra_modules={"average": average.state}, keep=2)
    (tmp_path / "step_000002" / "average.safetensors").unlink()
    assert checkpoints.load(tmp_path, part, optimizer, extra_modules={"average": average.state}) == {"step": 1}


# --- average of a tokenizer


def trained(call: Call, folder: Path, *flags: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_LOG_EVERY", 1)
        return call("train_tokenizer", *TINIEST, "--out", str(folder), "--validate_every", "3", *flags)


def saved(folder: Path, file: str, prefix: str, step: str = "step_000006") -> dict[str, Tensor]:
    tensors = load_file(folder / "checkpoints" / step / f"{file}.safetensors")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("quantizer", ["fsq240", "emavq32"])
def test_the_average_is_validated_and_saved(call: Call, tmp_path: Path, quantizer: str) -> None:
    flags = ["--model.name", f"vq3d-2x8x8-{quantizer}"]
    answer = trained(call, tmp_path / "averaged", *flags, "--average", "0.9")
    model = load_file(tmp_path / "averaged" / "model" / "model.safetensors")
    assert same(model, saved(tmp_path / "averaged", "average", "module."))
    assert not same(model, saved(tmp_path / "averaged", "model", "tokenizer."))
    tokenizer = load_tokenizer(str(tmp_path / "averaged"))
    lines = [json.loads(line) for line in (tmp_path / "averaged" / "metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line["val_weights"] for line in lines if "val_weights" in line}
    assert validated[6] == int(tokenizer.fingerprint()[:8], 16) != validated[3]
    clip = yaml.safe_load((tmp_path / "averaged" / "config.yaml").read_text())["clip"]
    pixels_BTHWC = held_out_clips(load_source("builtin:moving-digits:8:2"), ClipSpec(**clip), 96, {})
    numbers, _ = reconstruct(tokenizer, pixels_BTHWC, torch.device("cpu"))
    assert numbers == {key: answer[key] for key in numbers}


def test_every_step_enters_the_average(call: Call, tmp_path: Path) -> None:
    trained(call, tmp_path / "run", "--average", "0.9", "--save_every", "1")
    names = ("step_000005", "step_000006")
    weights = [saved(tmp_path / "run", "model", "tokenizer.", name) for name in names]
    averages = [saved(tmp_path / "run", "average", "module.", name) for name in names]
    # Decay (1 + n) / (10 + n) after n = 5 steps.
    kept = 6 / 15
    for name, value in averages[1].items():
        expected = kept * averages[0][name] + (1 - kept) * weights[1][name]
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-7), name
    assert int(saved(tmp_path / "run", "average", "")["n_averaged"]) == 6


def test_without_an_average_the_weights_themselves_are_saved(call: Call, tmp_path: Path) -> None:
    trained(call, tmp_path / "plain", "--average", "0")
    model = load_file(tmp_path / "plain" / "model" / "model.safetensors")
    assert same(model, saved(tmp_path / "plain", "model", "tokenizer."))
    assert not list((tmp_path / "plain").rglob("average.safetensors"))


def test_averaging_does_not_change_training(call: Call, tmp_path: Path) -> None:
    losses = []
    for decay in ("0", "0.9"):
        trained(call, tmp_path / decay, "--average", decay)
        losses.append([line for line in logged(tmp_path / decay) if "loss" in line])
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    assert same(saved(tmp_path / "0", "model", ""), saved(tmp_path / "0.9", "model", ""))
