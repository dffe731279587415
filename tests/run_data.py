"""The data and settings of a small training run."""

import json

import numpy as np
from PIL import Image

from unigendet.data.tokenizer import train_tokenizer

ANSWERS = ("This is a fake image.", "This is a real image.")


def write_run_data(folder):
    """Six images of 8×8 pixels, annotated for both tasks, and a tokenizer."""
    rng = np.random.default_rng(0)
    detection, captions = [], []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>Real?"}, {"from": "gpt", "value": ANSWERS[i % 2]}]
        detection.append({"image": f"{i}.png", "label": i % 2, "cate": "noise", "conversations": turns})
        captions.append({"image_path": f"{i}.png", "prompt": f"picture {i}"})
    (folder / "detection.json").write_text(json.dumps(detection))
    (folder / "captions.json").write_text(json.dumps(captions))
    train_tokenizer([*ANSWERS, "Real?", "picture"], 270).save(folder / "tokenizer")


def write_run_settings(file, data, output, **settings):
    """Settings of a short run on the data in the folder ``data``, with ``settings`` of its own; returns ``file``."""
    view = {"min_size": 8, "max_size": 8, "stride": 2}
    values = {
        "total_steps": 2,
        "align_layer": 2,
        "teacher_layer": 3,
        "output": output and str(output),
        "device": "cpu",
        "model": {"preset": "quickstart", "tokenizer": str(data / "tokenizer")},
        "datasets": {
            "detection": [{"file": str(data / "detection.json")}],
            "captions": [{"file": str(data / "captions.json"), "weight": 2}],
            "views": {"latent_view": view, "vit_view": view},
        },
        "loader": {"max_tokens": 200, "max_sample_tokens": 150},
    }
    file.write_text(json.dumps(values | settings))  # JSON is YAML
    return file
