"""transformers: models with vision of every kind, those among them whose prompt an encoder reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import members, words
from tokred.adapters.swap import argument_names, host_class
from tokred.adapters.vlm import host
from tokred.adapters.vlm.families import FACTS, core_of, part
from tokred.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokred.adapters.vlm.hooks import VisualSettings


class MemoryHost(host.VisualHost):
    """A model with vision whose visual tokens leave before the encoder that reads its prompt."""

    @property
    def how(self) -> str:
        """For the table of support."""
        return f"{self.family}, before the encoder that reads its prompt"

    def _hang(self, settings: VisualSettings, changes: Changes) -> None:
        from tokred.adapters.vlm.memory import hooks

        encoder, decoder = self.language, part(self.core, self.facts.reader)
        positions = members.LEARNED_PLACES.need(encoder)
        # Hooks run in the order in which they are hung: this one before the forward is forgotten that the others of
        # the encoder note, the next behind that in which tokens leave.
        changes.after(encoder, hooks.LeaveEncoder(), with_kwargs=True)
        super()._hang(settings, changes)
        changes.before(encoder, hooks.TakePositions(), with_kwargs=True)
        changes.before(positions, hooks.AllPositions(settings))
        changes.after(positions, hooks.OwnPositions(settings))
        changes.before(decoder, hooks.EnterReader(argument_names(decoder)), with_kwargs=True)

    def _hang_head(self, settings: VisualSettings, changes: Changes) -> None:
        """Nothing: caches hold the decoder's own tokens, and rows of whatever the encoder made; labels are the
        decoder's too."""


def match_projector(model: nn.Module) -> host.VisualHost | None:
    """The host record of a model with vision for the stage ``projector``; None when ``model`` is none.

    Raises:
        UnsupportedModelError: it is one, but cannot be patched rightly; the message says why.
    """
    core = _read(model)
    if core is None:
        return host.match_projector(model)
    host.check_whole(model, core, "projector")
    facts = FACTS[host_class(core).__name__]
    encoder = part(core, facts.language)
    if not members.LEARNED_PLACES.on(encoder):
        raise UnsupportedModelError(
            f"{_family(model)} reads its prompt in a {type(encoder).__name__}, which does not embed positions as "
            "BART's encoder does, so that tokens that are left would not keep theirs"
        )
    inside = {id(m) for m in encoder.modules()}
    layers = [(n, m) for n, m in model.named_modules() if id(m) in inside and words.ATTENTION.on(m)]
    supplies = host.supplies_projector(core, facts)
    return MemoryHost(_family(model), model, core, encoder, layers, facts, supplies, "projector")


def match_layer(model: nn.Module) -> host.VisualHost | None:
    """The host record for the stage ``layer``; language models alone as well.

    Raises:
        UnsupportedModelError: as above; of those whose prompt an encoder reads, every one.
    """
    if _read(model) is None:
        try:
            return host.match_layer(model)
        except UnsupportedModelError as error:
            if not _before(model):
                raise
            text = f"{error}; methods that act before the language model run: tokred.supports(model) names them"
            raise UnsupportedModelError(text) from None
    raise UnsupportedModelError(
        f"{_family(model)} reads its prompt in an encoder, whose layers let all tokens see one another, and its "
        "decoder holds none of them: methods of the stage 'layer' act between the layers of a decoder that holds the "
        "prompt; take one that acts before the encoder, such as 'divprune'"
    )


def _before(model: nn.Module) -> bool:
    """True if visual tokens can leave before the language model, where they cannot inside."""
    try:
        return match_projector(model) is not None
    except UnsupportedModelError:
        return False


def _read(model: Any) -> Any:
    """The core of a model with vision whose prompt an encoder reads; None for all others."""
    if not host_class(model).__module__.startswith("transformers."):
        return None
    core = core_of(model)
    return core if core is not None and FACTS[host_class(core).__name__].reader else None


def _family(model: nn.Module) -> str:
    return f"transformers {host_class(model).__name__}"
