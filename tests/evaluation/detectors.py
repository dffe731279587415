"""Detectors without a model, and labelled images for them."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from unigendet.data.datasets import DetectionRecord
from unigendet.data.transforms import read_image
from unigendet.inference.detect import Detection


@dataclass
class BrightnessDetector:
    """Calls bright images real: its probability of real is the mean grey level, over 255.

    ``calls``: the options of every call of ``detect``; ``stop_after``: images after which it is interrupted; ``room``:
    characters of the longest question and its answer's tokens together.
    """

    has_head: bool = True
    stop_after: int | None = None
    room: int = 50
    calls: list = field(default_factory=list)

    def default_answer(self, questions, *, with_latent=True):
        return self.room - max(len(question or "") for question in questions)

    def detect(self, images, *, question, transform, with_latent, max_new_tokens, batch_size, calibration, on_error):
        images = list(images)
        questions = [question] * len(images) if question is None or isinstance(question, str) else list(question)
        assert len(questions) == len(images)
        assert on_error == "row"
        options = {"with_latent": with_latent, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
        self.calls.append({"question": question, "transform": transform, "images": len(images), **options})
        for i, path in enumerate(images):
            if self.stop_after is not None and i == self.stop_after:
                raise KeyboardInterrupt
            try:
                image = read_image(path)
            except (ValueError, OSError) as error:
                yield Detection(str(path), None, None, "", str(error))
                continue
            if transform is not None:
                image = transform(image)
            p = float(np.asarray(image.convert("L")).mean()) / 255
            text = f"This is a {'real' if p >= 0.5 else 'fake'} image. It is bright."[
                : None if max_new_tokens is None else 8 * max_new_tokens
            ]
            says_so = self.has_head or len(text) > 20
            yield Detection(str(path), (p >= 0.5) if says_so else None, p if self.has_head else None, text)


LEVELS = {"real": (200, 230, 100, 250), "gan": (20, 60, 150), "sd": (90, 10)}  # of the images; wrong: 100 and 150


def write_images(folder):
    """Grey images of 8×8 pixels with the levels above and their records, real ones first."""
    records = []
    for group, levels in LEVELS.items():
        (folder / group).mkdir(parents=True)
        for i, level in enumerate(levels):
            path = folder / group / f"{i}.png"
            Image.new("L", (8, 8), level).save(path)
            label = int(group == "real")
            answer = f"This is a {'real' if label else 'fake'} image. It is {'bright' if label else 'dark'}."
            records.append(DetectionRecord(path, label, group, f"Is {group} {i} real?", answer))
    return records
