"""The command line: ``unigendet quickstart | train | generate | detect | bench | info``.

Every command is a thin layer over the package. Exit codes: 0 done, 1 the request could not be carried out (the message
says why), 2 the command line itself is wrong, 130 interrupted. A user's mistake gives one line, not a traceback;
``--traceback`` shows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigendet import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from unigendet.inference.pipeline import Pipeline

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NEEDS_EXTRA = {"PIL", "diffusers", "jinja2", "jsonargparse", "markupsafe", "matplotlib", "rich", "rouge_score",
               "safetensors", "scipy", "sklearn", "tensorboard", "tokenizers", "transformers", "yaml"}  # fmt: skip


class UserError(Exception):
    """Something the user can put right; its text is the whole message."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "train" and all("=" in r and not r.startswith("-") for r in rest):
        options.overrides += rest  # argparse takes only the first run of them
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("unigendet: interrupted", file=sys.stderr)
        return 130
    except (UserError, ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if options.traceback:
            raise
        print(f"unigendet {options.command}: {_explain(error)}", file=sys.stderr)
        return 1


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] in NEEDS_EXTRA:
        return f"this command needs the package {error.name.partition('.')[0]!r}: pip install 'unigendet[train]'"
    kind = "" if isinstance(error, UserError | ValueError | OSError) else f"{type(error).__name__}: "
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{kind}{error}{notes}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="folder of a trained model")
    device.add_argument(
        "--autoencoder", type=Path, metavar="FILE", help="the autoencoder's weights (default: ae.safetensors in FOLDER)"
    )
    device.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    device.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="of the weights (default: bfloat16 on cuda, float32 elsewhere)")  # fmt: skip

    parser = argparse.ArgumentParser(
        prog="unigendet",
        description="One transformer that generates images and detects generated ones, on fused kernels.",
    )
    parser.add_argument("--version", action="version", version=f"unigendet {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: object, text: str, *parents: argparse.ArgumentParser, epilog: str | None = None
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[common, *parents], epilog=epilog)
        command.set_defaults(run=run)
        return command

    quick = add(
        "quickstart", _quickstart, "Train a small model on handwritten digits in both stages, on the CPU, and report."
    )
    quick.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        metavar="DIR",
        help="where everything goes (default: quickstart)",
    )
    quick.add_argument("--seed", type=int, default=0, help="of data, weights and noise (default: 0)")
    quick.add_argument(
        "--config", type=Path, metavar="FILE", help="settings (default: the ones that ship with the package)"
    )

    train = add("train", _train, "Train one stage (GDUF or DIGA) as a YAML file says.",
                epilog="Example: unigendet train --config gduf.yaml total_steps=500 optimizer.lr=1e-5")  # fmt: skip
    train.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file of the run")
    train.add_argument("overrides", nargs="*", type=_setting, metavar="SETTING=VALUE",
                       help="a setting that wins over the file's; dots for nested ones, values as in YAML")  # fmt: skip
    train.add_argument("--resume", nargs="?", const=True, default=False, type=Path, metavar="FOLDER",
                       help="go on from this checkpoint; without FOLDER, from the newest of the run "
                            "(put --resume last then)")  # fmt: skip

    generate = add("generate", _generate, "Make images from prompts.", device,
                   epilog="Sampling settings that are not given are the model folder's (generation.json).")  # fmt: skip
    generate.add_argument("--prompt", action="append", required=True, help="what to show; repeat it for several images")
    generate.add_argument("--out", type=Path, required=True, metavar="PATH",
                          help="the picture to write; with several images, a folder")  # fmt: skip
    generate.add_argument("--count", type=int, default=1, help="images per prompt (default: 1)")
    generate.add_argument("--seed", type=int, default=0, help="of the first image; each next one adds 1 (default: 0)")
    generate.add_argument(
        "--size", type=_size, metavar="HxW", help="pixels (default: the largest square the model makes)"
    )
    generate.add_argument("--steps", type=int, help="points in time; one less Euler steps")
    generate.add_argument("--text-scale", type=float, help="text guidance; 1 = none")
    generate.add_argument("--shift", type=float, metavar="S",
                          help="timestep shift; above 1, more of the steps at high noise")  # fmt: skip
    generate.add_argument("--renorm", choices=["global", "channel", "text_channel"],
                          help="what bounds the guided velocity: its norm over the image, per token, or per token "
                               "for the text guidance alone")  # fmt: skip
    generate.add_argument("--batch-size", type=int, default=8, help="images denoised together (default: 8)")

    detect = add("detect", _detect, "Tell real images from generated ones; one line per picture.", device,
                 epilog="Line: verdict, probability of being real, path, explanation, separated by tabs.")  # fmt: skip
    detect.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="image files, or folders of them (searched recursively)"
    )
    detect.add_argument("--question", help="what the model is asked (default: the question it was trained with)")
    detect.add_argument("--json", action="store_true", help="one JSON object per line")
    detect.add_argument("--no-latent", action="store_true", help="leave out the latent view (no symbiotic attention)")
    detect.add_argument(
        "--max-tokens", type=int, default=256, help="longest explanation; 0 = verdict only (default: 256)"
    )
    detect.add_argument("--batch-size", type=int, default=16, help="images judged together (default: 16)")

    _add_bench(
        add("bench", _bench, "Measure the ops and training steps against their peers and this machine's own ceilings.",
            epilog="Exit code 1: an answer was wrong, a benchmark failed, or something became slower than OLD.")
    )  # fmt: skip

    info = add("info", _info, "Show versions, devices, and which implementations of each op this build has.")
    info.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--quick", action="store_true", help="smaller and shorter: under two minutes on two cores")
    for name, text in (
        ("op", "only these ops or benchmarks"),
        ("trace", "only these packs"),
        ("backend", "only these backends and peers"),
        ("direction", "only these directions: forward, backward, both, step, host"),
    ):
        bench.add_argument(f"--{name}", nargs="+", action="extend", metavar="NAME", help=f"{text} (see --list)")
    bench.add_argument("--list", action="store_true", help="show what there is to measure, and stop")
    bench.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    bench.add_argument("--out", type=Path, default=Path("unigendet-bench"), metavar="DIR",
                       help="where results and the report go (default: unigendet-bench)")  # fmt: skip
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write all rows into this one file")
    bench.add_argument("--compare", type=Path, metavar="OLD",
                       help="file or folder of an earlier run on this machine: show what became slower")  # fmt: skip
    bench.add_argument("--seconds", type=float,
                       help="measuring time of one candidate (default: 1, on a GPU 0.3, with --quick 0.1)")  # fmt: skip
    bench.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="begin nothing new after this time (default: none, with --quick 100)",
    )
    bench.add_argument("--record", action="store_true",
                       help="keep the results in the checkout's benchmarks/results instead")  # fmt: skip


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, say 512x768") from None


