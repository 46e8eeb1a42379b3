"""Standard errors over seeds and over clips."""

import pytest
import torch

from pipelines.evaluation.errors import mean_over_clips, mean_over_seeds


def test_the_error_over_seeds_is_rounded_and_needs_two_seeds() -> None:
    assert mean_over_seeds([0.5, 0.7, 0.6]) == {"mean": 0.6, "stderr": 0.0577}
    assert mean_over_seeds([0.5]) == {"mean": 0.5, "stderr": None}


def test_the_error_over_clips_needs_two_clips() -> None:
    result = mean_over_clips(torch.tensor([0.5, 0.75, 1.0]))
    assert result == {"mean": 0.75, "stderr": pytest.approx(0.25 / 3**0.5, rel=1e-12)}
    assert mean_over_clips(torch.tensor([2.0])) == {"mean": 2.0, "stderr": None}
