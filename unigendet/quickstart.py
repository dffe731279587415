"""The quickstart: training in both stages, generation, detection and evaluation on handwritten digits, on a CPU.

It writes its data in the formats of a real run (FakeClue and LAION annotation files, PNGs) and then only calls what a
real run calls: ``unigendet.training`` with settings from ``configs/quickstart.yaml``, ``unigendet.inference``,
``unigendet.evaluation``. The folder it leaves:

    data/          PNGs and annotation files
    tokenizer/     trained on the training texts
    gduf/, diga/   metrics and the last checkpoint of each stage
    model/         the trained model, for ``unigendet detect`` and ``unigendet generate``
    samples/       the generated digits as PNGs, before and after DIGA
    report.html, report.json, grids/
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from unigendet.config import GuidanceConfig, check
from unigendet.config_file import load_settings
from unigendet.data.datasets import DetectionRecord, read_detection
from unigendet.data.quickstart import (
    GENERATORS,
    WHITE,
    QuickstartData,
    build_quickstart_data,
    caption,
    data_config,
    quantise,
    read_png,
    write_detection_images,
)
from unigendet.data.tokenizer import Tokenizer
from unigendet.evaluation import scoring
from unigendet.evaluation.detection import DetectionOutcome, evaluate_detection
from unigendet.evaluation.generation import DigitJudge
from unigendet.evaluation.quickstart_report import format_table, write_report
from unigendet.evaluation.results import Aim, ImageGrid, RunResults, choose_examples
from unigendet.files import claim_folder
from unigendet.inference.pipeline import Pipeline
from unigendet.model.autoencoder import build_autoencoder
from unigendet.model.unigendet import UniGenDet
from unigendet.training.config import AnnotationFile, TrainConfig
from unigendet.training.metrics import AROUND
from unigendet.training.run import build_loader, build_model, companions, prepare_watcher
from unigendet.training.stages import make_stage
from unigendet.training.trainer import Trainer

OWN = "unigendet"  # the group of the model's own samples
ROLES = {
    "real": "real",
    GENERATORS[0]: "seen in training",
    GENERATORS[1]: "held out",
    OWN: "the model's own samples",
}

ANSWER_TOKENS = 16  # longer than every explanation
PARTS = ("data", "tokenizer", "gduf", "diga", "model", "samples", "grids", "report.html", "report.json")
MARK = ".unigendet-quickstart"  # a folder without it is not ours, whatever the names in it


@dataclass(frozen=True)
class QuickstartConfig:
    """Settings of the whole job.

    ``gduf``, ``diga``: the stages; datasets, tokenizer, seeds, device (cpu) and output are filled in, and the model is
    new, of a preset's sizes. With ``watch.every`` they look at the digits and the test images, unless they name others,
    with the evaluation's guidance.
    ``captions_weight``: caption samples per real detection sample (fakes come as often as real images).
    ``fakes_per_real``: generated training images per real one. ``guidance``: of the evaluation's samples.
    ``batch_size``: images per call of the evaluation. ``shown``: sample images per digit in the report.
    """

    gduf: TrainConfig = field(default_factory=TrainConfig)
    diga: TrainConfig = field(default_factory=lambda: TrainConfig(stage="diga"))
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    captions_weight: float = 1.0
    fakes_per_real: int = 3
    batch_size: int = 128
    shown: int = 8

    def __post_init__(self) -> None:
        for name in ("gduf", "diga"):
            stage: TrainConfig = getattr(self, name)
            check(stage.stage == name, f"{name}.stage", stage.stage, repr(name))
            start = stage.model.checkpoint
            check(start is None, f"{name}.model.checkpoint", start, "null: the quickstart trains a new model")
        for name in ("captions_weight", "fakes_per_real", "batch_size", "shown"):
            check(getattr(self, name) > 0, name, getattr(self, name), "positive")


def default_config(name: str = "quickstart.yaml") -> Path:
    """Settings that ship with the package: inside it in a wheel, beside it in a checkout."""
    here = Path(__file__).parent
    places = [folder / "configs" / name for folder in (here, here.parent)]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"this installation has no {name} (looked for {places[0]} and {places[1]})")
    return found


class _Job:
    """One run of the quickstart: its folder, its clock, its screen."""

    def __init__(self, out: Path, seed: int, config: QuickstartConfig, console: Console) -> None:
        self.out, self.seed, self.config, self.console = out, seed, config, console
        self.durations: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def part(self, name: str, text: str) -> Iterator[None]:
        """A part of the job that is announced and timed."""
        self.console.print(f"[bold]{text}[/bold]")
        started = time.perf_counter()
        yield
        self.durations[name] = time.perf_counter() - started

    def stage(self, name: str, data: QuickstartData) -> TrainConfig:
        """The settings of a stage of this run."""
        places = {"tokenizer": self.out / "tokenizer", "output": self.out / name}
        return stage_config(self.config, name, data, seed=self.seed, **places)


def stage_config(
    config: QuickstartConfig, name: str, data: QuickstartData, *, seed: int, tokenizer: Path, output: Path | None
) -> TrainConfig:
    """The settings of stage ``name``, ``gduf`` or ``diga``, with everything that a run on these data decides."""
    stage: TrainConfig = getattr(config, name)
    detection = str(data.train_detection)
    datasets = dataclasses.replace(
        stage.datasets,
        detection=(AnnotationFile(detection, label=1), AnnotationFile(detection, label=0)),
        captions=(AnnotationFile(str(data.train_captions), weight=config.captions_weight),),
        views=data_config(),
    )
    digits = tuple(caption(digit) for digit in range(10))
    watch = dataclasses.replace(
        stage.watch,
        prompts=stage.watch.prompts or (() if stage.watch.prompts_file else digits),
        guidance=config.guidance,
        detection=stage.watch.detection or str(data.test_detection),
    )
    return dataclasses.replace(
        stage,
        seed=seed,
        device="cpu",
        output=None if output is None else str(output),
        datasets=datasets,
        model=dataclasses.replace(stage.model, preset=stage.model.preset or "quickstart", tokenizer=str(tokenizer)),
        loader=dataclasses.replace(stage.loader, seed=seed),
        watch=watch,
    )


def train_stage(
    model: UniGenDet, config: TrainConfig, tokenizer: Tokenizer, console: Console, *, quiet: bool = False
) -> list[dict[str, Any]]:
    """Train a stage in place, leave the averaged weights in the model, and return the metrics of every step."""
    make_watcher = prepare_watcher(config)
    trainer = Trainer(
        make_stage(model, config),
        build_loader(config, model, tokenizer),
        config,
        companions=companions(tokenizer, config.datasets.views),
        watch=make_watcher and make_watcher(model, tokenizer, build_autoencoder(model.config.latent)),
        console=console,
        quiet=quiet,
    )
    history = trainer.run().history
    if trainer.ema is not None:
        trainer.ema.copy_to_model()
    return history


def sample_digits(pipeline: Pipeline, labels: np.ndarray, *, seed: int, batch_size: int) -> np.ndarray:
    """Generate a digit per label; the levels uint8 [N, 8, 8]. Image i depends on ``seed + i`` and its label alone."""
    prompts = [caption(int(label)) for label in labels]
    images = pipeline.generate(prompts, seed=seed, batch_size=batch_size)
    return np.stack([quantise(np.asarray(image, np.float64) * (WHITE / 255)) for image in images])


def detect_records(
    pipeline: Pipeline, records: Sequence[DetectionRecord], folder: Path, **options: Any
) -> list[DetectionOutcome]:
    """What the model says about annotated images below ``folder``, asked its own question, as in training; ``options``:
    of ``scoring.judge``.
    """
    return list(scoring.judge(pipeline, records, root=folder, question=pipeline.data.question, **options))


def run(
    out: str | Path, *, seed: int = 0, config: str | Path | None = None, console: Console | None = None
) -> RunResults:
    """Run the quickstart and leave its folder.

    Args:
        out: the folder; it is created. One that holds something other than an earlier quickstart is refused.
        seed: of data, weights, noise and order; the same seed gives the same result on the same machine.
        config: YAML file with the fields of ``QuickstartConfig``; default: the one that ships.
        console: where progress goes; default: standard output.

    Returns:
        Everything the report shows.

    Raises:
        ValueError: a setting or ``out`` is unfit.
    """
    out = Path(out)
    check(seed >= 0, "seed", seed, "at least 0")
    settings = load_settings(QuickstartConfig, default_config() if config is None else config)
    forms = [getattr(settings, name).model.align_projector for name in ("gduf", "diga")]
    check(forms[0] == forms[1], "diga.model.align_projector", forms[1], f"gduf's, {forms[0]!r}: the model is the same")
    _prepare(out)
    job = _Job(out, seed, settings, console or Console())
    with job.part("data", "Writing digits: real ones, and fakes by two classical generators"):
        data = build_quickstart_data(out / "data", seed, fakes_per_real=settings.fakes_per_real)
        tokenizer = data.tokenizer()
        tokenizer.save(out / "tokenizer")
        digits = data.digits
        judge = DigitJudge(digits.train_images, digits.train_labels, digits.test_images, digits.test_labels)
    torch.manual_seed(seed)
    model = build_model(job.stage("gduf", data), tokenizer, "cpu")
    count = sum(p.numel() for p in model.parameters())
    autoencoder = build_autoencoder(model.config.latent)
    pipeline = Pipeline(model, tokenizer, autoencoder, data_config(), settings.guidance)
    curves, samples = {}, {}
    for name, when, text in (
        ("gduf", "before DIGA", f"GDUF: a model of {count / 1e6:.2f} M parameters learns to generate and to detect"),
        ("diga", "after DIGA", "DIGA: the frozen detector guides the generator"),
    ):
        with job.part(name.upper(), text):
            curves[name.upper()] = thin(train_stage(model, job.stage(name, data), tokenizer, job.console))
        model.eval()
        with job.part(f"generation {when}", f"Generating {len(digits.test_labels)} digits, {when}"):
            # The same noise before and after DIGA.
            samples[when] = sample_digits(pipeline, digits.test_labels, seed=seed, batch_size=settings.batch_size)
    with job.part("detection", "Judging and explaining unseen images"):
        pipeline.save(out / "model")
        entries = write_detection_images(out / "samples", "after", samples["after DIGA"], 0, OWN, data.annotator)
        write_detection_images(out / "samples", "before", samples["before DIGA"], 0, OWN, data.annotator)
        outcomes, pictures = judge_images(job, data, entries)
    results = summarise(job, data, judge, curves, samples, outcomes, pictures)
    with job.part("report", "Writing the report"):
        results = dataclasses.replace(results, durations={**job.durations, "total": time.perf_counter() - job.started})
        results = dataclasses.replace(results, aims=(*results.aims, _time_aim(results.durations["total"])))
        page = write_report(out, results)
    job.console.print(format_table(results))
    job.console.print(f"The report: {page}")
    return results


def _prepare(out: Path) -> None:
    """Make the folder, and clear what an earlier quickstart left there: nothing else is in it once it is claimed."""
    note = "A quickstart made this folder; the next one may replace what it left here."
    claim_folder(out, MARK, PARTS, by="a quickstart", note=note)
    for path in out.iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def thin(history: Sequence[dict[str, Any]], points: int = 100) -> list[dict[str, float]]:
    """A history as at most ``points`` means over equal runs of steps, for the curves."""
    size = max(1, -(-len(history) // points))
    chunks = [history[i : i + size] for i in range(0, len(history), size)]
    names = [n for n in history[0] if n == "step" or n not in AROUND] if history else []
    return [
        {n: c[-1]["step"] if n == "step" else float(np.mean([r[n] for r in c if n in r])) for n in names}
        for c in chunks
    ]


def judge_images(
    job: _Job, data: QuickstartData, own: Sequence[dict[str, Any]]
) -> tuple[list[DetectionOutcome], dict[str, np.ndarray]]:
    """Verdicts and explanations for the test images and the model's own samples, by the model as it was saved."""
    annotations = job.out / "samples" / "detection.json"
    annotations.write_text(json.dumps(list(own), indent=0), encoding="utf-8")
    records: list[DetectionRecord] = [*read_detection(data.test_detection), *read_detection(annotations)]
    pipeline = Pipeline.from_pretrained(job.out / "model")
    outcomes = detect_records(
        pipeline,
        records,
        job.out,
        with_latent=job.config.gduf.datasets.detection_latents,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=job.config.batch_size,
    )
    return outcomes, {o.name: read_png(r.image) for o, r in zip(outcomes, records, strict=True)}


