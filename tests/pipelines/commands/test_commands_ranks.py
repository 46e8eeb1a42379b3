"""Commands in several processes: no process waits for hours for another, and what any process has met is recorded."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import TINIEST, begin_ranks, last_line

SLOW = """
import sys, time
from pathlib import Path
from ar_model.probes import Outcomes
from pipelines.commands import evaluate_tokenizer, probe
from pipelines.engine.launch import command
from pipelines.settings.evaluate_tokenizer import EvaluateTokenizer
from pipelines.settings.probe import Probe

name, sign = sys.argv[1], Path(sys.argv[2])
sys.argv[:3] = [f"{name}.py"]


def wait():
    while not sign.exists():
        time.sleep(0.02)


def probe_all(*_):
    wait()
    return {"probed": True}, [Outcomes([], {}, {}, {}, {})]


def evaluate_all(run, *_):
    wait()
    run.finish_alone({"tokenizers": []})


probe._probe_all, evaluate_tokenizer._evaluate_all, evaluate_tokenizer._table = probe_all, evaluate_all, str
command(*{"probe": (Probe, probe.main), "evaluate_tokenizer": (EvaluateTokenizer, evaluate_tokenizer.main)}[name])
"""


@pytest.mark.parametrize("name", ["probe", "evaluate_tokenizer"])
def test_other_processes_end_while_the_first_one_works(name: str, finished_project: Path, tmp_path: Path) -> None:
    answers = json.loads((finished_project / "answers.json").read_text())
    run = str(finished_project / answers["train_tokenizer"]["run"])
    flags = {
        "probe": ["--run", str(finished_project / answers["pretrain_ar"]["run"]), "--seeds", "2"],
        "evaluate_tokenizer": ["--videos", "builtin:moving-digits:8:2", "--tokenizers", run],
    }
    command = [name, str(tmp_path / "sign"), *flags[name], "--out", str(tmp_path / "run")]
    first, second = begin_ranks(finished_project, "-c", SLOW, *command)
    result = second.wait(60)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert first.alive
    (tmp_path / "sign").touch()
    last_line(first.wait(60))
    assert (tmp_path / "run" / "summary.json").exists()


STOPPED = """
import json, os, sys
from pathlib import Path
from pipelines.commands import train_tokenizer
from pipelines.engine import checkpoints
from pipelines.engine.launch import command
from pipelines.settings.train_tokenizer import TrainTokenizer

met, fit = {}, train_tokenizer.fit


def recording_fit(*arguments, watch, **options):
    def record(batch):
        met.update(batch["skipped"])
        watch(batch)

    return fit(*arguments, watch=record, **options)


def stop(*_, **__):
    Path("met" + os.environ["RANK"]).write_text(json.dumps(sorted(met)))
    os._exit(0)


train_tokenizer.fit, checkpoints.save = recording_fit, stop
sys.argv[0] = "train_tokenizer.py"
command(TrainTokenizer, train_tokenizer.main)
"""


def test_damaged_videos_that_any_process_has_met_are_recorded_with_a_checkpoint(
    video_folder: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        shutil.copytree(video_folder, tmp_path / "videos" / split)
    for number in range(8):
        (tmp_path / "videos" / "train" / "left" / f"damaged {number}.mp4").write_text("no video")
    flags = [*TINIEST, "--videos", "videos", "--out", "run"]
    for rank in begin_ranks(tmp_path, "-c", STOPPED, *flags):
        result = rank.wait(60)
        assert result.returncode == 0, result.stderr
    met = [set(json.loads((tmp_path / f"met{rank}").read_text())) for rank in "01"]
    assert met[1] - met[0]
    assert met[0] | met[1] <= json.loads((tmp_path / "run" / "skipped.json").read_text()).keys()
