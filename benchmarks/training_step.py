"""A whole training step of each stage against the same step written the published way.

A step is what a trainer does with a batch that has arrived: forward pass, losses, backward pass, clipping, AdamW.
Both start from the same weights, noise and times, and update only what the stage trains. On CPUs they take turns; a GPU
holds one at a time, each with the largest number of decoder layers that fits both.

Useful work is counted exactly (``unigendet.model.flops``); ``mfu`` is its rate over the measured matmul rate, and
``mfu_published`` the utilisation by the convention published for BAGEL, over the rate of the device's data sheet: of
GDUF, on devices whose data sheet is known. ``shares`` says where our step's time goes, by op and direction. A step is
judged, before any update, on a pack with a sample of each kind: its final hidden states where they are read, and the
gradients of the first norm, against the published way in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unigendet.config import ModelConfig
from unigendet.device import data_sheet_tflops
from unigendet.model.flops import StepWork, diga_step, gduf_step
from unigendet.model.losses import (
    Counts,
    NoisedLatents,
    align_loss,
    gduf_losses,
    mse_loss,
    noise_latents,
    sample_timesteps,
)
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import PackedBatch
from unigendet.training.stages import DIGAStage, GDUFStage, alignment_grids

from . import packs, traces
from .candidate import dtype_name
from .contest import Entry, Measurement, Run, Work, free, make_rows, race
from .decoder_layer import default_backend
from .harness import CannotRun, first_call, peak_mib, reason
from .judge import Truth, allowances
from .profile import step_shares
from .published import PublishedAlignment, PublishedModel, PublishedPack
from .record import table
from .work import published_convention

ERROR_FACTOR = 4.0  # as for attention, which decides it
WEIGHTS = {"mse": 1.0, "ce": 1.0, "label": 0.2, "diga": 0.5}
CLIP = 1.0
LEARNING_RATE = 2e-5
JUDGED = "decoder.layers.0.norm1"
# GiB of a GPU: what every step needs, and a decoder layer of BAGEL-7B's width with its AdamW state and activations.
FIXED_GIB, LAYER_GIB = 28, 19


@dataclass(frozen=True)
class Step:
    """One way of training: ``losses()`` gives the terms, ``hidden()`` the final states in stream-major order."""

    model: nn.Module
    losses: Callable[[], dict[str, Tensor]]
    hidden: Callable[[], Tensor]

    def learning(self) -> dict[str, nn.Parameter]:
        """What the stage trains."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def total(self) -> Tensor:
        """The weighted loss."""
        return torch.stack([WEIGHTS[name] * term for name, term in self.losses().items()]).sum()

    def judged(self) -> dict[str, Tensor]:
        """What a truth compares."""
        with torch.no_grad():
            found = {"hidden": self.hidden()}
        norms = {name: p for name, p in self.learning().items() if name.startswith(JUDGED)}
        gradients = torch.autograd.grad(self.total(), list(norms.values()))
        return found | {f"gradient of {name}": g for name, g in zip(norms, gradients, strict=True)}

    def stepper(self) -> Callable[[], None]:
        """The whole step, with an optimizer of its own."""
        parameters = list(self.learning().values())
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

        def step() -> None:
            self.total().backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


