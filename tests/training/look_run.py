"""Looks at a tiny model by one of several processes: ``python look_run.py FOLDER``; imported, the same by one process.

FOLDER holds ``data`` (see ``watched_run``), ``run.yaml`` and ``jobs.json``, name → arguments of ``look``. Process i
writes what it saw and did to FOLDER/NAME-i.pt.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from watched_run import make_trainer, note_while

from unigendet.model.unigendet import UniGenDet
from unigendet.training import watch as watch_module
from unigendet.training.config import ParallelConfig, TrainConfig
from unigendet.training.parallel import processes
from unigendet.training.signals import StopSignals
from unigendet.training.watch import Watched

EOS, STANDS_FOR = 1, 5  # answers end where the model, had it no eos, would say the other token
RUN = ("watch.batch_size=2", "watch.max_tokens=3", "total_steps=3", "watch.every=1", "save_every=1")
SIGNALS = {"judging": 1, "sampling": 0}  # where, in which process


def ends_answers(model):
    """Answers of different lengths."""
    with torch.no_grad():
        model.lm_head.weight[EOS] = 1.001 * model.lm_head.weight[STANDS_FOR]


def held_out(folder, broken):
    """The file of a copy of the held-out images of which some are damaged; made if it is not there."""
    copy = folder / ("held_out" + "".join(f"-{i}" for i in broken))
    if not copy.exists():
        shutil.copytree(folder / "data" / "held_out", copy)
        for i in broken:
            (copy / f"{i}.png").write_bytes(b"no picture")
    return copy / "detection.json"


def look(folder, parallel=None, *, settings, output, broken=(), undefined=(), poorer=None):
    """What a look sees, and what this process does for it.

    ``broken``: numbers of images that cannot be read, ``undefined``: of images that are not finite; ``poorer``: a
    process that finds only one image and prompt.
    """
    settings = [*settings, f"watch.detection={held_out(folder, broken)}", f"output={output}"]
    options = {"parallel": parallel, "change": ends_answers}
    made = make_trainer(folder / "data", folder / "run.yaml", *settings, **options)
    done, pipeline = {"passes": 0, "read": [], "outcomes": []}, made._watch.pipeline
    if parallel is not None and parallel.rank == poorer:
        made._watch.watched = Watched(("another",), made._watch.watched.held_out[:1])
    views, forward, summarise = pipeline.builder.views, UniGenDet.forward, watch_module.summarise

    def read(image):
        done["read"].append(Path(image).name)
        latent, pixels = views(image)
        return latent, torch.full_like(pixels, torch.nan) if int(Path(image).stem) in undefined else pixels

    def counted(*arguments, **more):
        done["passes"] += 1
        return forward(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.builder, "views", read)
        patch.setattr(UniGenDet, "forward", counted)
        patch.setattr(watch_module, "summarise", lambda o: done["outcomes"].extend(o) or summarise(o))
        seen = made._watch(made.state, lambda: parallel is not None and parallel.any(False))
    return {**done, "scores": seen.scores, "samples": seen.samples}


def signalled(folder, parallel, where):
    """A run to which a signal comes in its second look, in one process, and how it goes on."""

    def make():
        return make_trainer(folder / "data", folder / "run.yaml", *RUN, f"output={folder / where}", parallel=parallel)

    made, stop = make(), StopSignals()
    with pytest.MonkeyPatch.context() as patch:
        seen = note_while(patch, made, stop, where, 1 if parallel.rank == SIGNALS[where] else None)
        result = made.run(stop=stop)
    again = make()
    again.resume(result.checkpoint)
    return {"step": result.step, "stopped_by": result.stopped_by, "seen": seen, "then": again.run().step}


def main(folder):
    torch.set_num_threads(1)
    folder = Path(folder)
    with processes(TrainConfig(device="cpu", parallel=ParallelConfig(timeout=1))) as parallel:
        for name, job in json.loads((folder / "jobs.json").read_text()).items():
            torch.save(look(folder, parallel, **job, output=folder / name), folder / f"{name}-{parallel.rank}.pt")
        for where in SIGNALS:
            torch.save(signalled(folder, parallel, where), folder / f"{where}-{parallel.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
