"""VQGANs of taming-transformers have the codes and pixels of the package, loaded from its published files."""

import os
import shutil
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from data.cache import TokenCache
from data.cache.layout import CodeLayout
from tests.helpers.commands import TINY_MODEL, last_line, start
from tests.helpers.vqgan_folders import PUBLISHED, build, lightning_checkpoint, same_as_the_package, write
from tokenizer import load_tokenizer
from tokenizer.taming import load_taming

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def real_clips() -> Tensor:
    """Frames of real videos from the folder ARVIDEO_TEST_CLIPS: (4, 2, 64, 96, 3)."""
    if "ARVIDEO_TEST_CLIPS" not in os.environ:
        pytest.skip("ARVIDEO_TEST_CLIPS names no folder of videos")
    paths = Path(os.environ["ARVIDEO_TEST_CLIPS"]).rglob("*")
    files = sorted(path for path in paths if path.suffix in (".mp4", ".avi"))
    return torch.stack([_first_frames(file) for file in files[:: len(files) // 4][:4]])


def _first_frames(file: Path) -> Tensor:
    with av.open(str(file)) as container:
        images = islice(container.decode(video=0), 2)
        frames = [image.to_ndarray(width=96, height=64, format="rgb24") for image in images]
    return torch.from_numpy(np.stack(frames))


# --- parity with the package


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_layout_gives_the_codes_and_pixels_of_the_package(
    package: ModuleType, photographs: Tensor, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    network = build(package, PUBLISHED[name], photographs)
    folder = write(tmp_path / "vqgan", PUBLISHED[name], lightning_checkpoint(network))
    capsys.readouterr()
    tokenizer = load_tokenizer(f"taming:{folder}")
    shutil.rmtree(folder)
    assert capsys.readouterr().out == ""
    assert tokenizer.name == name
    codes_Bthw = same_as_the_package(tokenizer, network, photographs[:, :1])
    assert codes_Bthw.shape == (2, *tokenizer.codes_shape(1, 64, 96))
    # With few distinct codes, equality would prove little.
    assert len(codes_Bthw.unique()) > codes_Bthw.numel() / 4


@pytest.mark.soak
@pytest.mark.parametrize("name", PUBLISHED)
def test_parity_holds_on_real_videos(package: ModuleType, real_clips: Tensor, tmp_path: Path, name: str) -> None:
    network = build(package, PUBLISHED[name], real_clips)
    folder = write(tmp_path / "vqgan", PUBLISHED[name], lightning_checkpoint(network))
    tokenizer = load_tokenizer(f"taming:{folder}")
    shutil.rmtree(folder)
    same_as_the_package(tokenizer, network, real_clips)


def test_the_old_quantizer_is_selected_by_its_name(vqgan: tuple[Path, Any], details: Tensor) -> None:
    from taming.modules.vqvae.quantize import VectorQuantizer

    folder, network = vqgan
    today = load_tokenizer(f"taming:{folder}")
    old = load_tokenizer(f"taming:{folder}?quantizer=VectorQuantizer")
    assert isinstance(old.quantize, VectorQuantizer)
    same_as_the_package(today, network, details)
    before = network.quantize
    network.quantize = VectorQuantizer(before.n_e, before.e_dim, beta=0.25)
    network.quantize.load_state_dict(before.state_dict())
    same_as_the_package(old, network, details)
    assert old.fingerprint() != today.fingerprint()
    assert load_tokenizer(f"taming:{folder}?quantizer=VectorQuantizer2").fingerprint() == today.fingerprint()


def test_ties_between_codes_give_the_lowest_code(vqgan: tuple[Path, Any], details: Tensor) -> None:
    """The package does the same."""
    folder, network = vqgan
    network.quantize.embedding.weight.data[7:] = network.quantize.embedding.weight.data[3]
    torch.save(lightning_checkpoint(network), folder / "checkpoints" / "last.ckpt")
    for source in (f"taming:{folder}", f"taming:{folder}?quantizer=VectorQuantizer"):
        codes = load_tokenizer(source).encode(details)
        assert (codes == 3).any() and codes.max() < 7


# --- the interface of all tokenizers


def test_codes_of_a_frame_do_not_depend_on_other_frames_or_clips(small: tuple[Path, Any], details: Tensor) -> None:
    tokenizer = load_tokenizer(f"taming:{small[0]}")
    codes_Bthw = tokenizer.encode(details)
    assert codes_Bthw.dtype == torch.int64
    for b in range(2):
        for t in range(2):
            alone = details[b : b + 1, t : t + 1]
            assert torch.equal(tokenizer.encode(alone)[0, 0], codes_Bthw[b, t])
            assert torch.equal(
                tokenizer.decode(codes_Bthw[b : b + 1, t : t + 1]), tokenizer.decode(codes_Bthw)[b, t][None, None]
            )
    # No Gumbel noise.
    assert torch.equal(tokenizer.encode(details), codes_Bthw)
    assert torch.equal(tokenizer.encode(details.repeat(1, 20, 1, 1, 1)), codes_Bthw.repeat(1, 20, 1, 1))
    assert tokenizer.encode(details[:0]).shape == (0, *codes_Bthw.shape[1:])


def test_attributes_describe_the_codes(small: tuple[Path, Any]) -> None:
    folder, network = small
    tokenizer = load_tokenizer(f"taming:{folder}")
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.levels) == (32, (1, 2, 2), None)
    assert (tokenizer.causal, tokenizer.context) == (False, (0, 0))
    codebook = tokenizer.codebook()
    vectors = network.quantize.embed if hasattr(network.quantize, "embed") else network.quantize.embedding
    assert codebook is not None and torch.equal(codebook, vectors.weight)


def test_a_loaded_tokenizer_stays_in_evaluation_mode(vqgan: tuple[Path, Any]) -> None:
    tokenizer = load_taming(vqgan[0])
    nn.Sequential(tokenizer).train()
    assert not any(module.training for module in tokenizer.modules())
    assert not any(p.requires_grad for p in tokenizer.parameters())


def test_the_fingerprint_changes_with_weights_and_configuration(small: tuple[Path, Any]) -> None:
    folder, network = small
    first = load_tokenizer(f"taming:{folder}").fingerprint()
    project_file = folder / "configs" / "model.yaml"
    settings = yaml.safe_load(project_file.read_text())
    # This change leaves names and shapes of the weights as they are.
    settings["model"]["params"]["ddconfig"]["attn_resolutions"] = [8, 4]
    project_file.write_text(yaml.safe_dump(settings))
    second = load_tokenizer(f"taming:{folder}").fingerprint()
    network.decoder.conv_out.bias.data[0] += 1
    torch.save(lightning_checkpoint(network), folder / "checkpoints" / "last.ckpt")
    third = load_tokenizer(f"taming:{folder}").fingerprint()
    assert len({first, second, third}) == 3
    assert third == load_tokenizer(f"taming:{folder}").fingerprint()


def test_bf16_leaves_the_quantizer_in_fp32(vqgan: tuple[Path, Any], details: Tensor) -> None:
    tokenizer: Any = load_tokenizer(f"taming:{vqgan[0]}")
    dtypes: list[torch.dtype] = []
    tokenizer.quantize.register_forward_pre_hook(lambda module, inputs: dtypes.append(inputs[0].dtype))
    tokenizer.encoder.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        tokenizer.encode(details[:1, :1])
    assert dtypes == [torch.bfloat16, torch.float32]


def test_tokenize_and_pretrain_ar_work_with_it(vqgan: tuple[Path, Any], video_folder: Path, tmp_path: Path) -> None:
    """The codes of two frames form one token."""
    flags = ["--videos", str(video_folder), "--clip.frames", "4", "--clip.size", "16"]
    tokenized = last_line(start(tmp_path, "tokenize", *flags, "--tokenizer", f"taming:{vqgan[0]}"))
    cache = TokenCache.open(tmp_path / tokenized["cache"])
    assert cache.layout == CodeLayout((4, 8, 8), 32)
    assert np.array_equal(cache.codebook(), vqgan[1].quantize.embedding.weight.detach())
    trained = last_line(start(tmp_path, "pretrain_ar", *TINY_MODEL, "--objective.code_patch", "[2,1,1]"))
    assert trained["cache"] == tokenized["cache"] and trained["bits_per_code"] > 0
