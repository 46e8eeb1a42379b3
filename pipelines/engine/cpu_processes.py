"""Start of several processes on the CPU.

Without MPI, `accelerate launch --cpu --num_processes N` starts only one process. It sets MASTER_ADDR and MASTER_PORT, and
ignores the FSDP settings of its --config_file. Therefore a command that was started in this way starts the N processes
itself (on several machines, an equal share on each), with the environment variables that the launcher sets on GPUs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from pipelines.engine.console import fail
from pipelines.engine.signals import STOP_SIGNALS, child_environment, exit_code, interrupt_is_ignored, no_deadline

_STOPPED = [128 + number for number in (*STOP_SIGNALS, signal.SIGINT)]
"""Exit codes of a process that a signal has stopped cleanly."""


def start_cpu_processes() -> None:
    """Start the requested CPU processes, wait for them and exit with their exit code. Return if none were requested.

    Signals are passed on to the processes, which save a checkpoint and end. After a second Ctrl-C or the failure of a process,
    the processes are killed.

    Raises:
        KeyboardInterrupt: after a second Ctrl-C.
    """
    requested = _requested()
    world, machines = requested.get("num_processes", 1), requested.get("num_machines", 1)
    if world < 2:
        return
    local_world = world // machines
    first_rank = requested.get("machine_rank", 0) * local_world
    environment = {
        **child_environment(),
        **_sharding(requested),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local_world),
    }
    # FSDP would use a visible GPU.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    received: list[int] = []
    for number in STOP_SIGNALS if interrupt_is_ignored() else (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    children = []
    for local_rank in range(local_world):
        ranks = {"RANK": str(first_rank + local_rank), "LOCAL_RANK": str(local_rank)}
        # In sessions of their own, they do not get the Ctrl-C of a terminal, but only the one that is passed on.
        children.append(
            subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment | ranks, start_new_session=True)
        )
    passed_on = 0

    def wait(until: Callable[[], bool]) -> None:
        """Wait until something is true, and pass signals on meanwhile."""
        nonlocal passed_on
        while not until():
            for number in received[passed_on:]:
                passed_on += 1
                for child in children:
                    child.send_signal(signal.SIGKILL if received[:passed_on].count(signal.SIGINT) > 1 else number)
            time.sleep(0.05)

    def all_ended() -> bool:
        return all(child.poll() is not None for child in children)

    with no_deadline():
        wait(lambda: all_ended() or any(child.poll() for child in children))
        codes = [child.poll() for child in children]
        # The death of a process comes first: errors of other processes are its consequences.
        endings = [(first_rank + i, code) for i, code in enumerate(codes) if code]
        rank, code = min(endings, key=lambda ending: ending[1] > 0, default=(0, 0))
        # Processes that a signal stops save a checkpoint together.
        failed = exit_code(code) not in (0, *_STOPPED) or (code < 0 and not received)
        # After a failure the remaining processes would wait forever. Signals do nothing to finished ones.
        for child in children:
            child.send_signal(signal.SIGKILL if failed else signal.SIGTERM)
        wait(all_ended)
    if code < 0 and received.count(signal.SIGINT) > 1:
        raise KeyboardInterrupt
    if failed and code < 0:
        fail(Path(sys.argv[0]).stem, f"process of rank {rank} ended by {signal.Signals(-code).name}")
    sys.exit(exit_code(code))


def _requested() -> dict[str, Any]:
    """Return the settings that `accelerate launch` was given but did not apply. Flags override the configuration file."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    started = os.environ.keys() & {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    parent = psutil.Process().parent()
    if not on_cpu or started or "MASTER_ADDR" not in os.environ or parent is None:
        return {}
    command = parent.cmdline()
    launcher = next((i for i, word in enumerate(command) if word.endswith("launch")), len(command))
    # The parser requires a script, whose name does not matter here.
    parsed, _ = launch_command_parser().parse_known_args([*command[launcher + 1 :], ""])
    flags = {name: value for name, value in vars(parsed).items() if value is not None}
    from_file = load_config_from_file(flags["config_file"]).to_dict() if "config_file" in flags else {}
    return from_file | flags


def _sharding(requested: dict[str, Any]) -> dict[str, str]:
    """Return the environment variables from which accelerate reads FSDP settings."""
    if requested.get("distributed_type") != "FSDP":
        return {}
    settings = {name.upper(): str(value) for name, value in requested.get("fsdp_config", {}).items()}
    if layers := settings.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP", None):
        settings["FSDP_TRANSFORMER_CLS_TO_WRAP"] = layers
    return {"ACCELERATE_USE_FSDP": "true", **settings}
