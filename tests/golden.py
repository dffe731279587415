"""Reading the golden files: numbers that the published implementation produced (see tests/data/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from unigendet.config import LatentConfig, ModelConfig, SpecialTokens, VisionConfig
from unigendet.model.checkpoint import load_pretrained
from unigendet.model.unigendet import UniGenDet
from unigendet.packing import LatentImage, Sample, Text, VitImage


@dataclass(frozen=True)
class Golden:
    path: Path
    metadata: dict
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Golden:
        with safe_open(path, "pt") as file:
            metadata = {k: json.loads(v) if v[:1] in "[{0123456789" else v for k, v in file.metadata().items()}
            return cls(path, metadata, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def named(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    @property
    def config(self) -> ModelConfig:
        sizes = self.metadata["config"]
        vit, latent = sizes["vit"], sizes["latent"]
        names = set(self.named("model."))
        return ModelConfig(
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            num_kv_heads=sizes["num_key_value_heads"],
            vocab_size=sizes["vocab_size"],
            rope_theta=sizes["rope_theta"],
            rms_norm_eps=sizes["rms_norm_eps"],
            class_head=any(n.startswith("fake_cls_head.") for n in names),
            align_head=any(n.startswith("diga_mlp.") for n in names),
            vision=VisionConfig(
                hidden_size=vit["hidden_size"],
                intermediate_size=vit["intermediate_size"],
                num_layers=vit["num_hidden_layers"],
                num_heads=vit["num_attention_heads"],
                patch_size=vit["patch_size"],
                max_patches_per_side=vit["max_patches_per_side"],
                layer_norm_eps=vit["layer_norm_eps"],
                num_positions=vit.get("num_positions"),
            ),
            latent=LatentConfig(**latent),
            special_tokens=SpecialTokens(**sizes["special_tokens"]),
        )

    def model(self, folder: Path, backend: str) -> UniGenDet:
        """The file's model, its weights read through the checkpoint code."""
        from safetensors.torch import save_file

        save_file(self.named("model."), folder / "weights.safetensors")
        model = load_pretrained(folder / "weights.safetensors", config=self.config)
        model.backend = backend
        return model

    def segment(self, entry: dict) -> Text | VitImage | LatentImage:
        if entry["type"] == "text":
            return Text(entry["ids"], loss=bool(entry["loss"]))
        if entry["type"] == "vit":
            return VitImage(self[entry["tensor"]])
        return LatentImage(self[entry["latent"]], noised=bool(entry["loss"]))

    def sample(self, entry: dict) -> Sample:
        return Sample(tuple(self.segment(s) for s in entry["segments"]), entry.get("label"))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.double).tiny))
