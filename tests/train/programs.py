"""Runs the programs of `train/` in forks of a process that has imported their libraries once.

Importing them, and compiling generators, takes most of the time of a short run, and no test is about that. Reads
requests from standard input, one JSON object a line, and answers each with the exit statuses of its processes.
"""

import json
import os
import resource
import runpy
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]

# Seconds until a run that hangs is killed.
PATIENCE = 280


def main():
    import finetune  # noqa: F401
    import pretrain  # noqa: F401
    import torch._dynamo  # noqa: F401

    from datasets_scripts import stream

    # What the first step of a run would have to load and to compile.
    for task in ("brevo-mini", "mano-mini"):
        next(iter(stream(task, split="train", seed=0)))
    for line in sys.stdin:
        request = json.loads(line)
        environments = [{}] if request["processes"] == 1 else launch(request["processes"])
        children = []
        for environment in environments:
            child = os.fork()
            if not child:
                become(request, environment)
                return
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)


def launch(processes):
    """What a launcher tells each of the processes that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]


def become(request, environment):
    """Turns this process into the program that is asked for: its arguments, folder, files, limits; and runs it."""
    signal.alarm(PATIENCE)
    os.chdir(request["folder"])
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if request["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    sys.argv = [request["script"], *request["options"]]
    runpy.run_path(request["script"], run_name="__main__")


if __name__ == "__main__":
    main()
