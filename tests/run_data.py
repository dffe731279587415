"""The data of a small training run."""

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
