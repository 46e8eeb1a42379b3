"""VideoMAE equals the public implementation with the same weights, and its masks hide the right tokens."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from ar_model.inputs import CodeSpec
from ar_model.objectives import VideoMAE
from ar_model.token_masking import draw_mask
from tests.helpers.small_arvideo import train

GRID = (4, 4, 4)
SIZES: dict[str, Any] = {
    "width": 24,
    "depth": 2,
    "heads": 2,
    "decoder_width": 12,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


def build(**changes: Any) -> VideoMAE:
    torch.manual_seed(0)
    codes = CodeSpec(shape=GRID, vocab_size=64, levels=((8, 8),), clip=(8, 32, 32))
    return VideoMAE(codes, **{"ratio": 0.75, **SIZES, **changes})


def batch(samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "codes_BTHW": torch.randint(64, (samples, *GRID), generator=generator),
        "pixels_BTHWC": torch.randint(256, (samples, 8, 32, 32, 3), generator=generator).to(torch.uint8),
        "seed_B": torch.arange(samples) * 7919 + 3,
    }


def renamed_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of transformers' VideoMAEForPreTraining to the names of this project."""
    ours = {}
    embedding = theirs.pop("videomae.embeddings.patch_embeddings.projection.weight")
    ours["embedding.projection.weight"] = rearrange(embedding, "d c t h w -> d (t h w c)")
    ours["embedding.projection.bias"] = theirs.pop("videomae.embeddings.patch_embeddings.projection.bias")
    ours["mask_D"] = theirs.pop("mask_token").flatten()
    ours["decoder.context.weight"] = theirs.pop("encoder_to_decoder.weight")
    for end in ("weight", "bias"):
        ours[f"encoder.norm.{end}"] = theirs.pop(f"videomae.layernorm.{end}")
        ours[f"decoder.norm.{end}"] = theirs.pop(f"decoder.norm.{end}")
        ours[f"target.head.{end}"] = theirs.pop(f"decoder.head.{end}")
    for prefix, name in (("videomae.encoder.layer", "encoder.blocks"), ("decoder.decoder_layers", "decoder.blocks")):
        for i in range(2):
            block, to = f"{prefix}.{i}", f"{name}.{i}"
            attention = f"{block}.attention.attention"
            key = theirs.pop(f"{attention}.key.weight")
            ours[f"{to}.attention.kv.weight"] = torch.cat([key, theirs.pop(f"{attention}.value.weight")])
            value_bias = theirs.pop(f"{attention}.value.bias")
            ours[f"{to}.attention.kv.bias"] = torch.cat([torch.zeros_like(value_bias), value_bias])
            for end in ("weight", "bias"):
                ours[f"{to}.attention.q.{end}"] = theirs.pop(f"{attention}.query.{end}")
                ours[f"{to}.attention.out.{end}"] = theirs.pop(f"{block}.attention.output.dense.{end}")
                ours[f"{to}.norm1.{end}"] = theirs.pop(f"{block}.layernorm_before.{end}")
                ours[f"{to}.norm2.{end}"] = theirs.pop(f"{block}.layernorm_after.{end}")
                ours[f"{to}.mlp.0.{end}"] = theirs.pop(f"{block}.intermediate.dense.{end}")
                ours[f"{to}.mlp.2.{end}"] = theirs.pop(f"{block}.output.dense.{end}")
    assert not theirs, sorted(theirs)
    return ours


