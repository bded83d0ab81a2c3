"""Clips with sound before the language model: tokens of what is seen and of what is heard, window by window.

A site of this kind holds one clip of one sample, or several that are laid out alike: its ``N`` tokens stand in the
order of the prompt, those of the frames of a window and those of its sound among them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tokred.core.reduction import Reduction
from tokred.core.site import Lazy, Site
from tokred.errors import MissingInputError
from tokred.vlm.before_llm import ProjectorMethod, VisualSite


class SoundSite(VisualSite):
    """Tokens of clips with sound on their way into the language model.

    Args:
        sound: ``(N,)`` bool, the tokens of what is heard; the others are of frames.
        window: ``(N,)`` int64, which stretch of time each is of, from 0 on, not decreasing.
        moment: ``(N, 2)`` int64, frame and place in the frame of each token that is seen; not looked at on others.
        heard: ``(B, N)`` float, what each token of sound receives of the attention in the last layer of the sound's
            encoder, mean over heads and over the queries of its block; not looked at on others.
        more: see :class:`VisualSite`.
    """

    def __init__(self, *, sound: Tensor, window: Tensor, moment: Tensor, heard: Lazy = None, **more: Any) -> None:
        super().__init__(**more)
        self.sound = sound
        self.window = window
        self.moment = moment
        self._values["heard"] = heard

    @property
    def heard(self) -> Tensor:
        """``(B, N)`` float32: what each token of sound receives of the attention of the sound's encoder."""
        return self._get("heard").float()


class SoundMethod(ProjectorMethod):
    """Base of methods before the language model that act on clips with sound; images beside them stay whole.

    Attributes:
        hears: True of all of them.
    """

    hears: ClassVar[bool] = True

    @property
    def reads(self) -> frozenset[str]:
        """The tokens, that they are frames, and the sound between them."""
        return frozenset({"x", "frames", "sound"})

    def reduce(self, site: Site) -> Reduction:
        """Keep, or merge into, some of each clip's tokens; images stay whole.

        Raises:
            MissingInputError: a clip without its sound.
        """
        if isinstance(site, SoundSite):
            return super().reduce(site)
        if site.frames is not None:
            raise MissingInputError(f"{self.name!r} acts on a SoundSite, got a clip without its sound")
        return Reduction.identity((site.shape[0],), site.shape[1], site.device)


def windows_of(sound: Tensor) -> Tensor:
    """``(N,)`` int64: a window begins where something is seen after something was heard.

    Args:
        sound: ``(N,)`` bool.
    """
    begins = torch.zeros_like(sound, dtype=torch.long)
    begins[1:] = (sound[:-1] & ~sound[1:]).long()
    return begins.cumsum(0)
