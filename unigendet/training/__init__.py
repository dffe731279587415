"""Training: stages (what is learnt), trainer (the loop), state (checkpoints, averages), run (settings to run)."""

from unigendet.training.config import TrainConfig, load_train_config
from unigendet.training.run import train
from unigendet.training.trainer import Trainer, TrainingError, TrainResult

__all__ = ["TrainConfig", "TrainResult", "Trainer", "TrainingError", "load_train_config", "train"]
