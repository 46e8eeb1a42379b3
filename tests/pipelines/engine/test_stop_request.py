"""A training run that gets a signal ends after a step, with a checkpoint, on all ranks after the same step."""

import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.engine.signals import STOP_SIGNALS, Stopped
from pipelines.engine.stop_request import StopRequest
from tests.helpers.commands import ROOT, TINY_MODEL, begin_ranks
from tests.helpers.processes import in_processes

ALONE: Any = SimpleNamespace(num_processes=1)


pytestmark = pytest.mark.usefixtures("handlers_return")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_until_the_end_of_the_step_and_later_ones_are_ignored(number: int) -> None:
    with pytest.raises(Stopped) as stopped, StopRequest(ALONE) as stop:
        assert stop.after_step() == 0
        signal.raise_signal(number)
        for again in STOP_SIGNALS:
            signal.raise_signal(again)
        assert stop.after_step() == number
        stop.stop(stop.after_step())
    assert stopped.value.signal == number
    # The checkpoint is saved, and the process is about to end.
    signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_the_first_step_is_raised_at_once_because_nothing_can_be_saved() -> None:
    with pytest.raises(Stopped), StopRequest(ALONE):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("not reached")


def test_a_signal_after_the_last_step_is_not_lost() -> None:
    with pytest.raises(Stopped), StopRequest(ALONE) as stop:
        assert stop.after_step() == 0
        signal.raise_signal(signal.SIGTERM)


def test_a_second_ctrl_c_ends_at_once_and_one_before_a_signal_counts() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest(ALONE) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.after_step() == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not reached")
    with pytest.raises(KeyboardInterrupt), StopRequest(ALONE) as stop:
        signal.raise_signal(signal.SIGINT)
        stop.stop(stop.after_step())


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    # A shell starts background jobs in this way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest(ALONE) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.after_step() == 0


def test_without_a_signal_the_handlers_return() -> None:
    earlier = [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)]
    with StopRequest(ALONE):
        pass
    assert [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)] == earlier


def stopped_after_the_last_step(rank: int, count: int, signalled: int, number: int) -> dict[str, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest(SimpleNamespace(num_processes=count)) as stop:  # type: ignore[arg-type]
            assert [stop.after_step() for _ in range(2)] == [0, 0]
            if rank == signalled:
                signal.raise_signal(number)
    except Stopped as error:
        return {"stopped": int(error.signal)}
    except KeyboardInterrupt:
        # The end of the launcher follows.
        signal.raise_signal(signal.SIGTERM)
        return {"stopped": int(signal.SIGINT)}
    return {"stopped": 0}


@pytest.mark.parametrize("signalled, number", [(1, signal.SIGUSR1), (1, signal.SIGINT), (-1, 0)])
def test_two_ranks_agree_about_a_signal_after_the_last_step(signalled: int, number: int, tmp_path: Path) -> None:
    results = in_processes(stopped_after_the_last_step, 2, tmp_path, signalled, number)
    assert [result["stopped"] for result in results] == [number] * 2


def test_two_ranks_stop_after_the_same_step_although_one_gets_the_signal(
    finished_project: Path, tmp_path: Path
) -> None:
    many = ["--steps", "5000", "--save_every", "5000", "--validate_every", "5000", "--out", str(tmp_path / "run")]
    program = [str(ROOT / "pipelines" / "pretrain_ar.py"), *TINY_MODEL, *many]
    ranks = begin_ranks(finished_project, *program)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert all(rank.alive for rank in ranks)
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGUSR1)
    results = [rank.wait(60) for rank in ranks]
    assert [result.returncode for result in results] == [138, 138], results
    (line,) = [line for result in results for line in result.stderr.splitlines() if ": error: " in line]
    assert "SIGUSR1" in line and "again" in line
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) >= 10
    assert "Traceback" not in results[0].stderr + results[1].stderr