def _setting(text: str) -> str:
    name, equals, _ = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write NAME=VALUE, say optimizer.lr=1e-5")
    return text


def _quickstart(options: argparse.Namespace) -> int:
    from unigendet.quickstart import run

    run(options.out, seed=options.seed, config=options.config)
    return 0


def _train(options: argparse.Namespace) -> int:
    from unigendet.training import load_train_config, train

    train(load_train_config(options.config, options.overrides), resume=options.resume)
    return 0


def _pipeline(options: argparse.Namespace) -> Pipeline:
    import torch

    from unigendet.device import find_device
    from unigendet.inference.pipeline import Pipeline

    device = find_device(options.device)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = default if options.dtype == "auto" else getattr(torch, options.dtype)
    return Pipeline.from_pretrained(options.model, device=device, dtype=dtype, autoencoder=options.autoencoder)


def _generate(options: argparse.Namespace) -> int:
    prompts = [prompt for prompt in options.prompt for _ in range(options.count)]
    if not prompts:
        raise UserError(f"--count is {options.count}; it must be at least 1")
    single = len(prompts) == 1 and options.out.suffix.lower() in IMAGE_SUFFIXES
    if not single and options.out.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"--out {options.out} is one picture, but {len(prompts)} images are asked for; name a folder")
    target = options.out.parent if single else options.out
    if target.exists() and not target.is_dir():
        raise UserError(f"--out: {target} is a file; it must be a folder")
    if not single and len(prompts) == 1 and options.out.suffix and not options.out.is_dir():
        raise UserError(
            f"--out {options.out} names no picture format; use one of {', '.join(sorted(IMAGE_SUFFIXES))}, or a folder"
        )
    target.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    pipeline = _pipeline(options)
    asked = {
        "num_timesteps": options.steps,
        "text_scale": options.text_scale,
        "timestep_shift": options.shift,
        "renorm": options.renorm,
    }
    guidance = dataclasses.replace(pipeline.guidance, **{k: v for k, v in asked.items() if v is not None})

    def show(done: int, steps: int) -> None:
        if sys.stderr.isatty():
            print(f"\rstep {done}/{steps}", end="\n" if done == steps else "", file=sys.stderr)

    images = pipeline.generate(
        prompts, size=options.size, guidance=guidance, seed=options.seed, batch_size=options.batch_size, progress=show
    )
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        path = options.out if single else options.out / f"{i:05}.png"
        image.save(path)
        print(f"{path}\tseed {options.seed + i}\t{prompt}")
    return 0


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are; folders as the images anywhere below them, sorted. Raises UserError for what is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"no images in {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
            found.extend(inside)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"there is no file or folder {path}")
    return found