@dataclass(frozen=True)
class StepCase:
    """A stage on a trace at a model's size. ``teacher_trace``: of DIGA."""

    stage: str
    size: str
    trace: str
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    packed: traces.Trace
    teacher: traces.Trace | None = None
    lacks: str | None = None  # what the device lacks for it

    @property
    def op(self) -> str:
        """``gduf_step`` or ``diga_step``."""
        return f"{self.stage}_step"

    @property
    def shape(self) -> str:
        """The model's size."""
        return self.size

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.op} {self.trace} {self.size} {dtype_name(self.dtype)}"

    @property
    def candidates(self) -> tuple[str, ...]:
        """Our default backend here, and the peer."""
        return default_backend(self.device), "published"

    @property
    def layer(self) -> int:
        """DIGA's layer, of student and teacher: as far up as the published 8 of 28."""
        return max(1, round(self.config.num_layers * 8 / 28))

    @functools.cached_property
    def work(self) -> dict[str, Work]:
        """Useful work of a step."""
        return {"step": Work(self._count().total)}

    def _count(self) -> StepWork:
        batch = packs.pack_of(self.packed, self.config)
        if self.teacher is None:
            return gduf_step(self.config, batch)
        teacher = packs.pack_of(self.teacher, self.config)
        return diga_step(self.config, batch, teacher, align_layer=self.layer, teacher_layer=self.layer)

    def run(self, run: Run) -> None:
        """A row for each candidate."""
        names = [name for name in self.candidates if run.wants(name)]
        found: dict[str, Measurement] = {}
        failures: dict[str, str] = {}
        try:
            if self.lacks is not None:
                raise CannotRun(self.lacks)
            run.check_time()
        except CannotRun as error:
            failures = dict.fromkeys(names, reason(error))
        else:
            truth, why = self._truth(run)
            for together in [names] if self.device.type == "cpu" else [[name] for name in names]:
                self._race(together, truth, why, run, found, failures)
        common = {"op": self.op, "trace": self.trace, "shape": self.size, "dtype": dtype_name(self.dtype)}
        common |= {"direction": "step"}
        rows = make_rows(common, names, {"published"}, found, failures, self.work["step"], run.ceilings)
        run.progress.show([*table(run.add(rows)), *_more(rows)])

    def _race(
        self,
        names: list[str],
        truth: Truth | None,
        why: str | None,
        run: Run,
        found: dict[str, Measurement],
        failures: dict[str, str],
    ) -> None:
        """Measure candidates in turns; results go to ``found`` or ``failures``."""
        steps: dict[str, Callable[[], None]] = {}
        entries: dict[str, Entry] = {}
        for name in names:
            run.progress.detail(self.title, f"{name}, first step")
            try:
                run.check_time()
                errors = None if truth is None else truth.errors(self._small()._step(name, self.dtype).judged())
                free(self.device)
                base = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None
                steps[name] = self._step(name, self.dtype).stepper()
                _, seconds = first_call(steps[name], self.device)
                entries[name] = Entry(None, seconds, errors, why)
            except Exception as error:  # say, out of memory: the other may still run
                failures[name] = run.failure(error)
        run.progress.detail(self.title, "in turns")
        turns = {name: lambda name=name: [steps[name]] for name in entries}
        # By the clock, as a trainer is: what a step costs the host counts.
        for name, (timing, columns) in race(turns, run, failures, turn=1, rounds=5, on_host=True).items():
            columns = {**columns, **self._columns(timing.ms, run)}
            peak = None
            try:
                peak = peak_mib(steps[name], self.device)
                if base is not None:  # a GPU holds one model at a time: with its weights and its optimizer's state
                    peak = (torch.cuda.max_memory_allocated(self.device) - base) / 2**20
                if name != "published":
                    columns["shares"] = step_shares(steps[name], self.device)
            except Exception as error:  # the time stands, whatever the profiler does
                columns["not_profiled"] = run.failure(error)
            found[name] = Measurement(dataclasses.asdict(timing), entries[name], peak, columns=columns)
        steps.clear()
        free(self.device)

    def _small(self) -> StepCase:
        """The same with a sample of each kind."""
        chosen = self.packed.judged()
        teacher = None if self.teacher is None else self.teacher.part(chosen)
        return dataclasses.replace(self, packed=self.packed.part(chosen), teacher=teacher)

    def _truth(self, run: Run) -> tuple[Truth | None, str | None]:
        """The published way in float64, and in the step's own dtype."""
        run.progress.detail(self.title, "float64")
        try:
            run.check_time()
            exact = self._small()._step("published", torch.float64).judged()
            free(self.device)
            plain = self._small()._step("published", self.dtype).judged()
        except Exception as error:  # say, out of memory: speed without a judge is shown as such
            return None, run.failure(error)
        finally:
            free(self.device)
        return Truth(exact, allowances(exact, plain, ERROR_FACTOR)), None

    def _columns(self, ms: float, run: Run) -> dict[str, Any]:
        layout = self.packed.layout
        columns: dict[str, Any] = {"layers": self.config.num_layers, "tokens": layout.num_queries}
        columns["tokens_per_second"] = 1e3 * layout.num_queries / ms
        columns["mfu"] = self.work["step"].flops / ms / 1e9 / run.ceilings["matmul_tflops"]
        peak = data_sheet_tflops(self.device)
        if self.teacher is None and peak is not None:
            lengths = layout.cu_seqlens_q.diff().tolist()
            flops = published_convention(self.config, layout.num_queries, lengths)
            columns["mfu_published"] = flops / ms / 1e9 / peak
        return columns

    def _step(self, name: str, dtype: torch.dtype) -> Step:
        model = self._model()
        batch = packs.pack_of(self.packed, self.config).to(self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        times = sample_timesteps(batch, 1.0, generator)
        noise = torch.randn(batch.latent_positions.shape[0], self.config.latent.token_dim, generator=generator,
                            device=self.device)  # fmt: skip
        latents = noise_latents(model, batch, times, noise)
        teacher = None if self.teacher is None else packs.pack_of(self.teacher, self.config).to(self.device)
        make = self._published if name == "published" else self._ours
        return make(model.to(dtype), batch, latents, teacher)

    def _model(self) -> UniGenDet:
        """The same random weights every time; a velocity head that is not zero, so that its gradients are none."""
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices=devices), torch.device(self.device):
            torch.manual_seed(0)
            model = UniGenDet(self.config)
            nn.init.normal_(model.llm2vae.weight, std=self.config.hidden_size**-0.5)
        return model

    def _ours(self, model: UniGenDet, batch: PackedBatch, latents: NoisedLatents, teacher: PackedBatch | None) -> Step:
        if teacher is None:
            GDUFStage(model)  # marks what learns
            capture: tuple[int, ...] = ()
        else:
            stage = DIGAStage(model, align_layer=self.layer, teacher_layer=self.layer)
            grids = alignment_grids(batch, teacher)
            capture = (self.layer,)

        def forward() -> Any:
            options = {"latent_tokens": latents.tokens, "timesteps": latents.timesteps}
            return model(batch, **options, capture=capture, only_read=True)

        def losses() -> dict[str, Tensor]:
            output = forward()
            if teacher is None:
                return gduf_losses(model, batch, output, latents)
            student = output.captured[self.layer]
            aligned = align_loss(model, batch, student, stage.features(teacher), grids, weight=WEIGHTS["diga"])
            return {"mse": mse_loss(model, batch, output, latents, Counts.of(batch)), "diga": aligned / WEIGHTS["diga"]}

        return Step(model, losses, lambda: forward().hidden)

    def _published(
        self, model: UniGenDet, batch: PackedBatch, latents: NoisedLatents, teacher: PackedBatch | None
    ) -> Step:
        dtype = model.vae2llm.weight.dtype
        own = PublishedModel.of(model)
        pack = PublishedPack.of(batch, self.packed.splits, dtype)
        order = batch.layout.stream_to_sequence
        if batch.readout is not None and (teacher is None or self.layer < self.config.num_layers):
            order = order.index_select(0, batch.readout.stream_rows)
        if teacher is None:
            if own.align_head is not None:
                own.align_head.requires_grad_(False)
            losses = lambda: own.gduf_losses(pack, latents)  # noqa: E731
        else:
            alignment = PublishedAlignment(own, align_layer=self.layer, teacher_layer=self.layer)
            teacher_pack = PublishedPack.of(teacher, self.teacher.splits, dtype)
            losses = lambda: alignment.losses(pack, latents, teacher_pack)  # noqa: E731
        return Step(own, losses, lambda: own(pack, latents.tokens, latents.timesteps)[0].index_select(0, order))


