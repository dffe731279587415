"""Looking at a model while it trains: sample images from the same noise every time, and scores on held-out images.

Training does not notice: weights, random generators and the data's position are afterwards what they were. What is
seen goes to TensorBoard (``watch/…``) and into the run's output folder:

* ``watch.jsonl``, a line per look: ``step``, ``seconds``, ``averaged`` (whether the weights were the averaged ones);
  of held-out images ``images`` (how many), the scores, ``undecided`` (answers without a verdict), ``not_judged`` (image
  → error) and ``categories`` (category → ``images``, ``accuracy``); ``samples``, the path of the pictures' grid. A
  score that is undefined is null.
* ``watch/step-000100.png``: the samples, one row per prompt.

A held-out image that cannot be read or judged counts as judged wrong, and is named under ``not_judged``; any other
error stops the run, after the checkpoint of its step.

Several processes share the work: each reads and judges its own part of the held-out images and makes its own part of
the samples, and all that they found is put together in the order in which one process would have found it. Where each
has a part of every parameter they make every pass through the model together, so their parts are equally long and have
the same batches; ``Pipeline``'s ``all_ended`` sees to the rest.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from unigendet.config import check
from unigendet.data.tokenizer import Tokenizer
from unigendet.evaluation.detection import DetectionOutcome
from unigendet.evaluation.figures import tile
from unigendet.evaluation.scoring import judge, summarise
from unigendet.files import make_folder, naming, sync, write_text
from unigendet.inference.detect import answer_room
from unigendet.inference.generate import latent_grid
from unigendet.inference.pipeline import Pipeline
from unigendet.inference.requests import ImageRequest
from unigendet.model.autoencoder import PixelAutoencoder
from unigendet.model.unigendet import UniGenDet
from unigendet.training.config import TrainConfig, WatchConfig, naming_setting
from unigendet.training.metrics import Look, Row, read_history
from unigendet.training.parallel import Parallel, put_away
from unigendet.training.state import TrainState
from unigendet.training.watched import Watched

if TYPE_CHECKING:
    from PIL.Image import Image

WATCH_FILE, PICTURES = "watch.jsonl", "watch"
SMALLEST, LARGEST = 64, 512  # pixels of a sample's longer side in the grid: enlarged or reduced to lie between them
LEAST = 1e-7  # probability in the held-out loss: about the resolution of float32 below 1

Item = TypeVar("Item")


def check_watch(watch: WatchConfig, model: UniGenDet) -> None:
    """Raise ValueError, which names the setting, if looks do not suit the model; its weights do not matter."""
    if watch.size is not None and (watch.prompts or watch.prompts_file is not None):
        latent_grid(model, watch.size, "watch.size")
    mute = watch.detection is not None and model.class_head is None and not watch.max_tokens
    check(not mute, "watch.max_tokens", watch.max_tokens, "positive: the model has no real/fake head, only answers")


def check_watched(config: TrainConfig, watched: Watched, model: UniGenDet, tokenizer: Tokenizer) -> None:
    """Raise ValueError if the model, whose weights do not matter, has no room for a prompt or question."""
    autoencoder = PixelAutoencoder(model.config.latent)  # of which nothing is asked
    _check_texts(config, Pipeline(model, tokenizer, autoencoder, config.datasets.views), watched)


def _check_texts(config: TrainConfig, pipeline: Pipeline, watched: Watched) -> None:
    """Raise ValueError if the model has no room for a prompt, or for a question with its answer."""
    watch, model = config.watch, pipeline.model.config
    with naming_setting("watch.prompts" if watch.prompts_file is None else "watch.prompts_file"):
        pipeline.check_requests([ImageRequest(prompt, size=watch.size) for prompt in watched.prompts])
    questions = dict.fromkeys(record.question or pipeline.data.question for record in watched.held_out)
    for text in map(pipeline.builder.text, questions):
        room = answer_room(model, text, with_latent=config.datasets.detection_latents)
        asked = f"a question of {len(text.ids)} tokens"
        need = f"a data set without {asked}: the model has {model.max_position} positions"
        check(room > 0, "watch.detection", watch.detection, need)
        need = f"at most {room}, the room after {asked} in watch.detection"
        check(watch.max_tokens <= room, "watch.max_tokens", watch.max_tokens, need)


class _Ended(Exception):
    """The run is to end now: the look is left."""


class Watcher:
    """Looks at the model at the steps that ``config.watch`` asks for; a ``Trainer``'s ``watch``.

    A step that ``watch.jsonl`` has a line for is not looked at again, so a run that is resumed goes on with its looks;
    what was seen beyond the step at which it goes on is removed. Several processes share each look, and must make it at
    the same time; the first one writes.

    Args:
        config: of the run.
        pipeline: around the very model that is trained; with ``all_ended`` if several processes divide it.
        watched: what to look at; of several processes, what the first one was given.
        parallel: this process among those of the run; default: the only one.

    Raises:
        ValueError: a setting does not suit the model.
    """

    def __init__(
        self, config: TrainConfig, pipeline: Pipeline, watched: Watched, parallel: Parallel | None = None
    ) -> None:
        self.config, self.pipeline, self.watched = config, pipeline, watched
        self._parallel = parallel or Parallel(device=pipeline.model.device)
        self._output = Path(config.output or ".")
        self._done: set[int] | None = None
        check_watch(config.watch, pipeline.model)
        _check_texts(config, pipeline, watched)

    def __call__(self, state: TrainState, ends: Callable[[], bool] = lambda: False) -> Look | None:
        """Look at ``state.model``, if this step is one to look at.

        As soon as ``ends()`` is true, which is asked after every image and every step of sampling, the look is left
        and counts as not done; then None is returned. ``ends()`` must be the same in all processes, which ask it
        together.
        """
        if self._done is None:
            begun = (self._begin(state.step), self.watched) if self._parallel.main else None
            # One list for all: files may differ from machine to machine.
            self._done, self.watched = self._parallel.gather(begun)[0]
        wanted = state.step % self.config.watch.every == 0 or state.step == self.config.total_steps
        if not wanted or state.step in self._done:
            return None
        try:
            look = self._look(state, ends)
        except _Ended:
            return None
        except Exception as error:
            error.add_note(f"while watching the run after step {state.step}")
            raise
        self._done.add(state.step)
        return look

    def _look(self, state: TrainState, ends: Callable[[], bool]) -> Look:
        started = time.perf_counter()
        averaged = self.config.watch.use_ema and state.ema is not None
        row: Row = {"step": state.step, "seconds": 0.0, "averaged": averaged}
        scores: dict[str, float | None] = {}
        samples, text = None, ""
        with self._at_rest(state, averaged):
            if self.watched.held_out:
                scores, about = self._judge(ends)
                row |= {"images": len(self.watched.held_out), **scores, **about}
                text = _describe(scores, about)
            if self.watched.prompts:
                samples = self._sample(ends)
                row["samples"] = f"{PICTURES}/step-{state.step:06}.png"
                text = text or f"samples {self._output / row['samples']}"  # beside a bar there is room for one
        row["seconds"] = time.perf_counter() - started
        if self._parallel.main:
            self._write(row, samples)
        numbers = {name: value for name, value in {**scores, "seconds": row["seconds"]}.items() if value is not None}
        return Look(state.step, numbers, samples, text)

    @contextmanager
    def _at_rest(self, state: TrainState, averaged: bool) -> Iterator[None]:
        """Within it, the model infers, with averaged weights if so wanted; afterwards it is as it was."""
        model, device = state.model, state.model.device
        by_copies = model.compute_dtype is not None  # of reduced precision, and not by autocast
        modes = [(module, module.training) for module in model.modules()]
        weights = state.ema.applied() if averaged and state.ema is not None else nullcontext()
        low = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16" and not by_copies
        )
        try:
            with weights, torch.no_grad(), low:
                model.eval()
                try:
                    yield
                finally:
                    put_away(model)
        finally:
            for module, training in modes:
                module.training = training
            if device.type == "cuda":  # blocks of other sizes than training's would lie idle, and memory is short
                torch.cuda.empty_cache()

    def _sample(self, ends: Callable[[], bool]) -> NDArray[np.uint8]:
        watch = self.config.watch

        def progress(done: int, steps: int) -> None:
            if ends():
                raise _Ended

        prompts = [prompt for prompt in self.watched.prompts for _ in range(watch.count)]
        requests = [ImageRequest(prompt, watch.seed + i, watch.size) for i, prompt in enumerate(prompts)]
        images = self.pipeline.generate_each(
            deal(requests, self._parallel),
            guidance=watch.guidance,
            batch_size=watch.batch_size,
            progress=progress,
        )
        own = [_reduced(image) for image in images]
        return sample_grid(collect(own, len(requests), self._parallel), watch.count)

    def _judge(self, ends: Callable[[], bool]) -> tuple[dict[str, float | None], dict[str, Any]]:
        """The scores of the verdicts on the held-out images, and what else there is to say of them."""
        watch, held_out = self.config.watch, self.watched.held_out
        judged = judge(
            self.pipeline,
            deal(held_out, self._parallel),
            with_latent=self.config.datasets.detection_latents,
            max_new_tokens=watch.max_tokens,
            batch_size=watch.batch_size,
        )
        own = []
        with closing(judged):
            for outcome in judged:
                own.append(outcome)
                if ends():
                    raise _Ended
        outcomes = collect(own, len(held_out), self._parallel)
        summary = summarise(outcomes)
        overall = summary.overall
        scores = {
            "accuracy": overall.accuracy,
            "balanced_accuracy": overall.balanced_accuracy,
            "f1": overall.f1,
            "auc": overall.roc_auc,
            "average_precision": overall.average_precision,
            "label_loss": label_loss(outcomes),
            "calibration_error": overall.calibration_error,
            "rouge_l": overall.rouge_l,
        }
        about = {
            "undecided": overall.unparsed - overall.unreadable,
            "not_judged": {o.name: o.error for o in outcomes if o.error is not None},
            "categories": {g.group: {"images": g.count, "accuracy": g.accuracy} for g in summary.groups},
        }
        return scores, about

    def _write(self, row: Row, samples: NDArray[np.uint8] | None) -> None:
        """Write the grid of samples, if there is one, and the look's line."""
        from PIL import Image

        if samples is not None:
            picture = self._output / row["samples"]
            make_folder(picture.parent)
            with naming(picture):
                Image.fromarray(samples).save(picture)
            sync(picture)
            sync(picture.parent)
        path = self._output / WATCH_FILE
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        sync(path)  # a later checkpoint counts on it: the look is not made again

    def _begin(self, step: int) -> set[int]:
        """The steps of the looks that a run which goes on after ``step`` has had; later looks are removed."""
        make_folder(self._output)
        rows = read_history(self._output, step, WATCH_FILE) if step else []
        write_text(self._output / WATCH_FILE, "".join(json.dumps(row) + "\n" for row in rows))
        kept = {row.get("samples") for row in rows}
        for picture in (self._output / PICTURES).glob("step-*.png"):
            if f"{PICTURES}/{picture.name}" not in kept:
                picture.unlink()
        return {row["step"] for row in rows}


