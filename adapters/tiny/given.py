"""Inputs of transformers' encoders: keyword arguments of a forward, for a batch of ``b``."""

from __future__ import annotations

import torch
from torch import Tensor

SIZE, PATCH = 40, 8  # 25 patches


def noise(*shape: int) -> Tensor:
    """Normal random numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def images(b: int) -> dict[str, Tensor]:
    """Random images ``(b, 3, SIZE, SIZE)``."""
    return {"pixel_values": noise(b, 3, SIZE, SIZE)}


def videos(b: int) -> dict[str, Tensor]:
    """Random clips ``(b, 4, 3, 32, 32)``, of four frames."""
    return {"pixel_values": noise(b, 4, 3, 32, 32)}


def both(b: int) -> dict[str, Tensor]:
    """Random images and a text for each."""
    return {**images(b), "input_ids": torch.arange(3, 11).repeat(b, 1)}


def both2(b: int) -> dict[str, Tensor]:
    """Random images and a text for each, as SigLIP 2 takes them; without padding."""
    return {**packed(b), "input_ids": torch.arange(3, 11).repeat(b, 1)}


def packed(b: int) -> dict[str, Tensor]:
    """Patches of images of one size, for NaFlex models."""
    return {
        "pixel_values": noise(b, 25, 3 * PATCH * PATCH),
        "pixel_attention_mask": torch.ones(b, 25, dtype=torch.long),
        "spatial_shapes": torch.tensor([[5, 5]] * b),
    }


def masked(b: int) -> dict[str, Tensor]:
    """Images of which some patches are masked."""
    return {**images(b), "bool_masked_pos": (torch.arange(25) % 3 == 0).repeat(b, 1)}


def masked_video(b: int) -> dict[str, Tensor]:
    """Clips of which half is masked."""
    return {**videos(b), "bool_masked_pos": (torch.arange(32) % 2 == 0).repeat(b, 1)}


def noisy(b: int) -> dict[str, Tensor]:
    """Images with the noise that chooses what a masked autoencoder sees; the same for every image."""
    return {**images(b), "noise": torch.rand(25, generator=torch.Generator().manual_seed(2)).repeat(b, 1)}


def sounds(b: int) -> dict[str, Tensor]:
    """Spectrograms for Whisper."""
    return {"input_features": noise(b, 8, 60)}


def speech(b: int) -> dict[str, Tensor]:
    """Spectrograms and the first tokens of a transcript."""
    return {**sounds(b), "decoder_input_ids": torch.arange(3, 8).repeat(b, 1)}


def spectra(b: int) -> dict[str, Tensor]:
    """Spectrograms for the audio spectrogram transformer: 24 patches."""
    return {"input_values": noise(b, 32, 24)}


def texts(b: int) -> dict[str, Tensor]:
    """Token ids without padding."""
    return {"input_ids": torch.randint(3, 60, (b, 26), generator=torch.Generator().manual_seed(1))}
