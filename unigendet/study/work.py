"""What is done for one seed of a study: its data, its GDUF models, and one run after another."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from unigendet.data.datasets import read_detection
from unigendet.data.quickstart import GENERATORS, build_quickstart_data, data_config
from unigendet.evaluation.detection import DetectionMetrics, evaluate_detection
from unigendet.evaluation.figures import save_image_grid
from unigendet.evaluation.generation import DigitJudge
from unigendet.files import new_folder
from unigendet.inference.pipeline import Pipeline
from unigendet.model.autoencoder import build_autoencoder
from unigendet.model.unigendet import UniGenDet
from unigendet.quickstart import (
    ANSWER_TOKENS,
    QuickstartConfig,
    detect_records,
    sample_digits,
    stage_config,
    train_stage,
)
from unigendet.study.config import StudyConfig
from unigendet.training.config import TrainConfig
from unigendet.training.run import build_model

TRAINED = "trained.json"  # beside a GDUF model: what decided it, and what it cost
NOISE_STRIDE = 1_000_000  # the noise of a study seed's images starts that far from the next one's
LAST_STEPS = 10  # over which the alignment term is averaged


class SeedWork:
    """What the arms of one seed share: data, judge, and the GDUF models that others go on from.

    Args:
        folder: for all of it; what an interrupted study left there is used again.
        seed: of everything.
        config: the study's settings.
        settings: every arm's whole settings; recipes: what decides the results of every arm.
        grids: folder for the sample grids.
        console: where training shows its progress, if it is a terminal.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        config: StudyConfig,
        settings: dict[str, QuickstartConfig],
        recipes: dict[str, dict[str, Any]],
        grids: Path,
        console: Console,
    ) -> None:
        self.folder, self.seed, self.config, self.settings, self.recipes = folder, seed, config, settings, recipes
        self.grids, self.console, self.quiet = grids, console, not console.is_terminal
        fakes = next(iter(settings.values())).fakes_per_real
        self.data = build_quickstart_data(folder / "data", seed, fakes_per_real=fakes, split=seed)
        self.tokenizer = self.data.tokenizer()
        self.tokenizer.save(folder / "tokenizer")
        digits = self.data.digits
        self.judge = DigitJudge(digits.train_images, digits.train_labels, digits.test_images, digits.test_labels)
        self.reference = dataclasses.asdict(self.judge.reference())

    def run(self, name: str) -> dict[str, Any]:
        """Train and score arm ``name``: its ``metrics``, scores of single ``draws``, ``reference`` and costs.

        ``seconds``, ``cpu_seconds``: by what they were spent on; the CPU's are those of all threads together.
        """
        seconds: dict[str, float] = {}
        cpu_seconds: dict[str, float] = {}

        @contextmanager
        def timed(what: str) -> Iterator[None]:
            wall, cpu = time.perf_counter(), time.process_time()
            yield
            seconds[what], cpu_seconds[what] = time.perf_counter() - wall, time.process_time() - cpu

        after, settings = self.config.arms[name].after, self.settings[name]
        alignment = None
        first = self.gduf(after or name)
        if after is None:
            model = build_model(self._stage(name, "gduf", first), self.tokenizer, "cpu")
            trained = json.loads((first / TRAINED).read_text(encoding="utf-8"))
            seconds["training"], cpu_seconds["training"] = trained["seconds"], trained["cpu_seconds"]
        else:
            with timed("training"):
                model, alignment = self.diga(name, first)
        pipeline = Pipeline(
            model, self.tokenizer, build_autoencoder(model.config.latent), data_config(), settings.guidance
        )
        with timed("generation"):
            metrics, draws = self.generate(name, pipeline)
        with timed("detection"):
            metrics |= self.detect(name, pipeline)
        return {
            "metrics": metrics | {"alignment": alignment},
            "draws": draws,
            "reference": self.reference,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
        }

    def _stage(self, name: str, stage: str, checkpoint: Path | None = None) -> TrainConfig:
        settings, tokenizer = self.settings[name], self.folder / "tokenizer"
        config = stage_config(settings, stage, self.data, seed=self.seed, tokenizer=tokenizer, output=None)
        if checkpoint is None:
            return config
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, preset=None, checkpoint=str(checkpoint))
        )

    def gduf(self, name: str) -> Path:
        """The folder of the model that GDUF arm ``name`` trains; it is trained if it is not there yet."""
        folder = self.folder / "models" / name
        note = folder / TRAINED
        if note.is_file() and json.loads(note.read_text(encoding="utf-8"))["recipe"] == self.recipes[name]:
            return folder
        torch.manual_seed(self.seed)
        config = self._stage(name, "gduf")
        model = build_model(config, self.tokenizer, "cpu")
        wall, cpu = time.perf_counter(), time.process_time()
        train_stage(model, config, self.tokenizer, self.console, quiet=self.quiet)
        cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        with new_folder(folder) as new:
            Pipeline(model, self.tokenizer, build_autoencoder(model.config.latent), data_config()).save(new)
            (new / TRAINED).write_text(json.dumps({"recipe": self.recipes[name], **cost}), encoding="utf-8")
        return folder

    def diga(self, name: str, first: Path) -> tuple[UniGenDet, float | None]:
        """The model of arm ``name``, trained from the one in ``first``; the alignment term's mean over the last steps.

        It is None for an arm that has no such term.
        """
        torch.manual_seed(self.seed)
        config = self._stage(name, "diga", first)
        model = build_model(config, self.tokenizer, "cpu")
        history = train_stage(model, config, self.tokenizer, self.console, quiet=self.quiet)
        values = [row["diga"] for row in history if "diga" in row][-LAST_STEPS:]
        return model, float(np.mean(values)) if values else None

    def generate(self, name: str, pipeline: Pipeline) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Scores of the generated digits: means over the draws, and every draw's. The noise is the same in all arms."""
        labels, draws, settings = self.data.digits.test_labels, self.config.draws, self.settings[name]
        images = sample_digits(
            pipeline, np.tile(labels, draws), seed=self.seed * NOISE_STRIDE, batch_size=settings.batch_size
        ).reshape(draws, len(labels), 8, 8)
        shown = np.concatenate([images[0][labels == digit][: settings.shown] for digit in range(10)])
        save_image_grid(shown, self.grids / f"seed-{self.seed:04}-{name}.png", columns=settings.shown, scale=4)
        scores = {
            "frechet": [self.judge.frechet(draw) for draw in images],
            "agreement": [self.judge.agreement(draw, labels).accuracy for draw in images],
        }
        return {what: float(np.mean(values)) for what, values in scores.items()}, scores

    def detect(self, name: str, pipeline: Pipeline) -> dict[str, float | None]:
        """Scores of the verdicts on the test images; of explanations only after GDUF, since decoding them takes long.

        An arm whose detector was trained without latents sees none here either.
        """
        explains, settings = self.config.arms[name].after is None, self.settings[name]
        outcomes = detect_records(
            pipeline,
            read_detection(self.data.test_detection),
            self.data.folder,
            with_latent=settings.gduf.datasets.detection_latents,
            max_new_tokens=ANSWER_TOKENS if explains else 0,
            batch_size=settings.batch_size,
        )
        summary = evaluate_detection(outcomes)
        groups: dict[str, DetectionMetrics] = {metrics.group: metrics for metrics in summary.groups}
        scores: dict[str, float | None] = {"rouge_l": summary.overall.rouge_l}
        for generator, role in zip(GENERATORS, ("seen", "held_out"), strict=True):
            scores[f"balanced_accuracy_{role}"] = groups[generator].balanced_accuracy
            scores[f"auc_{role}"] = groups[generator].roc_auc
        return scores