def deal(items: Sequence[Item], parallel: Parallel) -> list[Item]:
    """This process's part of ``items``: from its rank on, one of every ``world_size``.

    All parts are equally long, which takes up to ``world_size`` − 1 of the items twice or more often.
    """
    count, size = len(items), parallel.world_size
    return [items[i % count] for i in range(parallel.rank, -(-count // size) * size, size)]


def collect(own: Sequence[Item], count: int, parallel: Parallel) -> list[Item]:
    """What the processes made of their parts of ``count`` items, in the items' order; this one's is ``own``."""
    parts = parallel.gather(own)
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def sample_grid(images: Sequence[Image], columns: int) -> NDArray[np.uint8]:
    """Images of one size, row by row → one picture uint8 [H, W, 4], RGBA with transparent gaps."""
    images = [_reduced(image) for image in images]
    longer = max(images[0].size)
    pixels = np.stack([np.asarray(image) for image in images])
    return tile(pixels, columns=columns, scale=max(1, SMALLEST // longer), gap=max(1, longer // SMALLEST), high=255)


def _reduced(image: Image) -> Image:
    """The image no larger than a grid shows it."""
    longer = max(image.size)
    if longer <= LARGEST:
        return image
    width, height = (max(1, round(side * LARGEST / longer)) for side in image.size)
    return image.resize((width, height))


def label_loss(outcomes: Sequence[DetectionOutcome]) -> float | None:
    """Mean cross-entropy of the real/fake head, in nats, over the images it judged; None if there are none."""
    of_label = [p if o.label else 1 - p for o in outcomes if (p := o.probability) is not None]
    return math.fsum(-math.log(max(p, LEAST)) for p in of_label) / len(of_label) if of_label else None


def _describe(scores: dict[str, float | None], about: dict[str, Any]) -> str:
    """The held-out scores as a few words."""
    auc = "" if scores["auc"] is None else f", AUC {scores['auc']:.3f}"
    failed = f", {len(about['not_judged'])} not judged" if about["not_judged"] else ""
    return f"held out: accuracy {scores['accuracy']:.1%}{auc}{failed}"
