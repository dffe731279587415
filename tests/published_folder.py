"""Small folders that look, file by file and name by name, like those that BAGEL and UniGenDet are published in."""

import json

import torch
from flux_names import flux_state_dict, small_flux
from safetensors.torch import save_file

from unigendet.config import LatentConfig, ModelConfig, VisionConfig
from unigendet.model.checkpoint import published_state_dict
from unigendet.model.unigendet import UniGenDet

# What transformers writes beside the sizes, as far as anybody could stumble over it.
LLM = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "layer_module": "Qwen2MoTDecoderLayer",
    "max_position_embeddings": 4096,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "qk_norm": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.49.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
VIT = {
    "hidden_size": 16,
    "image_size": 980,
    "intermediate_size": 24,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "patch_size": 14,
}
ADDED = {
    151643: "<|endoftext|>",
    151644: "<|im_start|>",
    151645: "<|im_end|>",
    151646: "<|object_ref_start|>",
    151647: "<|object_ref_end|>",
    151648: "<|box_start|>",
    151649: "<|box_end|>",
    151650: "<|quad_start|>",
    151651: "<|quad_end|>",
    151652: "<|vision_start|>",
    151653: "<|vision_end|>",
}
PATCHES = "vit_model.vision_model.embeddings.patch_embedding.weight"
AUTOENCODER = small_flux([4, 4, 4, 4], latent_channels=16, groups=2)


def config(**changes):
    """The settings that LLM and VIT stand for, written down independently of the code under test."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    vision = VisionConfig(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
    return ModelConfig(**(sizes | {"max_position": 4096, "vision": vision, "latent": LatentConfig()} | changes))


def model_weights(seed=0, *, heads=False, kernel=False, dtype=torch.bfloat16):
    """Random weights under their published names.

    ``heads``: as UniGenDet's, with real/fake head, φ and the unused connector; else as BAGEL's. ``kernel``: the patch
    embedding as a convolution.
    """
    torch.manual_seed(seed)
    model = UniGenDet(config(class_head=heads, align_head=heads))
    torch.nn.init.normal_(model.llm2vae.weight, std=0.2)
    weights = {name: value.detach().to(dtype, copy=True) for name, value in published_state_dict(model).items()}
    if heads:
        shapes = {"0.weight": (16, 64), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
        weights |= {f"latent_to_vit_connector.{n}": torch.randn(s).to(dtype) for n, s in shapes.items()}
    if kernel:
        linear = weights[PATCHES]
        weights[PATCHES] = linear.view(16, 14, 14, 3).permute(0, 3, 1, 2).contiguous()
    return weights


def write_weights(folder, weights, shards=1):
    """``ema.safetensors``, or shards with an index."""
    if shards == 1:
        save_file(weights, folder / "ema.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = sorted(weights), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_settings(folder):
    """``llm_config.json`` and ``vit_config.json``, and the release's files for other programs."""
    (folder / "llm_config.json").write_text(json.dumps(LLM, indent=2))
    (folder / "vit_config.json").write_text(json.dumps(VIT, indent=2))
    others = {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel", "llm_config": LLM}
    (folder / "config.json").write_text(json.dumps(others))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 151645}))
    (folder / "preprocessor_config.json").write_text("{}")


def write_tokenizer(folder):
    """Qwen2's files with its ids: bytes, a few merges, and words that no text becomes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    words = ["th", "the", "Ġthe", "is"]
    fillers = [f"unused word {i}" for i in range(151643 - 256 - len(words))]
    vocabulary = {word: i for i, word in enumerate([*letters, *words, *fillers])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\ni s\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(i): {"content": text} | flags for i, text in ADDED.items()}
    settings = {"added_tokens_decoder": decoder, "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_autoencoder(folder):
    """``ae.safetensors`` under FLUX's names, of the sizes AUTOENCODER."""
    from diffusers import AutoencoderKL

    torch.manual_seed(5)
    save_file(flux_state_dict(AutoencoderKL.from_config(AUTOENCODER)), folder / "ae.safetensors")
