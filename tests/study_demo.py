"""A made-up study for the tests of its report and its document."""

import dataclasses

import numpy as np

from unigendet.evaluation.comparisons import METRICS, Comparison, summarise
from unigendet.evaluation.results import plain
from unigendet.evaluation.study_report import STUDY_SCHEMA

ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "platform": "Linux x86_64",
    "cpus": 2,
    "commit": "0123456789abcdef",
}
ARMS = [
    {"name": "one", "title": "arm <one>", "after": None, "overrides": [], "controls": ["two"]},
    {"name": "two", "title": "arm two", "after": None, "overrides": ["gduf.total_steps=3"], "controls": []},
    {"name": "three", "title": "arm three", "after": "one", "overrides": [], "controls": []},
]
PRIMARY = [Comparison("one", "two", "frechet")]


def demo_study(seeds=4):
    """Arm ``one`` has a Fréchet distance that is 10 lower than that of ``two``; of arm ``three`` there is no run."""
    rng = np.random.default_rng(0)
    metrics = {}
    for seed in range(1, seeds + 1):
        for arm, frechet in (("one", 30.0), ("two", 40.0)):
            values = {m.name: float(rng.uniform(0.8, 0.9)) for m in METRICS}
            metrics[seed, arm] = values | {"frechet": frechet + seed + float(rng.normal()), "rouge_l": None}
    cost = {"training": 60.0, "generation": 5.0, "detection": 4.0}
    runs = [
        {
            "seed": seed,
            "arm": arm,
            "metrics": values,
            "draws": {"frechet": [values["frechet"]], "agreement": [values["agreement"]]},
            "reference": {"svm_accuracy": 0.99, "frechet_train": 12.0, "frechet_train_matched": 18.5},
            "seconds": cost,
            "cpu_seconds": {name: 2 * value for name, value in cost.items()},
        }
        for (seed, arm), values in metrics.items()
    ]
    arms = [arm | {"seeds": sorted(s for s, name in metrics if name == arm["name"])} for arm in ARMS]
    summary = summarise([(arm["name"], arm["controls"]) for arm in ARMS], PRIMARY, metrics)
    study = {"schema": STUDY_SCHEMA, "draws": 3, "quickstart": {"gduf": {"total_steps": 930}}, "arms": arms}
    study |= {"metrics": [dataclasses.asdict(m) for m in METRICS], "environments": [ENVIRONMENT], "runs": runs}
    return plain(study | summary)
