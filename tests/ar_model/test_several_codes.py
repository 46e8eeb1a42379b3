"""Several codes per place as input and as target."""

import itertools

import pytest
import torch

from ar_model.inputs import CodeEmbedding, CodeSpec, CodeTable, Patching, digits_of
from ar_model.objectives import ARVideo
from ar_model.targets import CodeTarget

LEVELS = ((2, 3), (4,), (5,))
SPEC = CodeSpec(shape=(2, 2, 2), vocab_size=6, codes_per_place=3, levels=LEVELS)
ROWS = CodeSpec(shape=(2, 2, 2), vocab_size=4, codes_per_place=2)
CODEBOOKS = CodeSpec(shape=(2, 2, 2), vocab_size=4, codes_per_place=2, codebook_VC=torch.randn(8, 3))


def random_codes(spec: CodeSpec, *shape: int) -> torch.Tensor:
    """Codes of all places, (*shape, G)."""
    return torch.stack([torch.randint(size, shape) for size in spec.vocabularies], -1)


def test_vector_of_a_code_is_the_sum_of_its_own_digits() -> None:
    table = CodeTable(SPEC, 7)
    assert table.digits is not None
    codes = random_codes(SPEC, 3, 5).view(3, 5, 3)
    first = [0, 5, 9]
    for g, levels in enumerate(LEVELS):
        rows, offset = digits_of(codes[..., g], levels), first[g]
        expected = torch.zeros(3, 5, 7)
        for i, level in enumerate(levels):
            expected = expected + table.digits[rows[..., i] + offset]
            offset += level
        assert torch.allclose(table(codes)[:, :, g], expected, atol=1e-6)


@pytest.mark.parametrize("spec", [SPEC, ROWS, CODEBOOKS])
def test_vectors_of_codes_are_rows_of_the_matrix(spec: CodeSpec) -> None:
    """With few codes, the vectors are computed without the matrix."""
    table, groups = CodeTable(spec, 7), spec.codes_per_place
    start = [sum(spec.vocabularies[:g]) for g in range(groups)]
    for clips in (1, 40):
        codes = random_codes(spec, clips, 1, 2).flatten(2)
        rows = codes + torch.tensor(start).repeat(2)
        assert torch.allclose(table(codes), table.matrix()[rows], atol=1e-6)


def test_tokens_hold_the_codes_of_their_places_in_order() -> None:
    codes = torch.arange(2 * 2 * 4 * 4 * 3).view(2, 2, 4, 4, 3)
    tokens = Patching("codes", (2, 2, 2)).tokens({"codes_BTHW": codes})
    assert tokens.shape == (2, 4, 24)
    assert torch.equal(tokens[:, 1], codes[:, :, :2, 2:].flatten(1))


def test_embedding_merges_the_codes_of_a_token() -> None:
    embedding = CodeEmbedding(SPEC, 7, 2)
    codes = random_codes(SPEC, 4, 5, 2).flatten(2)
    assert embedding.merge is not None and embedding.merge.in_features == 6 * 7
    assert torch.allclose(embedding(codes), embedding.merge(embedding.table(codes).flatten(2)), atol=1e-6)


@pytest.mark.parametrize("likelihood", ["joint", "digits"])
def test_probabilities_of_all_codes_of_a_place_sum_to_one(likelihood: str) -> None:
    torch.manual_seed(0)
    target = CodeTarget(SPEC, 8, likelihood=likelihood)  # type: ignore[arg-type]
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    h = torch.randn(1, 1, 8)
    places = itertools.product(*(range(size) for size in SPEC.vocabularies))
    nats = [3 * target(h, torch.tensor(place).view(1, 1, 3)) for place in places]
    assert torch.stack(nats).neg().exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_likelihood_is_by_digits_only_for_several_codes_with_digits() -> None:
    one = CodeSpec(shape=(2, 2, 2), vocab_size=6, levels=((2, 3),))
    by_digits = [CodeTarget(spec, 8).levels is not None for spec in (SPEC, one, ROWS, CODEBOOKS)]
    assert by_digits == [True, False, False, False]
    assert CodeTarget(SPEC, 8, likelihood="joint").levels is None


@pytest.mark.parametrize("likelihood", ["joint", "digits"])
def test_weights_of_tokens_count_all_their_codes(likelihood: str) -> None:
    target = CodeTarget(SPEC, 8, 2, likelihood=likelihood)  # type: ignore[arg-type]
    h, codes = torch.randn(2, 4, 8), random_codes(SPEC, 2, 4, 2).flatten(2)
    share = torch.zeros(2, 4)
    share[1, 2] = 1
    assert torch.allclose(target(h, codes, share), target(h[1:, 2:3], codes[1:, 2:3]), atol=1e-6)
    assert torch.allclose(target(h, codes, torch.full((2, 4), 1 / 8)), target(h, codes), atol=1e-6)


def test_json_form_keeps_everything() -> None:
    for spec in (SPEC, ROWS, CODEBOOKS, CodeSpec(shape=(2, 2, 2), vocab_size=6, levels=((2, 3),))):
        copy = CodeSpec.from_json(spec.to_json())
        names = ("shape", "vocab_size", "codes_per_place", "levels", "clip", "vocabularies")
        assert [getattr(copy, name) for name in names] == [getattr(spec, name) for name in names]
    assert CodeSpec(shape=(2, 2, 2), vocab_size=6, levels=((2, 3),)).to_json()["levels"] == (2, 3), "as in older models"


def test_arvideo_trains_on_several_codes() -> None:
    torch.manual_seed(0)
    spec = CodeSpec(shape=(4, 4, 4), vocab_size=6, codes_per_place=3, levels=LEVELS)
    model = ARVideo(spec, clusters=(2, 2, 2), width=16, heads=2, depth=1, decoder_width=16, decoder_heads=2)
    batch = {"codes_BTHW": random_codes(spec, 8, 4, 4, 4), "seed_B": torch.arange(8)}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.features(batch)[0].shape == (8, 64, 16)
