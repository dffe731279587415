"""Small autoencoders under the names that FLUX's weights are published with."""

import json

from unigendet.model import autoencoder


def small_flux(widths, latent_channels, groups=4):
    """Settings of diffusers' ``AutoencoderKL`` like FLUX's, but with these widths, one per level."""
    return json.loads(autoencoder._FLUX_CONFIG.read_text()) | {
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "latent_channels": latent_channels,
        "norm_num_groups": groups,
        "layers_per_block": 1,
    }


def flux_name(name, levels):
    """FLUX's name of diffusers' ``name``, written down independently of the code under test.

    ``levels``: of the autoencoder. The decoder's are counted from the other end.
    """
    parts = name.split(".")
    if "attentions" in parts:
        inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[parts[4]]
        return f"{parts[0]}.mid.attn_1.{inner}.{parts[-1]}"
    if parts[1] == "mid_block":
        return f"{parts[0]}.mid.block_{int(parts[3]) + 1}.{'.'.join(parts[4:])}"
    if parts[1] in ("down_blocks", "up_blocks"):
        way = parts[1].removesuffix("_blocks")
        level = int(parts[2]) if way == "down" else levels - 1 - int(parts[2])
        if parts[3] == "resnets":
            rest = "block." + ".".join(parts[4:]).replace("conv_shortcut", "nin_shortcut")
        else:
            rest = f"{way}sample.conv.{parts[-1]}"
        return f"{parts[0]}.{way}.{level}.{rest}"
    return name.replace("conv_norm_out", "norm_out")


def flux_state_dict(vae):
    """The weights of diffusers' autoencoder as FLUX stores them: other names, projections as 1×1 convolutions."""
    state, levels = {}, len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        is_projection = ".attentions." in name and tensor.ndim == 2
        state[flux_name(name, levels)] = tensor[:, :, None, None].clone() if is_projection else tensor.clone()
    return state