def summarise(
    job: _Job,
    data: QuickstartData,
    judge: DigitJudge,
    curves: dict[str, list[dict[str, float]]],
    samples: dict[str, np.ndarray],
    outcomes: list[DetectionOutcome],
    pictures: dict[str, np.ndarray],
) -> RunResults:
    """All numbers of the report but the time."""
    labels = data.digits.test_labels
    detection = evaluate_detection(outcomes)
    groups = {metrics.group: metrics for metrics in detection.groups}
    agreement = {when: judge.agreement(images, labels) for when, images in samples.items()}
    frechet: dict[str, float | None] = {when: judge.frechet(images) for when, images in samples.items()}
    for name in GENERATORS:
        frechet[name] = judge.frechet(np.stack([pictures[o.name] for o in outcomes if o.group == name]))
    aims = (
        Aim("Prompt agreement", agreement["after DIGA"].accuracy, 0.95,
            meaning="Share of the prompted digits that an SVM, trained on real digits, reads as prompted."),
        Aim("Balanced accuracy, seen generator", groups[GENERATORS[0]].balanced_accuracy, 0.85,
            meaning="Unseen real digits against unseen fakes of the generator the detector trained on."),
        Aim("Balanced accuracy, held-out generator", groups[GENERATORS[1]].balanced_accuracy, 0.75,
            meaning="The same against a generator the detector has never met."),
        Aim("Fréchet distance", frechet["after DIGA"], 30, higher_is_better=False, kind="number",
            meaning="Distance of generated from real test digits in 20 principal components; lower is better."),
        Aim("Explanation ROUGE-L", detection.overall.rouge_l,
            meaning="Overlap of the model's explanations with those measured on the images."),
        Aim("Verdict and explanation agree", detection.overall.agreement,
            meaning="Share of images where the explanation's first sentence says what the real/fake head says."),
    )  # fmt: skip
    settings = {"quickstart": dataclasses.asdict(job.config)}
    return RunResults(
        summary="Trained from scratch on 1,400 real handwritten digits and fakes of one classical generator.",
        seed=job.seed,
        aims=aims,
        curves=curves,
        grids=tuple(_grids(samples, data, job.config.shown)),
        detection=detection,
        roles=ROLES,
        examples=choose_examples(outcomes, pictures),
        agreement=agreement,
        frechet=frechet,
        reference=judge.reference(),
        settings=settings,
    )


def _time_aim(seconds: float) -> Aim:
    return Aim("Time", seconds, 180, higher_is_better=False, kind="seconds", meaning="The whole job, on the CPU.")


def _grids(samples: dict[str, np.ndarray], data: QuickstartData, shown: int) -> Iterator[ImageGrid]:
    """The first samples of every digit, before and after DIGA, and real test digits."""
    labels = data.digits.test_labels
    rows = tuple(caption(digit) for digit in range(10))
    for title, images in (*samples.items(), ("real test digits", data.digits.test_images)):
        yield ImageGrid(title, rows, np.stack([images[labels == digit][:shown] for digit in range(10)]))
