"""``unigendet`` with a mishap: ``wrapped_run.py MISHAP train --config …``.

kill:FUNCTION:N:WHEN   SIGKILL at the N-th call of FUNCTION: ``before`` it, ``after`` it, or ``within`` (a file is then
                       half written)
limit:BYTES            no file may become larger than that: writing fails as on a full disk
wait:N                 in step N, wait until a signal ends the process; every signal is a request of its own
"""

import os
import resource
import signal
import sys
import time


def kill():
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(args):
    """Half of what ``save_file`` was about to write, or of the row that was about to be appended."""
    from safetensors.torch import save

    tensors, path = args[:2]
    content = save(tensors)
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])


def arrange_kill(name, number, when):
    """Replace a function by one that kills the process at a certain call."""
    import safetensors.torch

    from unigendet.training.metrics import MetricsWriter
    from unigendet.training.trainer import Trainer

    owner, attribute = {
        "replace": (os, "replace"),
        "fsync": (os, "fsync"),
        "unlink": (os, "unlink"),
        "save_file": (safetensors.torch, "save_file"),
        "row": (MetricsWriter, "add"),
        "step": (Trainer, "train_step"),
    }[name]
    inner, count = getattr(owner, attribute), 0

    def counted(*args, **options):
        nonlocal count
        count += 1
        if count == number and when == "within":
            half_written(args)
        if count == number and when != "after":
            kill()
        result = inner(*args, **options)
        if count == number:
            kill()
        return result

    setattr(owner, attribute, counted)


def arrange_wait(number):
    """Step ``number`` begins, says so, and does not end by itself."""
    from unigendet.training import signals
    from unigendet.training.trainer import Trainer

    signals.SAME_REQUEST = 0
    inner = Trainer.train_step

    def step(trainer, *args, **options):
        if trainer.state.step + 1 == number:
            print("waiting in step", number, file=sys.stderr, flush=True)
            while True:
                time.sleep(0.01)
        return inner(trainer, *args, **options)

    Trainer.train_step = step


def main():
    """Arrange the mishap and run the command."""
    kind, *rest = sys.argv[1].split(":")
    if kind == "kill":
        arrange_kill(rest[0], int(rest[1]), rest[2])
    elif kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(rest[0]), resource.RLIM_INFINITY))
    else:
        arrange_wait(int(rest[0]))
    from unigendet.cli import main as command

    return command(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
