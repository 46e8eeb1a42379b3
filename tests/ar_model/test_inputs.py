"""Codes are embedded by their geometry: digits or codebook vectors."""

import itertools
import json

import pytest
import torch
from vector_quantize_pytorch import FSQ

from ar_model.inputs import CodeEmbedding, CodeSpec, CodeTable, digits_of

LEVELS = (5, 3, 4)
DIGITS = CodeSpec(shape=(2, 2, 2), vocab_size=60, levels=(LEVELS,))
CODEBOOK = CodeSpec(
    shape=(2, 2, 2), vocab_size=24, codebook_VC=torch.randn(24, 4, generator=torch.Generator().manual_seed(5))
)
PLAIN = CodeSpec(shape=(2, 2, 2), vocab_size=17)
SPECS = [pytest.param(spec, id=name) for spec, name in [(DIGITS, "digits"), (CODEBOOK, "codebook"), (PLAIN, "plain")]]


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (5, 3, 4), (7,), (3, 3, 3, 3, 3)])
def test_digits_equal_those_of_the_fsq_library(levels: tuple[int, ...]) -> None:
    fsq = FSQ(list(levels))
    codes = torch.arange(fsq.codebook_size)
    digits = digits_of(codes, levels)
    assert torch.equal(digits, fsq.indices_to_level_indices(codes).long())
    # In the quantizer too, the vector of a code is its rescaled digits.
    half = torch.tensor(levels) // 2
    assert torch.allclose((digits - half) / half, fsq.indices_to_codes(codes).float())


def test_digits_keep_the_shape_of_the_codes() -> None:
    codes = torch.randint(0, 60, (2, 3, 4))
    digits = digits_of(codes, LEVELS)
    assert digits.shape == (2, 3, 4, 3)
    assert torch.equal(digits[..., 0] + 5 * digits[..., 1] + 15 * digits[..., 2], codes)


@pytest.mark.parametrize("by_geometry, free_rows", itertools.product([True, False], repeat=2))
@pytest.mark.parametrize("spec", SPECS)
def test_rows_of_the_matrix_are_the_vectors_of_the_codes(spec: CodeSpec, by_geometry: bool, free_rows: bool) -> None:
    torch.manual_seed(0)
    table = CodeTable(spec, 6, by_geometry=by_geometry, free_rows=free_rows)
    if table.rows is not None:
        torch.nn.init.normal_(table.rows)
    codes = torch.randint(0, spec.vocab_size, (3, 5))
    assert table.matrix().shape == (spec.vocab_size, 6)
    assert torch.equal(table(codes), table.matrix()[codes])
    assert len(table.matrix().unique(dim=0)) == spec.vocab_size


def test_codes_that_share_digits_share_components() -> None:
    torch.manual_seed(0)
    matrix = CodeTable(DIGITS, 6).matrix().view(4, 3, 5, 6)  # the highest digit comes first
    # Changing one digit adds the same vector for all values of the other digits.
    for axis in range(3):
        steps = matrix.diff(dim=axis).movedim(axis, 0).flatten(1, 2)
        assert torch.allclose(steps, steps[:, :1].expand_as(steps), atol=1e-5)
        assert steps.norm(dim=-1).min() > 1e-2


def test_a_gradient_step_changes_all_codes_that_share_a_digit() -> None:
    table = CodeTable(DIGITS, 6)
    before = table.matrix().detach().clone()
    table(torch.tensor([7])).sum().backward()
    with torch.no_grad():
        for p in table.parameters():
            if p.grad is not None:
                p -= p.grad
    shared = (digits_of(torch.arange(60), LEVELS) == digits_of(torch.tensor([7]), LEVELS)).sum(1)
    assert torch.allclose((before - table.matrix()).detach(), shared[:, None].expand(60, 6).float(), atol=1e-5)


def test_a_table_of_rows_shares_nothing_between_codes() -> None:
    table = CodeTable(DIGITS, 6, by_geometry=False)
    table(torch.tensor([7])).sum().backward()
    touched = torch.cat([p.grad for p in table.parameters() if p.grad is not None]).abs().sum(1)
    assert touched.nonzero().flatten().tolist() == [7]


def test_codes_with_close_codebook_vectors_have_close_embeddings() -> None:
    vectors = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    vectors[3] = vectors[8]
    table = CodeTable(CodeSpec(shape=(1, 1, 1), vocab_size=10, codebook_VC=vectors), 6)
    matrix = table.matrix()
    assert torch.equal(matrix[3], matrix[8])
    assert not torch.allclose(matrix[3], matrix[4], atol=1e-2)


def test_the_scale_of_a_codebook_does_not_matter() -> None:
    assert CODEBOOK.codebook_VC is not None
    tables = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        tables.append(
            CodeTable(CodeSpec(shape=(1, 1, 1), vocab_size=24, codebook_VC=CODEBOOK.codebook_VC * scale), 6).matrix()
        )
    assert torch.allclose(tables[0], tables[1], atol=1e-5)


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_the_embedding_sees_every_code_of_a_token_in_its_place(patch: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    per_token = patch[0] * patch[1] * patch[2]
    embedding = CodeEmbedding(DIGITS, 6, per_token)
    codes = torch.randint(0, 59, (2, 3, per_token))
    before = embedding(codes)
    assert before.shape == (2, 3, 6)
    for place in range(per_token):
        changed = codes.clone()
        changed[0, 1, place] += 1
        moved = (embedding(changed) != before).any(-1)
        assert moved.nonzero().tolist() == [[0, 1]]


def test_levels_or_a_codebook_that_do_not_fit_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="59.*60"):
        CodeSpec(shape=(1, 1, 1), vocab_size=59, levels=(LEVELS,))
    with pytest.raises(ValueError, match="25.*24"):
        CodeSpec(shape=(1, 1, 1), vocab_size=25, codebook_VC=CODEBOOK.codebook_VC)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("clip", [None, (8, 16, 16)])
def test_a_code_spec_survives_json(spec: CodeSpec, clip: tuple[int, int, int] | None) -> None:
    original = CodeSpec(
        shape=spec.shape, vocab_size=spec.vocab_size, levels=spec.levels, codebook_VC=spec.codebook_VC, clip=clip
    )
    loaded = CodeSpec.from_json(json.loads(json.dumps(original.to_json())))
    assert (loaded.shape, loaded.vocab_size, loaded.levels) == (spec.shape, spec.vocab_size, spec.levels)
    assert loaded.clip == clip
    assert loaded.to_json() == original.to_json()
