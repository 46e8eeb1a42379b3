"""Names of run folders: settings that were added later do not change the name of an earlier run at their default."""

from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from pipelines.engine.config import parse
from pipelines.engine.run import LATER, Run
from pipelines.settings.pretrain_ar import Pretrain
from pipelines.settings.tokenize import Tokenize
from pipelines.settings.train_tokenizer import TrainTokenizer

# Names from before these settings. The hash does not depend on the machine.
OLD = ["--batch_size=16", "--lr=3e-3", "--objective.likelihood=joint"]
"""Defaults of that time."""
EARLIER = [
    (Pretrain, OLD, "pretrain_ar-c17bf9fb"),
    (Pretrain, ["--objective", "VIMPAC", "--steps", "7", *OLD], "pretrain_ar-950f1cdd"),
    (Tokenize, ["--tokenizer", "runs/t"], "tokenize-08514c54"),
    (TrainTokenizer, ["--clip.views", "4", "--loss.discriminator", "3d"], "train_tokenizer-43adc86e"),
]


def run_of(schema: type, *flags: str) -> Run:
    command = {Pretrain: "pretrain_ar", Tokenize: "tokenize", TrainTokenizer: "train_tokenizer"}[schema]
    return Run(command, *parse(schema, flags), about="videos")


@pytest.mark.parametrize("schema, flags, name", EARLIER, ids=[name for *_, name in EARLIER])
def test_earlier_runs_keep_their_names(schema: type, flags: list[str], name: str) -> None:
    assert run_of(schema, *flags).folder.name == name


@pytest.mark.parametrize(
    "schema, flag",
    [
        (Pretrain, "--betas=[0.9,0.98]"),
        (Pretrain, "--lr_floor=0.1"),
        (Pretrain, "--decay=linear"),
        (Pretrain, "--objective.dropped_only=true"),
        (Tokenize, "--clip.fps=2"),
        (Tokenize, "--clip.scales=[1,0.5]"),
        (TrainTokenizer, "--loss.discriminator_betas=[0.5,0.9]"),
        (TrainTokenizer, "--loss.motion=4"),
    ],
)
def test_other_values_of_these_settings_change_the_name(schema: type, flag: str) -> None:
    # The built-in videos have no frame rate.
    flags = {TrainTokenizer: ["--loss.discriminator=3d"], Tokenize: ["--videos=v"]}.get(schema, [])
    assert run_of(schema, *flags, flag).folder != run_of(schema, *flags).folder


def test_an_earlier_run_is_resumed_and_another_value_is_refused(tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path / "run")]
    run_of(Pretrain, *flags).begin(Accelerator(cpu=True))
    config = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    for name in LATER:
        *parents, last = name.split(".")
        part = settings
        for parent in parents:
            part = part.get(parent, {})
        part.pop(last, None)
    config.write_text(yaml.safe_dump(settings))
    run_of(Pretrain, *flags).begin(Accelerator(cpu=True))
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"lr_floor was None, is now 0\.5"):
        run_of(Pretrain, *flags, "--lr_floor", "0.5").begin(Accelerator(cpu=True))
