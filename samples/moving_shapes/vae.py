"""The moving-shapes VAE: an AutoencoderKLWan whose encoder is set by hand.

A latent is the mean colour of a 4x4 pixel patch in three opponent axes, scaled so that the palette
has mean 0 and variance 1. The diffusion model then sees small flat pictures, and learns them far
faster than trained latents. The decoder starts as the exact box upsampling; `train_decoder` trains
the decoder to restore sharp edges.

The VAE works frame by frame: every convolution tap that looks at earlier frames is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import COLOURS, all_scenes
from .clips import FRAMES, draw_geometry, palette_tensor, render

# Pixels along each side of the patch behind one latent.
PATCH = 4
LATENT_CHANNELS = 3

_BASE_DIM = 32

# RMS norm keeps linear maps linear when one channel is a large constant: x / |x| is then x / C.
# The encoder is never trained, so its constant is large; the decoder only needs a good start.
_ENCODER_CONSTANT = 512.0
_DECODER_CONSTANT = 64.0
_LOG_VARIANCE = -20.0

# Orthonormal rows: light to dark, red to green, yellow to blue.
_OPPONENT_AXES = torch.tensor(
    [
        [1 / 3**0.5, 1 / 3**0.5, 1 / 3**0.5],
        [1 / 2**0.5, -1 / 2**0.5, 0.0],
        [1 / 6**0.5, 1 / 6**0.5, -2 / 6**0.5],
    ]
)


def latent_statistics() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of the opponent values over the palette."""
    colours = palette_tensor(list(COLOURS)).view(-1, 3) @ _OPPONENT_AXES.T
    return colours.mean(dim=0), colours.std(dim=0)


def clip_latents(clip: Tensor) -> Tensor:
    """Normalised latents of a clip, as the pipeline's diffusion model sees them.

    Args:
        clip: (batch, 3, frames, height, width) in [-1, 1].

    Returns:
        (batch, 3, frames, height / 4, width / 4): the hand-set encoder's result, at less cost.
    """
    mean, std = (value.to(clip.device).view(1, -1, 1, 1, 1) for value in latent_statistics())
    pooled = F.avg_pool3d(clip, (1, PATCH, PATCH))
    opponent = torch.einsum("oc,bcfhw->bofhw", _OPPONENT_AXES.to(clip.device), pooled)
    return (opponent - mean) / std


def make_vae() -> AutoencoderKLWan:
    """Build the VAE with the hand-set encoder and the box-upsampling decoder."""
    mean, std = latent_statistics()
    vae = AutoencoderKLWan(
        base_dim=_BASE_DIM,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        patch_size=PATCH,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
        latents_mean=mean.tolist(),
        latents_std=std.tolist(),
    )
    with torch.no_grad():
        _set_encoder(vae)
        _set_decoder(vae)
    return vae


def train_decoder(
    vae: AutoencoderKLWan,
    steps: int,
    batch: int,
    seed: int,
    device: str = "cpu",
    report: Callable[[str], None] = print,
) -> float:
    """Train the decoder on rendered frames, half of them with noisy latents.

    The diffusion model's latents are never exact, so half of the latents get a little noise: the
    decoder learns to clean flat areas.

    Returns:
        The PSNR in dB over the last hundred steps.
    """
    scenes = all_scenes()
    generator = torch.Generator(device).manual_seed(seed)
    decoder = vae.decoder.to(device).train()
    parameters = list(decoder.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 2e-3, total_steps=steps, pct_start=0.1
    )
    recent: list[float] = []
    for step in range(steps):
        picks = torch.randint(len(scenes), (batch,), generator=generator, device=device).tolist()
        frames = torch.randint(FRAMES, (batch, 1), generator=generator, device=device)
        geometry = draw_geometry(batch, generator)
        clip = render([scenes[pick] for pick in picks], geometry, frames)
        noisy = _disturb(clip_latents(clip), generator)
        error = F.mse_loss(_decode_frames(vae, noisy), clip)
        optimiser.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        _forget_past_taps(decoder)
        optimiser.step()
        schedule.step()
        recent = [*recent[-99:], error.item()]
        if (step + 1) % 100 == 0:
            report(f"vae step {step + 1} psnr {_psnr(recent):.2f} dB")
    vae.eval()
    return _psnr(recent)


def _psnr(errors: list[float]) -> float:
    # The range of the data is 2, hence the factor 4.
    return float(10 * torch.log10(4 / torch.tensor(errors).mean()))


