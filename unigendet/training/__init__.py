"""Training: ``config`` (settings), ``stages`` (what is learnt), ``trainer`` (the loop), ``state`` (checkpoints,
averages), ``signals`` (ending a run), ``metrics`` (what a run tells), ``watch`` (looks at the model meanwhile), ``run``
(settings to run).
"""

from typing import Any

__all__ = ["SaveError", "TrainConfig", "TrainResult", "Trainer", "TrainingError", "load_train_config", "train"]

_HOME = {
    "TrainConfig": "config",
    "load_train_config": "config",
    "train": "run",
    "Trainer": "trainer",
    "SaveError": "trainer",
    "TrainingError": "trainer",
    "TrainResult": "trainer",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: the stages work without what the trainer shows progress with."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"unigendet.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'unigendet.training' has no attribute {name!r}")
