"""Several processes on the CPU.

`accelerate launch --cpu --num_processes N` starts one process, whatever N is, unless MPI is at hand: it only sets MASTER_ADDR and
MASTER_PORT. So a pipeline that finds itself started like that starts the N processes itself.
"""

import os
import re
import signal
import subprocess
import sys
import time

import psutil


def start_cpu_processes() -> None:
    """Start the processes that were asked for, wait for them and exit with their code; return at once in all other cases."""
    asked = _asked_for()
    if asked < 2:
        return
    environment = {**os.environ, "WORLD_SIZE": str(asked), "LOCAL_WORLD_SIZE": str(asked)}
    ranks = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(asked)]
    children = [subprocess.Popen([sys.executable, *sys.argv], env=rank) for rank in ranks]
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


def _asked_for() -> int:
    """The number of processes that accelerate was asked for but did not start."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    started = any(
        name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    )
    if not on_cpu or started or "MASTER_ADDR" not in os.environ:
        return 1
    parent = psutil.Process().parent()
    command = "\0".join(parent.cmdline()) if parent is not None else ""
    number = re.search(r"--num[-_]processes[\0=](\d+)", command)
    return int(number[1]) if number else 1