def _more(rows: list[dict[str, Any]]) -> list[str]:
    """Throughput, utilisation and shares, for the terminal."""
    lines = []
    for row in rows:
        if row["status"] != "ok":
            continue
        published = f", {100 * row['mfu_published']:.0f} % as published" if "mfu_published" in row else ""
        rate = f"{row['tokens_per_second']:,.0f} tokens/s, utilisation {100 * row['mfu']:.0f} %{published}"
        lines.append(f"  {row['backend']}: {rate}")
        if "shares" in row:
            shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row["shares"].items())
            lines.append(f"    time: {shares}")
    return lines


def layers_that_fit(memory_gib: float) -> int:
    """Decoder layers of BAGEL-7B's width whose step fits a GPU both ways; 0 if not even one does."""
    return max(0, min(28, int((0.9 * memory_gib - FIXED_GIB) / LAYER_GIB)))


def cases(device: torch.device, size: str) -> Iterator[StepCase]:
    """BAGEL-7B's width in bfloat16 on GPUs; the quickstart's and a small width in float32 on CPUs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def step(
        stage: str, text: str, config: ModelConfig, trace: traces.Trace, teacher: traces.Trace | None = None
    ) -> StepCase:
        return StepCase(stage, text, trace.name, config, device, dtype, trace, teacher)

    if size == "tiny":
        config = packs.small_config(32, 2, heads=4, kv_heads=2, intermediate=48, vocab=64)
        yield step("gduf", "hidden 32", config, traces.tiny())
        yield step("diga", "hidden 32", config, *traces.tiny_diga())
        return
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        layers = layers_that_fit(memory)
        lacks = f"it needs about {FIXED_GIB + LAYER_GIB} GiB; the device has {memory:.0f}" if layers < 1 else None
        config, text = packs.bagel_width(max(1, layers)), f"BAGEL-7B width, {max(1, layers)} layers"
        for one in (
            step("gduf", text, config, traces.trace("gduf_32k")),
            step("diga", text, config, traces.trace("diga_23k"), traces.trace("diga_23k_teacher")),
        ):
            yield dataclasses.replace(one, lacks=lacks)
        return
    small, text = packs.quickstart_config(), "quickstart width"
    yield step("gduf", text, small, traces.trace("many_small_2k"))
    yield step("gduf", text, small, traces.trace("many_small_16k"))
    if size == "full":
        config, text = packs.small_config(), "hidden 512, 4 layers"
        yield step("gduf", text, config, traces.trace("gduf_4k"))
        yield step("diga", text, config, traces.trace("diga_4k"), traces.trace("diga_4k_teacher"))
