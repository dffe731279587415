"""UniGenDet: one multimodal transformer that generates images and detects generated ones."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Layout", "ModelConfig", "UniGenDet", "__version__", "pack"]

_HOME = {"Layout": "layout", "ModelConfig": "config", "UniGenDet": "model.unigendet", "pack": "packing"}


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for, so that ``import unigendet.ops`` loads nothing but the ops."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"unigendet.{_HOME[name]}"), name)
    raise AttributeError(f"module 'unigendet' has no attribute {name!r}")
