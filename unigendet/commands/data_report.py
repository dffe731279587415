"""What ``unigendet data check`` found, for people and for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from unigendet.commands.rows import cell

if TYPE_CHECKING:
    from unigendet.config import LoaderConfig
    from unigendet.data.check import Broken, Expectation, Findings, SourceCheck

SHOWN = 20  # lines of each kind of mistake
NAMED = 3  # samples that are too long
BARS = 12  # lines of a histogram, at most
WIDTH = 40  # letters of its longest bar
LABELS = ("fake", "real")


def report(found: Findings, loader: LoaderConfig) -> Iterator[str]:
    """Everything for people, line by line; the last one says whether anything is wrong."""
    for source in found.sources:
        yield from _source(source, loader.max_sample_tokens)
        yield ""
    if found.held_out is not None:
        yield "held out, and looked at while training:"
        yield from _source(found.held_out, loader.max_sample_tokens)
        yield ""
    if found.prompts:
        yield f"prompts, sampled while training: {found.prompts:,}"
        yield ""
    if found.expected is not None:
        yield from _packs(loader, found.sources, found.expected)
        yield ""
    yield from map(cell, _mistakes(found))
    wrong = verdict(found)
    checked = f"{sum(source.checked for source in found.sources):,} samples"
    if found.held_out is not None:
        checked += f" and {_count(found.held_out.checked, 'held-out image', 'held-out images')}"
    yield "; ".join(wrong) if wrong else f"nothing is broken in {checked}"


def verdict(found: Findings) -> list[str]:
    """What is wrong, in numbers; nothing, if a run can read everything and no label is contradicted."""
    parts = []
    broken, checked = (sum(n) for n in zip(*((len(s.broken), s.checked) for s in found.sources), strict=True))
    if broken:
        parts.append(f"{broken:,} of {checked:,} samples are broken")
    if found.held_out is not None and found.held_out.broken:
        parts.append(f"{len(found.held_out.broken):,} of {found.held_out.checked:,} held-out images are broken")
    if entries := len({(one.file, one.entry) for one in found.malformed}):
        parts.append(_count(entries, "entry is malformed", "entries are malformed"))
    if contradictions := sum(len(source.contradictions) for source in found.all_sources):
        parts.append(_count(contradictions, "label contradicts its answer", "labels contradict their answers"))
    if found.both_labels:
        parts.append(_count(len(found.both_labels), "image has both labels", "images have both labels"))
    if found.unread:
        parts.append(_count(len(found.unread), "file or folder is of no use", "files or folders are of no use"))
    return parts


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _source(source: SourceCheck, limit: int) -> Iterator[str]:
    yield cell(source.name)
    if source.error is not None:
        yield "  cannot be read, see below"
        return
    labels = "" if source.labels is None else f": {source.labels[0]:,} real, {source.labels[1]:,} fake"
    looked = "" if source.checked == source.records else f", {source.checked:,} of them looked at"
    yield f"  records  {source.records:,}{labels}{looked}"
    yield f"  broken   {len(source.broken):,}"
    if source.contradictions:
        yield f"  labels   {_count(len(source.contradictions), 'contradicts its answer', 'contradict their answers')}"
    yield from (cell(f"  note     {note}") for note in _notes(source))
    if not source.lengths:
        return
    quantiles = source.quantiles()
    names = {"min": "least", "median": "median", "p95": "95 % up to", "max": "most"}
    yield "  tokens   " + ", ".join(f"{names[key]} {value:,}" for key, value in quantiles.items())
    named = ", ".join(f"{cell(name)} ({tokens:,})" for name, tokens in source.too_long[:NAMED])
    more = ", …" if len(source.too_long) > NAMED else ""
    yield f"  above loader.max_sample_tokens = {limit:,}: {len(source.too_long):,}" + (f": {named}{more}" * bool(named))
    yield from (f"    {line}" for line in histogram(source.lengths))


def _notes(source: SourceCheck) -> Iterator[str]:
    """What is no mistake, and may be one."""
    if source.undecided:
        first = source.undecided[0]
        count = _count(len(source.undecided), "answer has", "answers have")
        yield f"{count} no verdict (This is a real image, or a fake one), such as {first.text!r} ({first.where})"
    if source.repeated:
        image, times = next(iter(source.repeated.items()))
        count = _count(len(source.repeated), "image occurs", "images occur")
        yield f"{count} more than once, such as {image} ({times} times)"
    if source.held_out_too:
        count = _count(len(source.held_out_too), "image is", "images are")
        yield f"{count} among the held-out ones too, such as {source.held_out_too[0]}: scores on them say little"


def _mistakes(found: Findings) -> Iterator[str]:
    """Everything that is wrong, a line each, and no more of a kind than can be read."""
    whole = [source for source in found.all_sources if source.lost]
    yield from map(_lost, whole)
    broken = [one for source in found.all_sources if not source.lost for one in source.broken]
    yield from _some([_broken(one) for one in broken])
    if any(one.missing for one in broken):
        yield "image_root says where the images of a data set are"
    yield from _some([one.reason for one in found.malformed])
    contradictions = [one for source in found.all_sources for one in source.contradictions]
    yield from _some([
        f"{one.where}: label is {one.label} ({LABELS[one.label]}), but the answer says {LABELS[1 - one.label]}: "
        f"{one.text!r}" for one in contradictions
    ])  # fmt: skip
    yield from _some([f"{one.image} is real ({one.real}) and fake ({one.fake})" for one in found.both_labels])
    yield from found.unread


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:SHOWN]
    if len(lines) > SHOWN:
        yield f"and {len(lines) - SHOWN:,} more (--json FILE lists all)"


def _broken(one: Broken) -> str:
    return f"{one.reason} ({one.where})" if one.image in one.reason else f"{one.image}: {one.reason} ({one.where})"


def _lost(source: SourceCheck) -> str:
    """One line for all images of a source, none of which is there."""
    looked = "" if source.checked == source.records else " that were looked at"
    remedy = "" if source.root is None else f"; {source.root} says what its paths are relative to"
    first = source.broken[0].image
    return f"{source.name}: all {source.checked:,} images{looked} are missing, the first is {first}{remedy}"


def histogram(values: Sequence[int]) -> list[str]:
    """Bars of how many values lie in which range, at most ``BARS`` of them, with round limits."""
    least, most = min(values), max(values)
    rough = max(1, (most - least + 1) / (BARS - 1))
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    counts: dict[int, int] = dict.fromkeys(range(least // step * step, most + 1, step), 0)
    for value in values:
        counts[value // step * step] += 1
    width = len(f"{most + step:,}")
    tallest = max(counts.values())
    lines = []
    for begin, count in counts.items():
        bar = "#" * math.ceil(WIDTH * count / tallest)
        lines.append(f"{begin:>{width},} to {begin + step - 1:>{width},}  {count / len(values):6.1%}  {bar}".rstrip())
    return lines


def _packs(loader: LoaderConfig, sources: Sequence[SourceCheck], expected: Expectation) -> Iterator[str]:
    fill = expected.fill
    yield (
        f"packs of {fill.max_tokens:,} tokens with loader.lookahead = {loader.lookahead} (from {fill.packs:,} "
        "that were packed for this, before texts and images are dropped)"
    )
    emptiest = fill.least / fill.max_tokens
    yield f"  {fill.per_pack:.2f} samples a pack, {fill.share:.1%} full, the emptiest {emptiest:.1%}"
    total = sum(fill.samples)
    for source, drawn, packs in zip(sources, fill.samples, expected.epochs, strict=True):
        yield f"  {drawn / total:6.1%} of the samples, {packs:,.0f} packs an epoch: {cell(source.name)}"
    if (real := _share_of_real(sources, expected)) is not None:
        yield f"  real images among the labelled ones: {real:.1%}"


def _share_of_real(sources: Sequence[SourceCheck], expected: Expectation) -> float | None:
    """Of the labelled samples that are drawn; None without any."""
    labelled = [(s.labels[0] / s.records, n) for s, n in zip(sources, expected.fill.samples, strict=True) if s.labels]
    total = sum(drawn for _, drawn in labelled)
    return sum(real * drawn for real, drawn in labelled) / total if total else None


def as_json(found: Findings, loader: LoaderConfig) -> dict[str, Any]:
    """Everything for programs."""
    everything: dict[str, Any] = {
        "sources": [source.to_json() for source in found.sources],
        "held_out": None if found.held_out is None else found.held_out.to_json(),
        "prompts": found.prompts,
        "malformed": [dataclasses.asdict(one) for one in found.malformed],
        "both_labels": [dataclasses.asdict(one) for one in found.both_labels],
        "unread": found.unread,
        "packs": None,
    }
    if found.expected is not None:
        fill = found.expected.fill
        everything["packs"] = {
            "max_tokens": fill.max_tokens,
            "lookahead": loader.lookahead,
            "packed": fill.packs,
            "samples_per_pack": fill.per_pack,
            "fill": fill.share,
            "least_fill": fill.least / fill.max_tokens,
            "samples": list(fill.samples),
            "packs_per_epoch": list(found.expected.epochs),
            "real": _share_of_real(found.sources, found.expected),
        }
    return everything
