"""Several processes on the CPU.

`accelerate launch --cpu --num_processes N` starts one process, whatever N is, unless MPI is at hand: it only sets MASTER_ADDR and
MASTER_PORT, and forgets what its --config_file says of FSDP. So a pipeline that finds itself started like that starts the N
processes itself, or its machine's share of them, with what the launcher hands down to processes on GPUs.
"""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser


def start_cpu_processes() -> None:
    """Start the processes that were asked for, wait for them and exit with their code; return at once in all other cases."""
    asked = _asked_for()
    world, machines = asked.get("num_processes", 1), asked.get("num_machines", 1)
    if world < 2:
        return
    here = world // machines
    first = asked.get("machine_rank", 0) * here
    environment = {**os.environ, **_sharding(asked), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(here)}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # FSDP would take to a GPU that it sees
    ranks = [{**environment, "RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(here)]
    children = [subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=rank) for rank in ranks]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the children too, and they say what is to be said
    while all(child.poll() in (None, 0) for child in children) and any(child.poll() is None for child in children):
        time.sleep(0.05)
    codes = [child.poll() for child in children]
    for child in children:  # one has failed: the others wait for it in vain
        if child.poll() is None:
            child.terminate()
    for child in children:
        child.wait()
    sys.exit(next((code for code in codes if code), 0))


def _asked_for() -> dict[str, Any]:
    """What accelerate was asked for but did not do: its flags and, where they are silent, its configuration file."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    started = any(
        name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    parent = psutil.Process().parent()
    if not on_cpu or started or "MASTER_ADDR" not in os.environ or parent is None:
        return {}
    command = parent.cmdline()
    launcher = next((i for i, word in enumerate(command) if word.endswith("launch")), len(command))
    flags = vars(launch_command_parser().parse_known_args([*command[launcher + 1 :], ""])[0])
    asked = {name: value for name, value in flags.items() if value is not None}
    return {**(load_config_from_file(asked["config_file"]).to_dict() if "config_file" in asked else {}), **asked}


def _sharding(asked: dict[str, Any]) -> dict[str, str]:
    """The environment in which accelerate finds its FSDP settings."""
    if asked.get("distributed_type") != "FSDP":
        return {}
    settings = {name.upper(): str(value) for name, value in asked.get("fsdp_config", {}).items()}
    layers = settings.pop("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP", None)
    return {"ACCELERATE_USE_FSDP": "true", **settings, **({"FSDP_TRANSFORMER_CLS_TO_WRAP": layers} if layers else {})}
