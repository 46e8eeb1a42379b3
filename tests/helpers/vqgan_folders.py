"""Published layouts of VQGANs of taming-transformers with random weights, and reference results of the package."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from einops import rearrange
from torch import Tensor, nn

from tokenizer import load_tokenizer
from tokenizer.base import to_float, to_uint8

LOSS = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {"disc_start": 0}}
F16 = {
    "double_z": False,
    "z_channels": 256,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
F8 = {**F16, "ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}
TINY = {
    **F16,
    "z_channels": 8,
    "resolution": 16,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
}


def project(target: str, ddconfig: dict[str, Any], **params: Any) -> dict[str, Any]:
    """Return the contents of a project YAML as it is published."""
    model = {
        "base_learning_rate": 4.5e-06,
        "target": f"taming.models.vqgan.{target}",
        "params": {"ddconfig": ddconfig, "lossconfig": LOSS, **params},
    }
    return {"model": model, "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 12}}}


GUMBEL = {
    "kl_weight": 1e-8,
    "monitor": "val/rec_loss",
    "temperature_scheduler_config": {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {"warm_up_steps": 0, "max_decay_steps": 1000001, "lr_start": 0.9, "lr_max": 0.9, "lr_min": 1.0e-06},
    },
}
PUBLISHED = {
    "taming-f16-1024": project("VQModel", F16, embed_dim=256, n_embed=1024),
    "taming-f16-16384": project("VQModel", F16, embed_dim=256, n_embed=16384, monitor="val/rec_loss"),
    "taming-gumbel-f8-8192": project("GumbelVQ", F8, embed_dim=256, n_embed=8192, **GUMBEL),
}
SMALL = {
    "taming-f2-32": project("VQModel", TINY, embed_dim=8, n_embed=32),
    "taming-gumbel-f2-32": project("GumbelVQ", TINY, embed_dim=8, n_embed=32, **GUMBEL),
}


class Payload:
    """Creates a file by a shell command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


class Loss(nn.Module):
    """A stand-in for the package's loss with LPIPS and a discriminator, which a tokenizer does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.perceptual_loss, self.discriminator = nn.Linear(2, 2), nn.Conv2d(3, 2, 1)


def build(package: ModuleType, published: dict[str, Any], pixels_BTHWC: Tensor, seed: int = 0) -> Any:
    """Build a model of the package with random weights and a codebook spread over its features, so that codes differ."""
    torch.manual_seed(seed)
    model = published["model"]
    network = getattr(package, model["target"].rpartition(".")[2])(**model["params"]).eval()
    z_NDhw = network.quant_conv(network.encoder(frames_of(pixels_BTHWC)[:2]))
    mean, deviation = z_NDhw.mean((0, 2, 3)), z_NDhw.std((0, 2, 3))
    if "Gumbel" in model["target"]:
        weight = torch.randn_like(network.quantize.proj.weight[..., 0, 0]) / deviation
        network.quantize.proj.weight.data[..., 0, 0], network.quantize.proj.bias.data = weight, -weight @ mean
    else:
        network.quantize.embedding.weight.data = mean + deviation * torch.randn_like(network.quantize.embedding.weight)
    return network


def frames_of(pixels_BTHWC: Tensor) -> Tensor:
    return rearrange(to_float(pixels_BTHWC), "b t h w c -> (b t) c h w").contiguous()


def lightning_checkpoint(network: nn.Module) -> dict[str, Any]:
    """Return a checkpoint in the format of current Lightning, with names of callbacks as keys. Old versions have classes."""
    return {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": "last.ckpt"}},
        "optimizer_states": [{"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 4.5e-6}]}],
        "lr_schedulers": [],
        "state_dict": network.state_dict(),
    }


def write(folder: Path, published: dict[str, Any], checkpoint: Any) -> Path:
    """Write the layout of a download: configs/model.yaml and checkpoints/last.ckpt."""
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "configs" / "model.yaml").write_text(yaml.safe_dump(published))
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder


@torch.no_grad()
def expected(network: Any, pixels_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (N, h, w) and decoded videos (N, C, H, W) of the package, as its second stage computes them.

    Its first stage decodes z + (vector - z) instead of the codebook vector. The rounding changes pixels by 1e-5.
    """
    codes, videos = [], []
    for frame_1CHW in frames_of(pixels_BTHWC).split(1):
        z_1Dhw = network.quant_conv(network.encoder(frame_1CHW))
        _, depth, h, w = z_1Dhw.shape
        if hasattr(network, "temperature_scheduler"):
            codes.append(network.quantize(z_1Dhw, return_logits=True)[3].argmax(1))
        else:
            _, _, (_, _, indices) = network.encode(frame_1CHW)
            codes.append(indices.view(1, h, w))
        quantized_1Dhw = network.quantize.get_codebook_entry(codes[-1].flatten(), (1, h, w, depth))
        videos.append(network.decode(quantized_1Dhw))
    return torch.cat(codes), torch.cat(videos)


def same_as_the_package(tokenizer: Any, network: Any, pixels_BTHWC: Tensor) -> Tensor:
    """Assert that codes and pixels equal those of the package, and return the codes."""
    codes_Nhw, videos_NCHW = expected(network, pixels_BTHWC)
    codes_Bthw = tokenizer.encode(pixels_BTHWC)
    assert torch.equal(codes_Bthw.flatten(0, 1), codes_Nhw)
    decoded: list[Tensor] = []
    hook = tokenizer.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))
    pixels = tokenizer.decode(codes_Bthw)
    hook.remove()
    assert (torch.cat(decoded) - videos_NCHW).abs().max() <= 1e-5
    assert pixels.dtype == torch.uint8 and pixels.shape == pixels_BTHWC.shape
    rounded_NHWC = to_uint8(rearrange(videos_NCHW, "n c h w -> n h w c"))
    assert torch.equal(pixels.flatten(0, 1), rounded_NHWC)
    return codes_Bthw


def refused(source: str) -> str:
    """Return the one-line error of loading a source."""
    with pytest.raises(ValueError) as error:
        load_tokenizer(source)
    message = str(error.value)
    assert "\n" not in message and len(message) < 800
    return message
