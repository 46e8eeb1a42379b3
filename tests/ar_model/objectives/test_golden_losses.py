"""Short training runs reproduce recorded losses.

The relative tolerance is 1e-6. Other kernels, instruction sets and numbers of threads change the loss by 2e-7. A larger
difference means that the computation, the initial weights or the random draws have changed, which must be intended.
"""

from typing import Any

import pytest
import torch

from ar_model.attention import set_backend
from ar_model.objectives import Objective
from tests.helpers.small_arvideo import Batch, build, random_batch, train
from tests.helpers.small_objectives import MODELS, batch_of

SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"targets": 1.0},
    "digits": {"likelihood": "digits", "code_patch": (2, 1, 1), "rope": False},
    "masked": {"causal": False},
    "pixels": {"input": "pixels", "target": "pixels", "targets": 1.0},
    "ranks": {"ranks": 0.5, "decoder_self": True, "rope": False},
}


TOLERANCE = {"VIMPAC": 2e-5}
"""VIMPAC's batch normalisation amplifies rounding errors. Other kernels and numbers of threads change its loss by 4e-6."""


def model_and_batches(name: str) -> tuple[Objective, list[Batch]]:
    """Return a model and twenty batches."""
    if name in SETTINGS:
        return build(**SETTINGS[name]), [random_batch(4, seed=step) for step in range(20)]
    torch.manual_seed(0)
    clips = 32 if name.startswith("VIMPAC") else 4  # batch normalisation over few clips is unstable
    return MODELS[name](), [batch_of(clips, seed=step) for step in range(20)]


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("name", [*SETTINGS, *MODELS])
def test_twenty_training_steps_reproduce_the_recorded_losses(name: str, backend: str) -> None:
    model, batches = model_and_batches(name)
    set_backend(model.train(), backend)
    assert train(model, batches) == pytest.approx(LOSSES[name], rel=TOLERANCE.get(name, 1e-6), abs=0)


@pytest.mark.parametrize("name", [*SETTINGS, *MODELS])
def test_a_seed_reproduces_the_recorded_initial_weights(name: str) -> None:
    total = sum(p.detach().double().abs().sum().item() for p in model_and_batches(name)[0].parameters())
    assert total == pytest.approx(WEIGHTS[name], rel=1e-6)


# fmt: off
LOSSES = {
    "paper": [
        4.2906413, 4.2126908, 4.2609029, 4.2198482, 4.146102, 4.1960449, 4.2707286, 4.1852446, 4.250526, 4.1343184,
        4.1725669, 4.1757383, 4.1819825, 4.2027545, 4.1634507, 4.1695509, 4.1711631, 4.1793046, 4.1800575, 4.1628699,
    ],
    "digits": [
        4.1785979, 4.1454549, 4.1527429, 4.1823359, 4.1708851, 4.1439071, 4.1666474, 4.181972, 4.1534324, 4.2104506,
        4.2090364, 4.1716237, 4.1830735, 4.1592212, 4.1615934, 4.186264, 4.1644034, 4.1635799, 4.1796732, 4.1779919,
    ],
    "masked": [
        4.2697902, 4.2804236, 4.2776656, 4.3659129, 4.2637925, 4.3176427, 4.1090217, 4.1918783, 4.2997174, 4.2124925,
        4.2828021, 4.2457175, 4.1596398, 4.1524496, 4.158258, 4.1801467, 4.2027254, 4.1192126, 4.1776681, 4.1666784,
    ],
    "pixels": [
        1.5230055, 1.2960927, 1.2906984, 1.2166449, 1.1371086, 1.1047025, 1.1299713, 1.0392911, 0.97620326, 1.0031271,
        0.9820624, 0.92422432, 0.93768895, 0.95630372, 0.9018386, 0.90376472, 0.91283727, 0.89537066, 0.89804107, 0.89976901,
    ],
    "ranks": [
        4.4184656, 4.1730261, 4.1796155, 4.2307205, 4.0037541, 4.2271972, 4.3551764, 4.3113513, 4.2072768, 4.3570881,
        4.3121433, 4.2422543, 4.13029, 4.1662617, 4.0849895, 4.2322421, 4.2029057, 4.1910634, 4.1144147, 4.250608,
    ],
    "VideoMAE": [
        1.3182501, 1.2376375, 1.1674848, 1.1343471, 1.1087229, 1.0695602, 1.0453979, 1.0282149, 1.0181, 1.0140792,
        1.0000526, 0.99515426, 0.98774159, 0.98731953, 0.98400348, 0.98325473, 0.98434901, 0.98162675, 0.97860909, 0.97904503,
    ],
    "VIMPAC": [
        5.6852379, 5.5834327, 5.5835695, 5.5249724, 5.513217, 5.4000893, 5.4496937, 5.4375997, 5.493125, 5.4214978,
        5.4222579, 5.3918018, 5.3989649, 5.3994389, 5.4619479, 5.3638744, 5.3912654, 5.3543615, 5.3634491, 5.3646746,
    ],
    "VIMPAC, one row per code": [
        6.0129986, 5.7363052, 5.5428538, 5.5508561, 5.5632887, 5.4938664, 5.429287, 5.4816165, 5.5076666, 5.4186096,
        5.4493589, 5.4293027, 5.4098682, 5.4256158, 5.3926249, 5.3866439, 5.3846045, 5.4009156, 5.4259529, 5.3999019,
    ],
    "MAM2": [
        7.0967331, 6.6197863, 6.477746, 6.2329297, 6.075779, 5.9466429, 5.8603449, 5.8233275, 5.6570115, 5.6162806,
        5.497683, 5.4071941, 5.3965182, 5.2730837, 5.2509093, 5.1773281, 5.1606345, 5.1731915, 5.1154084, 5.17591,
    ],
}
# fmt: on
WEIGHTS = {
    "paper": 1957.65104,
    "digits": 1978.35264,
    "masked": 1957.65104,
    "pixels": 1903.87428,
    "ranks": 2377.84785,
    "VideoMAE": 3453.79548,
    "VIMPAC": 2460.59548,
    "VIMPAC, one row per code": 2772.31008,
    "MAM2": 7182.03517,
}