def test_its_loss_and_gradients_are_those_of_the_public_implementation() -> None:
    transformers = pytest.importorskip("transformers", reason="the public implementation is not installed")
    torch.manual_seed(1)
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, tubelet_size=2, num_frames=8, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=96, decoder_hidden_size=12, decoder_num_attention_heads=2,
        decoder_intermediate_size=48, decoder_num_hidden_layers=2, layer_norm_eps=1e-6, use_mean_pooling=False,
    )  # fmt: skip
    theirs = transformers.VideoMAEForPreTraining(config).train()
    # Biases and the mask token are zero by default, which would hide mistakes in their names.
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 or "token" in name else 0.1)
    ours = build(flat=True, rope=False)
    ours.load_state_dict(renamed_weights(dict(theirs.state_dict())))
    data = batch(3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((data["pixels_BTHWC"] / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    hidden_BQ = draw_mask("tube", GRID, 0.75, data["seed_B"])[1]
    bool_masked = torch.zeros(3, 64).scatter(1, hidden_BQ, 1).bool()

    their_loss = theirs(pixel_values=pixels, bool_masked_pos=bool_masked).loss
    our_loss = ours(data)["loss"]
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    their_loss.backward()
    our_loss.backward()
    gradients = renamed_weights({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in ours.named_parameters():
        if not name.endswith("kv.bias"):
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("kind", "hidden"), [("tube", 4 * 14), ("frame", 3 * 16), ("random", 57)])
def test_a_mask_hides_its_share_and_covers_every_token_once(kind: Any, hidden: int) -> None:
    visible_BM, hidden_BQ = draw_mask(kind, GRID, 0.9, torch.arange(50))
    assert hidden_BQ.shape == (50, hidden)
    both_BL = torch.cat([visible_BM, hidden_BQ], dim=1).sort(dim=1).values
    assert (both_BL == torch.arange(64)).all()
    assert len(hidden_BQ.unique(dim=0)) > (3 if kind == "frame" else 40)  # samples differ


def test_tubes_hide_the_same_locations_in_all_slices_and_frames_hide_slices() -> None:
    locations = draw_mask("tube", GRID, 0.9, torch.arange(20))[1].view(20, 4, 14) % 16
    assert (locations == locations[:, :1]).all()
    slices = draw_mask("frame", GRID, 0.5, torch.arange(20))[1].view(20, 2, 16) // 16
    assert (slices == slices[..., :1]).all()


def test_every_token_is_hidden_equally_often() -> None:
    hidden = draw_mask("random", GRID, 0.5, torch.arange(4000))[1]
    counts = hidden.flatten().bincount(minlength=64) / 4000
    assert (counts - 0.5).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_a_mask_depends_on_the_seed_of_its_sample_only() -> None:
    batch_mask = draw_mask("tube", GRID, 0.9, torch.arange(8))[0]
    single_masks = torch.cat([draw_mask("tube", GRID, 0.9, torch.tensor([i]))[0] for i in range(8)])
    assert (batch_mask == single_masks).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.01}, "objective.ratio 0.01 of 16 .*hides nothing"),
        ({"ratio": 1.0}, "objective.ratio 1.0 .*leaves nothing visible"),
        ({"mask": "frame", "ratio": 0.2}, "objective.ratio 0.2 of 4 .*hides nothing"),
        ({"mask": "block"}, "objective.mask .*tube, random, frame, .*'block'"),
    ],
)
def test_invalid_masks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_cache_without_pixels_is_refused_with_the_flag_that_keeps_them() -> None:
    with pytest.raises(ValueError, match="--keep_pixels"):
        VideoMAE(CodeSpec(shape=GRID, vocab_size=64), **SIZES)


@pytest.mark.parametrize("content", ["codes", "pixels"])
def test_hidden_tokens_enter_the_loss_as_targets_only(content: Any) -> None:
    """The encoder gets the visible tokens only. The loss does not depend on hidden pixels of the input."""
    model = build(input=content, target="codes")
    data = batch(4)
    visible_BM, hidden_BQ = draw_mask("tube", GRID, 0.75, data["seed_B"])
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(lambda module, inputs, out: embedded.append(inputs[0]))
    before = model(data)["loss"]
    tokens = model.input.tokens(data)
    assert torch.equal(embedded[0], torch.stack([tokens[b, visible_BM[b]] for b in range(4)]))
    changed = {**data, "pixels_BTHWC": data["pixels_BTHWC"].clone()}
    if content == "pixels":
        rows = rearrange(changed["pixels_BTHWC"], "b (t pt) (h ph) (w pw) c -> b (t h w) pt ph pw c", pt=2, ph=8, pw=8)
        for b in range(4):
            rows[b, hidden_BQ[b]] = 0
        changed["pixels_BTHWC"] = rearrange(rows, "b (t h w) pt ph pw c -> b (t pt) (h ph) (w pw) c", t=4, h=4, w=4)
        assert model(changed)["loss"] == before
        for b in range(4):
            rows[b, visible_BM[b]] = 0
        changed["pixels_BTHWC"] = rearrange(rows, "b (t h w) pt ph pw c -> b (t pt) (h ph) (w pw) c", t=4, h=4, w=4)
        assert model(changed)["loss"] != before


@pytest.mark.parametrize("changes", [{}, {"input": "codes", "target": "codes"}, {"flat": True, "rope": False}])
def test_it_overfits_one_batch(changes: dict[str, Any]) -> None:
    losses = train(build(**{"ratio": 0.5, **changes}), [batch(2)] * 60, lr=1e-2)
    assert losses[-1] < 0.8 * losses[0]
