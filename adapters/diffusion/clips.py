"""Denoisers of clips: how many frames a forward is given."""

from __future__ import annotations

from typing import Any

from tokred.adapters.diffusion.session import EnterDenoiser, Session


class EnterClip(EnterDenoiser):
    """Before the forward of a denoiser of clips.

    Args:
        session, names, sample: as for images.
        frames: dimension of the sample that counts frames.
        patch: frames that a token stands for.
    """

    def __init__(self, session: Session, names: tuple[str, ...], sample: str, frames: int, patch: int) -> None:
        super().__init__(session, names, sample)
        self.frames, self.patch = frames, patch

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        sample, side = given[self.sample], self.session.patch
        size = (sample.shape[-2] // side, sample.shape[-1] // side)
        self.session.begin(size, given.get("timestep"), sample.shape[self.frames] // self.patch, sample)