def _detect(options: argparse.Namespace) -> int:
    from unigendet.data.transforms import read_image

    paths = find_images(options.paths)
    pipeline = _pipeline(options)
    broken: list[str] = []

    def readable() -> Iterator[Image]:
        for path in paths:
            try:
                image = read_image(path)
            except (ValueError, OSError) as error:
                broken.append(str(error))  # it names the picture
                if options.json:
                    print(json.dumps({"path": str(path), "error": str(error)}), flush=True)
            else:
                yield image

    detections = pipeline.detect(
        readable(), question=options.question, with_latent=not options.no_latent, max_new_tokens=options.max_tokens,
        batch_size=options.batch_size,
    )  # fmt: skip
    for one in detections:
        if options.json:
            fields = {
                "path": one.name,
                "verdict": one.verdict,
                "probability_real": one.probability,
                "explanation": one.explanation,
            }
            print(json.dumps(fields), flush=True)
        else:
            probability = "-" if one.probability is None else f"{one.probability:.3f}"
            print(f"{one.verdict}\t{probability}\t{one.name}\t{' '.join(one.explanation.split())}", flush=True)
    for line in broken:
        print(f"unigendet detect: not judged: {line}", file=sys.stderr)
    return 1 if broken else 0


def _bench(options: argparse.Namespace) -> int:
    from unigendet.benchmarks.suite import Settings, bench, describe
    from unigendet.device import find_device

    for name in ("seconds", "limit"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}; it must be a positive number of seconds")
    settings = Settings(
        device=find_device(options.device),
        size="quick" if options.quick else "full",
        ops=options.op,
        traces=options.trace,
        backends=options.backend,
        directions=options.direction,
        out=options.out,
        seconds=options.seconds,
        limit=options.limit,
    )
    if options.list:
        print("\n".join(describe(settings)))
        return 0
    return bench(settings, json=options.json, old=options.compare, record=options.record)


def _info(options: argparse.Namespace) -> int:
    facts = gather_info()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for title, values in facts.items():
        print(title)
        for name, value in values.items():
            print(f"  {name:<24}{', '.join(value) if isinstance(value, list) else value}")
    return 0


def gather_info() -> dict[str, dict[str, str | list[str]]]:
    """Versions, devices, implementations of each op, and installed extras, as ``info`` shows them."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from unigendet.ops.backends import available, extension_facts

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    versions = {"unigendet": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: installed(name) for name in ("triton", "numpy")}
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
    extras = "transformers, diffusers, tokenizers, safetensors, pillow, scikit-learn, jsonargparse, rich"
    return {
        "versions": versions,
        "devices": devices,
        "ops (backends built)": available(),
        "compiled extension": _extension(extension_facts()),
        "extra 'train'": {name: installed(name) for name in extras.split(", ")},
    }


def _extension(facts: dict[str, Any]) -> dict[str, str | list[str]]:
    if "problem" in facts:
        return {"unigendet._C": facts["problem"]}
    cuda = [*facts["cuda_archs"], f"by {facts['nvcc']}"] if facts["cuda_archs"] else "not built"
    in_use, *_ = facts["usable_isa_levels"]
    return {
        "unigendet._C": f"built by {facts['compiler']}",
        "instruction set in use": f"{in_use} (of {', '.join(facts['isa_levels'])})",
        "cuda": cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