def _disturb(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise of a random small strength to every other clip."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    strength = torch.rand(latents.shape[0], generator=generator, device=latents.device) * 0.15
    strength[::2] = 0
    return latents + strength.view(-1, 1, 1, 1, 1) * noise


def _decode_frames(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode normalised one-frame clips with gradients, unclamped."""
    mean, std = (value.to(latents.device).view(1, -1, 1, 1, 1) for value in latent_statistics())
    patches = vae.decoder(latents * std + mean)
    batch, _, frames, height, width = patches.shape
    patches = patches.view(batch, 3, PATCH, PATCH, frames, height, width)
    # Wan packs a patch as (colour, column, row).
    pixels = patches.permute(0, 1, 4, 5, 3, 6, 2)
    return pixels.reshape(batch, 3, frames, height * PATCH, width * PATCH)


def _forget_past_taps(module: nn.Module) -> None:
    """Keep gradients of taps on earlier frames at zero, so that they stay zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d) and layer.weight.grad is not None:
            layer.weight.grad[:, :, :-1] = 0


def _clear(layer: nn.Conv2d | nn.Conv3d) -> None:
    layer.weight.zero_()
    if layer.bias is not None:
        layer.bias.zero_()


def _set_encoder(vae: AutoencoderKLWan) -> None:
    """Make the encoder compute the opponent colours of patch means, with negligible variance."""
    encoder, channels = vae.encoder, LATENT_CHANNELS
    # Channels 0..2 carry +x, 3..5 carry -x, 6 the constant: silu(x) - silu(-x) = x.
    _clear(encoder.conv_in)
    mean_of_patch = _OPPONENT_AXES.repeat_interleave(PATCH**2, dim=1) / PATCH**2
    encoder.conv_in.weight[:channels, :, -1, 1, 1] = mean_of_patch
    encoder.conv_in.weight[channels : 2 * channels, :, -1, 1, 1] = -mean_of_patch
    encoder.conv_in.bias[2 * channels] = _ENCODER_CONSTANT
    _make_residuals_zero(encoder)
    encoder.norm_out.gamma.fill_(_ENCODER_CONSTANT / _BASE_DIM**0.5)
    encoder.norm_out.gamma[2 * channels] = 0
    _clear(encoder.conv_out)
    for channel in range(channels):
        encoder.conv_out.weight[channel, channel, -1, 1, 1] = 1
        encoder.conv_out.weight[channel, channels + channel, -1, 1, 1] = -1
    encoder.conv_out.bias[channels:] = _LOG_VARIANCE
    for layer in (vae.quant_conv, vae.post_quant_conv):
        _clear(layer)
        layer.weight[:, :, 0, 0, 0] = torch.eye(layer.weight.shape[0])


def _set_decoder(vae: AutoencoderKLWan) -> None:
    """Make the decoder repeat each latent's colour over its patch; spare channels stay random."""
    decoder, channels = vae.decoder, LATENT_CHANNELS
    constant = 2 * channels
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight[:, :, :-1] = 0
    first = decoder.conv_in
    first.weight[: constant + 1] = 0
    first.bias[: constant + 1] = 0
    for channel in range(channels):
        first.weight[channel, channel, -1, 1, 1] = 1
        first.weight[channels + channel, channel, -1, 1, 1] = -1
    first.bias[constant] = _DECODER_CONSTANT
    _make_residuals_zero(decoder)
    for block in decoder.modules():
        gamma = getattr(block, "gamma", None)
        if gamma is not None:
            gamma.fill_(_DECODER_CONSTANT / _BASE_DIM**0.5)
    for resnet in _resnets(decoder):
        # Inside a block the constant has the value 1: a bias, not an overwhelming input.
        resnet.norm1.gamma[constant] = 1 / _BASE_DIM**0.5
        resnet.norm2.gamma.fill_(1)
    decoder.norm_out.gamma[constant] = 0
    _clear(decoder.conv_out)
    to_rgb = _OPPONENT_AXES.T.repeat_interleave(PATCH**2, dim=0)
    decoder.conv_out.weight[:, :channels, -1, 1, 1] = to_rgb
    decoder.conv_out.weight[:, channels:constant, -1, 1, 1] = -to_rgb


def _resnets(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if hasattr(layer, "conv2")]


def _make_residuals_zero(module: nn.Module) -> None:
    """Turn residual and attention blocks into the identity."""
    for resnet in _resnets(module):
        _clear(resnet.conv2)
    attentions: list[Any] = [layer for layer in module.modules() if hasattr(layer, "to_qkv")]
    for attention in attentions:
        _clear(attention.proj)
