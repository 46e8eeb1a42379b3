"""Encoding and decoding do not change a tokenizer in any mode, even inside another module. Freezing is permanent."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.small_tokenizers import QUANTIZERS, build, pixels, same, state
from tokenizer import VQ3D, VideoTokenizer, load_tokenizer
from tokenizer.base import PIECE


class StageTwo(nn.Module):
    """A model with a tokenizer as a submodule."""

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.head = nn.Sequential(nn.Embedding(tokenizer.vocab_size, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, pixels_BTHWC: Tensor) -> Tensor:
        codes = self.tokenizer.encode(pixels_BTHWC)
        outputs = self.tokenizer(pixels_BTHWC)
        assert isinstance(self.tokenizer, VQ3D) and torch.equal(outputs["codes"], codes)
        return self.head(codes).mean() + outputs["video"].mean() + outputs["quantizer"]


@pytest.mark.parametrize("quantizer, steps", [("emavq16", 1000), ("fsq240", 100), ("lfq16", 100), ("simvq16", 100)])
def test_training_a_parent_module_does_not_change_a_loaded_tokenizer(
    tmp_path: Path, quantizer: str, steps: int
) -> None:
    build(f"vq3d-2x4x4-{quantizer}").save_pretrained(tmp_path)
    torch.manual_seed(0)
    parent = StageTwo(load_tokenizer(str(tmp_path)))
    tokenizer = parent.tokenizer
    before, weights = tokenizer.fingerprint(), state(tokenizer)
    clips = pixels(4, 2, 8, 8)
    codes = tokenizer.encode(clips)
    optimizer = torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        parent.train()
        assert parent.head.training and not any(part.training for part in tokenizer.modules())
        parent(torch.randint(0, 256, (2, 2, 4, 4, 3), dtype=torch.uint8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tokenizer.fingerprint() == before and same(state(tokenizer), weights)
    assert torch.equal(tokenizer.encode(clips), codes)


def test_freezing_is_permanent() -> None:
    tokenizer = build("vq3d-2x4x4-emavq16").train()
    assert tokenizer.freeze() is tokenizer
    for parent in (tokenizer, nn.ModuleList([tokenizer]), nn.Sequential(nn.ModuleList([tokenizer]))):
        parent.train()
        assert not any(part.training for part in tokenizer.modules())
        parent.train(True).eval().train()
        assert not any(part.training for part in tokenizer.modules())
    assert not any(p.requires_grad for p in tokenizer.parameters())


def test_a_tokenizer_that_is_not_frozen_trains() -> None:
    """Control: freezing is not the default, and training does change weights."""
    tokenizer = build("vq3d-2x4x4-emavq16")
    before = tokenizer.fingerprint()
    tokenizer(pixels(8, seed=4))
    assert tokenizer.fingerprint() == before
    nn.ModuleList([tokenizer]).train()
    assert all(part.training for part in tokenizer.modules())
    tokenizer(pixels(8, seed=4))
    assert tokenizer.fingerprint() != before


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, "noisy"])
def test_encoding_and_decoding_in_training_mode_change_no_state_and_use_no_random_numbers(quantizer: str) -> None:
    noisy = {"preserve_symmetry": True, "noise_dropout": 1.0}
    tokenizer = build("vq3d-2x4x4-fsq240", options=noisy) if quantizer == "noisy" else build(f"vq3d-2x4x4-{quantizer}")
    # 40 codes along time, so that clips are also encoded in pieces.
    clips = pixels(8, 80, seed=3)
    codes, short = tokenizer.encode(clips), tokenizer.encode(clips[:, :8])
    video = tokenizer.decode(codes)
    tokenizer.train()
    tokenizer.quantizer.eval()
    tokenizer.encoder[1].eval()
    modes = [part.training for part in tokenizer.modules()]
    before, generator = state(tokenizer), torch.get_rng_state()
    for _ in range(2):
        assert torch.equal(tokenizer.encode(clips), codes)
        assert torch.equal(tokenizer.encode(clips[:, :8]), short)
        assert torch.equal(tokenizer.decode(codes), video)
        assert torch.equal(torch.cat(list(tokenizer.encode_stream(clips.split(9, 1))), 1), codes)
        assert torch.equal(torch.cat(list(tokenizer.decode_stream(codes.split(9, 1))), 1), video)
        assert [part.training for part in tokenizer.modules()] == modes
        tokenizer.train()
        modes = [part.training for part in tokenizer.modules()]
    assert all(modes)
    assert torch.equal(torch.get_rng_state(), generator)
    assert same(state(tokenizer), before)


class Watched(VQ3D):
    """A tokenizer that records its mode when it encodes or decodes, in place of one with dropout."""

    def encode_piece(self, pixels_BTHWC: Tensor) -> Tensor:
        self.modes.append(any(part.training for part in self.modules()))
        return super().encode_piece(pixels_BTHWC)

    def decode_piece(self, codes_Bthw: Tensor) -> Tensor:
        self.modes.append(any(part.training for part in self.modules()))
        return super().decode_piece(codes_Bthw)


def test_every_piece_is_encoded_and_decoded_in_evaluation_mode() -> None:
    tokenizer = Watched(width=8, depth=0).train()
    tokenizer.modes = []
    for frames in (4, 200):
        tokenizer.decode(tokenizer.encode(pixels(1, frames, 8, 8)))
    assert len(tokenizer.modes) == 2 + 2 * math.ceil(100 / PIECE) > 4 and not any(tokenizer.modes)
    assert tokenizer.training


def test_the_mode_of_each_submodule_is_restored_after_an_error() -> None:
    tokenizer = build("vq3d-2x4x4-emavq16", fitted=False)
    tokenizer.train()
    tokenizer.decoder.eval()
    modes = [part.training for part in tokenizer.modules()]
    with pytest.raises(ValueError, match="never trained"):
        tokenizer.encode(pixels())
    with pytest.raises(ValueError, match="never trained"):
        list(tokenizer.encode_stream([pixels()]))
    assert [part.training for part in tokenizer.modules()] == modes


def test_between_pieces_of_a_stream_training_mode_and_gradients_are_enabled() -> None:
    tokenizer = build("vq3d-2x4x4-emavq16").train()
    for stream in (
        tokenizer.encode_stream(pixels(1, 8 * PIECE).split(50, 1)),
        tokenizer.decode_stream(torch.zeros(1, 4 * PIECE, 2, 2, dtype=torch.long).split(25, 1)),
    ):
        count = 0
        for part in stream:
            assert all(module.training for module in tokenizer.modules()) and torch.is_grad_enabled()
            assert not part.requires_grad
            count += 1
        assert count > 2


def test_an_untrained_codebook_is_refused() -> None:
    """If it were accepted, the first input of `encode` would initialise the codebook."""
    tokenizer = build("vq3d-2x4x4-emavq16", fitted=False)
    before = state(tokenizer)
    for mode in (False, True):
        with pytest.raises(ValueError, match="never trained"):
            tokenizer.train(mode).encode(pixels(8))
    assert same(state(tokenizer), before)


def test_training_initialises_a_learned_codebook_and_keeps_updating_it() -> None:
    tokenizer = build("vq3d-2x4x4-emavq16", fitted=False).train()
    assert not tokenizer.codebook().any()
    for seed in range(3):
        before = tokenizer.codebook().clone()
        tokenizer(pixels(16, seed=seed))
        assert not torch.equal(tokenizer.codebook(), before)
    assert len(tokenizer.codebook().unique(dim=0)) > 8


def test_a_reloaded_codebook_is_not_initialised_again(tmp_path: Path) -> None:
    tokenizer = build("vq3d-2x4x4-emavq16")
    tokenizer.save_pretrained(tmp_path)
    loaded = VQ3D.from_pretrained(tmp_path, strict=True)
    for model in (tokenizer, loaded):
        torch.manual_seed(3)
        model.train()(pixels(8, seed=7))
    assert same(state(loaded), state(tokenizer))
