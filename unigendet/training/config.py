"""Every setting of a training run, as frozen dataclasses that check themselves; ``configs/*.yaml`` fill them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from unigendet.config import PRESETS, ConditionDropout, DataConfig, GuidanceConfig, LoaderConfig, check
from unigendet.config_file import load_settings

RECOMPUTE = ("none", "full", "attention", "selective")
SKIPS = 10  # so many skipped steps in a row end a run


@contextmanager
def naming_setting(name: str) -> Iterator[None]:
    """Within it, a FileNotFoundError or ValueError begins with the setting that is to blame, if it does not already."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if str(error).startswith(name):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{name}: {error}") from error


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, clipping and the learning rate's course (published defaults).

    The rate rises linearly over ``warmup_steps``, by default ``warmup_fraction`` of the run's steps, and then stays
    (``constant``) or falls along half a cosine to ``final_lr`` · lr. ``clip``: largest norm of all gradients together.
    """

    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = 0.0
    warmup_fraction: float = 0.05
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            check(getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "positive")
        check(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")
        check(self.schedule in ("constant", "cosine"), "optimizer.schedule", self.schedule, "'constant' or 'cosine'")
        for name in ("final_lr", "warmup_fraction"):
            check(0 <= getattr(self, name) <= 1, f"optimizer.{name}", getattr(self, name), "in [0, 1]")
        check(self.warmup_steps is None or self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "≥ 0")

    def warmup(self, total_steps: int) -> int:
        """Length of the warm-up in steps. Raises ValueError if it is longer than the run."""
        steps = round(self.warmup_fraction * total_steps) if self.warmup_steps is None else self.warmup_steps
        check(steps <= total_steps, "optimizer.warmup_steps", steps, f"at most total_steps ({total_steps})")
        return steps


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms: ``mse`` in both stages, ``ce`` and ``label`` in GDUF, ``diga`` in DIGA.

    These are the published scripts'; the paper states 1 for ``label``. With ``diga`` 0 no teacher runs.
    ``diga_schedule``: the alignment's weight stays (``constant``) or falls to zero, in a straight line (``linear``) or
    along half a cosine (``cosine``), which it reaches at the fraction ``diga_until`` of the run's steps.
    """

    mse: float = 1.0
    ce: float = 1.0
    label: float = 0.2
    diga: float = 0.5
    diga_schedule: Literal["constant", "linear", "cosine"] = "constant"
    diga_until: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mse", "ce", "label", "diga"):
            check(getattr(self, name) >= 0, f"losses.{name}", getattr(self, name), "at least 0")
        kinds = ("constant", "linear", "cosine")
        check(self.diga_schedule in kinds, "losses.diga_schedule", self.diga_schedule, f"one of {kinds}")
        check(0 < self.diga_until <= 1, "losses.diga_until", self.diga_until, "in (0, 1]")

    def alignment(self, progress: float) -> float:
        """The alignment's weight in a step that comes after the fraction ``progress`` in [0, 1) of the run."""
        if self.diga_schedule == "constant":
            return self.diga
        done = min(1.0, progress / self.diga_until)
        return self.diga * (1 - done if self.diga_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class ModelSource:
    """Where a run's model comes from: a ``checkpoint``, or new weights of a ``preset``'s sizes; never both.

    A run needs one of the two, unless it is resumed and has its model from there.

    ``sizes``: the preset whose sizes the checkpoint has. A dry run plans with them where the checkpoint is not at hand;
    one that is there must have these sizes. ``initialize``: published modules that the checkpoint may lack (BAGEL's has
    neither ``fake_cls_head`` nor ``diga_mlp``). ``align_projector``: φ's form, see ``ModelConfig``; null: the
    checkpoint's, or the preset's. A form that the checkpoint does not have must also stand in ``initialize``, as
    ``diga_mlp`` or ``diga_conv``.
    ``tokenizer``: folder; default: the checkpoint's. ``autoencoder``: file of its weights, for ``flux``.
    """

    preset: str | None = None
    checkpoint: str | None = None
    sizes: str | None = None
    initialize: tuple[str, ...] = ()
    align_projector: Literal["mlp", "conv"] | None = None
    tokenizer: str | None = None
    autoencoder: str | None = None

    def __post_init__(self) -> None:
        given = [self.preset, self.checkpoint]
        check(given.count(None) >= 1, "model", given, "a preset or a checkpoint, not both")
        for name in ("preset", "sizes"):
            value = getattr(self, name)
            check(value is None or value in PRESETS, f"model.{name}", value, f"one of {sorted(PRESETS)}")
        alone = self.sizes is not None and self.checkpoint is None
        check(not alone, "model.sizes", self.sizes, "null without model.checkpoint")


@dataclass(frozen=True)
class AnnotationFile:
    """One annotation file. Its image paths are relative to ``image_root``, by default its folder.

    For detection, ``file`` may also be a folder with ``real/`` and ``fake/``. Every sample then has the question of
    ``datasets.views`` and the plain verdict as its answer ("This is a real image.").
    ``label``: read only the detection records with this label, so that real and fake images have weights of their own.
    ``balance``: draw real and fake images of a detection entry equally often, whatever their numbers; each label then
    has half of the ``weight`` and epochs of its own.
    """

    file: str
    image_root: str | None = None
    weight: float = 1.0
    label: int | None = None
    balance: bool = False

    def __post_init__(self) -> None:
        check(self.weight > 0, f"weight of {self.file}", self.weight, "positive")
        check(self.label in (None, 0, 1), f"label of {self.file}", self.label, "1 (real), 0 (fake) or null (both)")
        check(self.label is None or not self.balance, f"balance of {self.file}", self.balance, "false with a label")


@dataclass(frozen=True)
class DatasetsConfig:
    """What a run reads; samples are drawn in proportion to the files' weights. DIGA reads the captions only.

    ``detection``: files in FakeClue's format or folders, ``captions``: files in LAION's. ``detection_latents`` False
    leaves the latent image out of detection samples: a detector without symbiotic attention.
    """

    detection: tuple[AnnotationFile, ...] = ()
    captions: tuple[AnnotationFile, ...] = ()
    detection_latents: bool = True
    views: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        for entry in self.captions:
            labelled = entry.balance or entry.label is not None
            check(not labelled, f"datasets.captions: {entry.file}", entry, "without label and balance")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun starts divide the model (FSDP2); one process has it whole.

    ``replicate`` groups of ``shard`` processes each hold all parameters, divided among the group; null: all processes
    are one group, or as many as ``replicate`` leaves. ``cpu_offload`` keeps parameters, gradients and the optimizer's
    state in host memory. ``timeout``: minutes after which a collective that others do not join fails.
    """

    replicate: int = 1
    shard: int | None = None
    cpu_offload: bool = False
    timeout: int = 30

    def __post_init__(self) -> None:
        for name in ("replicate", "timeout"):
            check(getattr(self, name) > 0, f"parallel.{name}", getattr(self, name), "positive")
        check(self.shard is None or self.shard > 0, "parallel.shard", self.shard, "positive, or null")

    @property
    def sums_once(self) -> bool:
        """Whether copies of the model sum their gradients once per step, rather than in every pack of it."""
        return self.replicate > 1 and not self.cpu_offload


@dataclass(frozen=True)
class WatchConfig:
    """Looks at a run while it trains: sample images from fixed noise, and scores on images it does not train on.

    ``every``: steps from one look to the next, with one before the first step and one after the last; 0 = never.
    ``prompts``, or a ``prompts_file`` as ``unigendet generate`` takes it: ``count`` images of each, ``size`` (height,
    width) pixels, by default the model's largest square. Image i starts from the noise of ``seed`` + i at every look.
    ``detection``: held-out images, an annotation file (its paths relative to ``image_root``, as in ``datasets``) or a
    folder with ``real/`` and ``fake/``; at most ``limit`` of them are judged, evenly over labels and categories.
    ``max_tokens``: longest explanation; 0 = verdict only. ``batch_size``: images at a time, in each process.
    ``use_ema``: look at the averaged weights where the run keeps them.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    count: int = 4
    size: tuple[int, int] | None = None
    seed: int = 0
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    detection: str | None = None
    image_root: str | None = None
    limit: int = 200
    max_tokens: int = 0
    batch_size: int = 16
    use_ema: bool = True

    def __post_init__(self) -> None:
        for name in ("every", "seed", "max_tokens"):
            check(getattr(self, name) >= 0, f"watch.{name}", getattr(self, name), "at least 0")
        for name in ("count", "limit", "batch_size"):
            check(getattr(self, name) > 0, f"watch.{name}", getattr(self, name), "positive")
        prompts, file = self.prompts, self.prompts_file
        check(all(prompt.strip() for prompt in prompts), "watch.prompts", prompts, "texts that are not empty")
        check(not prompts or file is None, "watch.prompts_file", file, "null with watch.prompts")
        check(self.size is None or min(self.size) > 0, "watch.size", self.size, "(height, width) in pixels, or null")
        alone = self.image_root is not None and self.detection is None
        check(not alone, "watch.image_root", self.image_root, "null without watch.detection")


@dataclass(frozen=True)
class ProfileConfig:
    """A profile of ``steps`` training steps from step ``start`` on, numbered from 1; null profiles nothing.

    ``memory``: also record what takes and frees memory.
    """

    start: int | None = None
    steps: int = 3
    memory: bool = False

    def __post_init__(self) -> None:
        check(self.start is None or self.start > 0, "profile.start", self.start, "positive, or null")
        check(self.steps > 0, "profile.steps", self.steps, "positive")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases: the ``project`` that the run is told to (null: none), its ``name`` and ``tags`` there.

    ``entity``: user or team; null: the login's. ``mode``: ``offline`` keeps everything in the output folder, from which
    ``wandb sync`` sends it.
    """

    project: str | None = None
    name: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("project", "name", "entity"):
            value = getattr(self, name)
            check(value is None or bool(value.strip()), f"wandb.{name}", value, "a name, or null")
        check(self.mode in ("online", "offline"), "wandb.mode", self.mode, "'online' or 'offline'")
        check(all(tag.strip() for tag in self.tags), "wandb.tags", self.tags, "texts that are not empty")


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training; the defaults are GDUF's (paper section 4.1).

    ``seed`` is that of new weights, noise and timesteps; the order of the data has its own, ``loader.seed``.
    ``align_layer``, ``teacher_layer``: the student's and the teacher's decoder layer in DIGA, numbered from 1.
    ``teacher_norm``: ``tokens`` standardises the teacher's features over the tokens of each image. ``shuffled_teacher``
    is a control, not a method: every image is aligned with the teacher's features of another image of its pack.
    ``ema_decay`` None keeps no averaged weights. ``precision`` bf16 computes in bfloat16 with float32 weights, by
    autocast, or with copies of them where several processes divide the model. ``recompute``: activation checkpointing,
    see ``unigendet.model.recompute``. ``compile``: train with layers compiled by torch.compile. ``accumulate``: packs
    per step and process. ``on_nonfinite``: a step with a loss or gradient that is not finite stops the run, or is
    skipped (``skip``), unless ``SKIPS`` follow one another. ``save_every`` 0 saves at the end only, and the last
    ``keep_checkpoints`` are kept. ``output`` None writes nothing. ``peak_tflops``: dense TFLOP/s of the device at best,
    of which ``mfu`` is the share that the run makes use of; None: bfloat16's on its data sheet, where that is known.
    """

    stage: Literal["gduf", "diga"] = "gduf"
    total_steps: int = 1000
    timestep_shift: float = 1.0
    align_layer: int = 8
    teacher_layer: int = 8
    teacher_norm: Literal["none", "tokens"] = "none"
    shuffled_teacher: bool = False
    ema_decay: float | None = 0.99
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "full", "attention", "selective"] = "none"
    compile: bool = False
    accumulate: int = 1
    on_nonfinite: Literal["stop", "skip"] = "stop"
    seed: int = 0
    device: str = "auto"
    log_every: int = 10
    save_every: int = 0
    keep_checkpoints: int = 2
    output: str | None = None
    peak_tflops: float | None = None
    model: ModelSource = field(default_factory=ModelSource)
    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    dropout: ConditionDropout = field(default_factory=ConditionDropout)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: LossWeights = field(default_factory=LossWeights)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        check(self.stage in ("gduf", "diga"), "stage", self.stage, "'gduf' or 'diga'")
        check(self.precision in ("fp32", "bf16"), "precision", self.precision, "'fp32' or 'bf16'")
        check(self.teacher_norm in ("none", "tokens"), "teacher_norm", self.teacher_norm, "'none' or 'tokens'")
        check(self.recompute in RECOMPUTE, "recompute", self.recompute, f"one of {RECOMPUTE}")
        check(self.on_nonfinite in ("stop", "skip"), "on_nonfinite", self.on_nonfinite, "'stop' or 'skip'")
        check(self.accumulate > 0, "accumulate", self.accumulate, "positive")
        # What a compiled layer runs are no operators that could be told apart, and its buffers are used again.
        apart = self.recompute in ("attention", "selective")
        check(not (self.compile and apart), "compile", self.compile, f"false with recompute {self.recompute!r}")
        for name in ("total_steps", "align_layer", "teacher_layer", "log_every", "keep_checkpoints", "timestep_shift"):
            check(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("save_every", "seed"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        check(self.peak_tflops is None or self.peak_tflops > 0, "peak_tflops", self.peak_tflops, "positive, or null")
        check(self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1), or null")
        self.optimizer.warmup(self.total_steps)
        start = self.profile.start
        check(start is None or start <= self.total_steps, "profile.start", start, f"≤ total_steps ({self.total_steps})")
        writing = {"profile.start": start, "wandb.project": self.wandb.project}
        for name, value in writing.items():
            check(value is None or self.output is not None, "output", self.output, f"a folder for {name} to write to")


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's settings from a YAML file; ``overrides`` such as ``optimizer.lr=1e-4`` win over it.

    Raises FileNotFoundError, or ValueError that names the setting that is unknown, of a wrong type or out of range.
    """
    return load_settings(TrainConfig, path, overrides)
