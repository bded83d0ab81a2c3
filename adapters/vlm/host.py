"""transformers: models with vision whose visual tokens may leave, and language models whose later layers run on fewer
tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from tokred.adapters.changes import Changes
from tokred.adapters.contract import PREPARE_CACHE, members, terms, words
from tokred.adapters.encoder.transformers import is_tower
from tokred.adapters.host import Host, State
from tokred.adapters.kv.host import match as match_language
from tokred.adapters.kv.host import refusal as cache_refusal
from tokred.adapters.kv.reasons import LOSES
from tokred.adapters.swap import argument_names, host_class
from tokred.adapters.vlm.calibration import supplies_calibration
from tokred.adapters.vlm.decoder_layers import LayerList
from tokred.adapters.vlm.decoder_layers import body as list_body
from tokred.adapters.vlm.families import (
    FACTS,
    Facts,
    class_tokens,
    core_of,
    decoder_layers,
    describe,
    feature_layer,
    projections,
    tower_attention,
    tower_layers,
)
from tokred.adapters.vlm.sites import OF_TOWER
from tokred.adapters.vlm.taps import last_attention
from tokred.adapters.vlm.tower import blocks as tower
from tokred.core.method import Method
from tokred.core.place import MANY, Place, PlacedMethod
from tokred.core.registry import methods as registered
from tokred.errors import MissingInputError, NothingRecordedError, UnsupportedModelError
from tokred.vlm.in_llm import LayerMethod
from tokred.vlm.report import LayerTokens, VisualReport
from tokred.vlm.shots import FrameMerger

if TYPE_CHECKING:
    from tokred.adapters.vlm.hooks import VisualSettings


@dataclass
class VisualHost(Host):
    """A model where tokens leave before the language model or inside it.

    Attributes:
        family: for messages, such as ``"transformers LlavaForConditionalGeneration"``.
        model: what the user gave, or a part of it.
        core: the model with vision around the language model; None for a language model alone.
        language: the module whose forward runs the decoder layers.
        layers: name and module of each decoder layer.
        facts: of the family.
        supplies: what sites of this stage hand over.
        stage: ``"projector"`` or ``"layer"``.
        states: whether some of the layers keep a state instead of rows.
    """

    family: str
    model: nn.Module
    core: nn.Module | None
    language: nn.Module
    layers: list[tuple[str, nn.Module]]
    facts: Facts
    supplies: frozenset[str]
    stage: str
    states: bool = False

    windowless: ClassVar[str] = "{family} has no windows to choose from"

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Modules that ``where`` chooses from: decoder layers, or the projector alone."""
        if self.stage == "layer":
            return self.layers
        assert self.core is not None  # the stage of models with vision
        return [(self.facts.projector or self.facts.tower, self.core)]

    @property
    def depth(self) -> int:
        """Places where a method may act."""
        return len(self.layers) if self.stage == "layer" else 1

    @property
    def layer_list(self) -> nn.ModuleList:
        """The list that the language model takes its layers from."""
        wanted = [layer for _, layer in self.layers]
        for module in self.language.modules():
            if isinstance(module, nn.ModuleList) and [*members.CHILDREN.need(module).values()] == wanted:
                return module
        raise UnsupportedModelError(f"{self.family} keeps its decoder layers in no list")

    @property
    def how(self) -> str:
        """For the table of support."""
        if self.stage == "projector":
            pooled = self.facts.heads and len(self.facts.getters) > 1
            note = " (the tower's keys of images alone, since frames of videos are pooled)" if pooled else ""
            return f"{self.family}, before its language model{note}"
        return f"{self.family}, between its {len(self.layers)} decoder layers"

    def missing(self, method: Method | type[Method]) -> frozenset[str]:
        """Values that the method reads and this host cannot supply; images, where it acts on nothing else."""
        if self.core is None and getattr(method, "visual", True):
            return frozenset({"images"})
        return super().missing(method)

    def check(self, method: Method, expose: str = "auto") -> None:
        """Everything that can be known before the model is touched.

        Raises:
            MissingInputError: the method acts at another stage, or reads what the host cannot supply.
            ValueError: its parameters do not fit the model, or ``expose`` is given.
        """
        if method.stage != self.stage:
            raise MissingInputError(
                f"{method.name!r} acts at stage {method.stage!r}, but {self.family} offers {self.stage!r} here"
            )
        if expose not in ("auto", "none"):
            raise ValueError(
                f"expose is for methods of blocks; one of stage {self.stage!r} takes 'auto' alone, got {expose!r}"
            )
        self.check_reads(method)
        if getattr(method, "positions", "keep") == "repack" and self.stage == "layer":
            raise ValueError(f"{method.name!r} has {LayerMethod.lacks['positions']}")
        if getattr(method, "positions", "keep") == "repack" and "repack" not in self.supplies_positions:
            raise ValueError(
                f"{self.family} has positions in several axes, which cannot be counted anew: take positions='keep'"
            )
        method.check(self.depth)
        if self.core is not None:
            tower.check_layers(method, self.core, self.facts, self.family)
        if self.stage == "layer":
            _ = self.layer_list  # raises where there is none
            assert isinstance(method, PlacedMethod)  # of its stage
            self._check_rows(method)
            # Qwen 3 VL adds features by the places of all visual tokens, which must be there then. No prompt is longer
            # than this: a method that acts before that layer at all acts here.
            early = [i for i in range(1, self.deepstack) if method.acts(MANY, Place(i, self.depth))]
            if early:
                raise ValueError(
                    f"{self.family} adds features of its tower after each of the first {self.deepstack} layers, so "
                    f"tokens can leave before layer {self.deepstack} at the earliest; {method.name!r} acts before "
                    f"layer {early[0]}"
                )

    def _check_rows(self, method: Method) -> None:
        config = words.CONFIG.need(self.language)
        kinds = words.KINDS.part(config) or terms.SLIDING.names
        if words.WINDOW.part(config) is None or not {*kinds} & {*terms.SLIDING.names}:
            return
        few = f"{self.family} has layers that hold the newest tokens alone"
        if getattr(method, "evicts", False):
            raise ValueError(f"{few}, whose rows cannot be freed for {method.name!r}: take evict=False")
        if getattr(method, "decodes", False):
            raise ValueError(f"{few}, and {method.name!r} chooses among all rows: take 'fastv', or another model")

    @property
    def deepstack(self) -> int:
        """First layers after which features of the tower are added to the visual tokens."""
        vision = words.VISION.part(words.CONFIG.part(self.core))
        return len(words.DEEP_LAYERS.part(vision) or ())

    @property
    def supplies_positions(self) -> frozenset[str]:
        """How positions may be handled: "keep" always, "repack" where they are plain numbers before the language
        model."""
        text = str(words.ROPE.part(words.CONFIG.need(self.language), ""))
        plain = words.AXES.name not in text and self.stage == "projector"
        return frozenset({"keep", "repack"} if plain else {"keep"})

    def hint(self, method: Method) -> str:
        """Settings of the method that work instead, else other methods of the stage; the end of a message."""
        if self.core is None:
            unknown = _sees(words.CONFIG.part(self.model))
            why = ": it has vision, but of a family whose image features tokred does not know" if unknown else ""
            return f"{why}; take 'fastkv', which lets tokens of text leave, or a policy of its cache such as 'snapkv'"
        if "calibration" in self.missing(method):
            return (
                ": it takes a bias for each pair of tokens, which goes with eager or SDPA attention, and with images "
                "that see no later tokens"
            )
        for settings, other in getattr(method, "variants", tuple)():
            if not self.missing(other):
                return f"; {method.name!r} with {settings} works"
        some: list[type[Method]] = [registered.get(name) for name in registered]
        found = [cls.name for cls in some if cls.stage == self.stage and not self.missing(cls)]
        return f"; here work {', '.join(found)}" if found else ""

    def patch(
        self, method: Method, where: Callable[[str, nn.Module], bool] | None, expose: str, changes: Changes
    ) -> State:
        """Hang hooks on the model. :meth:`check` has passed."""
        from tokred.adapters.vlm import hooks

        # Both stages share one state: tokens leave, and are counted, in one forward of the language model.
        settings = changes.state(hooks.VisualSettings)
        if settings is None:
            config, visual = words.CONFIG.need(self.language), self.core is not None
            settings = hooks.VisualSettings(self.family, self.facts, config, len(self.layers), visual, self.states)
            self._hang(settings, changes)
        assert isinstance(method, PlacedMethod)  # of its stage
        if self.stage == "projector":
            settings.outer = method
            self.tap(method, changes)
        else:
            settings.inner = method
            if where is not None:
                settings.chosen = frozenset(i for i, one in enumerate(self.layers) if where(*one))
            settings.layers = layers = self.layer_list
            changes.swap(layers, list_body, LayerList())
        return settings

    def report(self, state: VisualSettings, methods: Sequence[Method]) -> VisualReport:
        """Tokens at every decoder layer's input, of the last prefill."""
        if not state.last:
            raise NothingRecordedError("nothing is recorded: run one forward of the patched model first")
        rows = tuple(LayerTokens(i, *row) for i, row in enumerate(state.last))
        return VisualReport(state.family, tuple(methods), state.before, rows)

    def _hang(self, settings: VisualSettings, changes: Changes) -> None:
        from tokred.adapters.vlm import hooks
        from tokred.adapters.vlm.records import Getter
        from tokred.adapters.vlm.taps import TowerTap

        # Hooks that end something are called even when the forward raises: what is in flight would stay so.
        if self.core is not None:
            core: Any = self.core
            settings.core = core
            if self.facts.projector:
                settings.projector = core.get_submodule(self.facts.projector)
            changes.before(core, hooks.EnterCore(settings, argument_names(core)), with_kwargs=True)
            changes.after(core, hooks.LeaveCore(), with_kwargs=True, always_call=True)
            changes.after(core.get_submodule(self.facts.tower), TowerTap())
            for name, modality in self.facts.getters:
                if hasattr(core, name):
                    changes.stand(core, name, Getter(core, name, modality, describe))
        language = self.language
        names = argument_names(language)
        changes.before(language, hooks.EnterLanguage(settings, names), with_kwargs=True)
        changes.after(language, hooks.LeaveLanguage(settings), with_kwargs=True, always_call=True)
        self._hang_head(settings, changes)

    def _hang_head(self, settings: VisualSettings, changes: Changes) -> None:
        """Hang what is around the language model: the cache that generation makes, and the loss."""
        from tokred.adapters.vlm.generate import CachePreparer, EnterLoss, LeaveLoss

        model: Any = self.model
        if hasattr(type(model), PREPARE_CACHE):
            changes.stand(model, PREPARE_CACHE, CachePreparer(model, settings))
        names = argument_names(model)
        if words.LABELS.among(names):
            changes.before(model, EnterLoss(settings, names), with_kwargs=True)
            changes.after(model, LeaveLoss(names), with_kwargs=True, always_call=True)

    def tap(self, method: Method, changes: Changes) -> None:
        """Hang the hooks that note what the method reads of the tower, while a feature getter runs."""
        from tokred.adapters.vlm.taps import FusedTap, HeadTap, PixelTap, ProjectorTap, TablesTap
        from tokred.adapters.vlm.tokens.sound import listen

        core: Any = self.core
        if self.facts.projector:
            changes.before(core.get_submodule(self.facts.projector), ProjectorTap())
        if "pixels" in method.reads:
            changes.before(core.get_submodule(self.facts.tower), PixelTap(), with_kwargs=True)
        if isinstance(method, FrameMerger):
            tower.hang(method, core, self.facts, changes)
        if "sound" in method.reads:
            listen(core.get_submodule(self.facts.sound), changes)
        if not method.reads & OF_TOWER:
            return
        fused = last_attention(core)
        # A tower that pools by attention reads its keys there, and no hook on a projection would see them.
        if fused is not None:
            changes.before(fused, TablesTap(), with_kwargs=True)
            changes.after(words.TOGETHER.need(fused), FusedTap())
        if not self.facts.heads:
            return
        layers = tower_layers(core, self.facts)
        for i in _wanted(core, method, len(layers)):
            attention = tower_attention(layers[i])
            heads = words.TOWER_HEADS.part(attention) or words.HEADS.need(attention)
            for which, projection in projections(attention).items():
                changes.after(projection, HeadTap(i, which, heads))


def _wanted(core: Any, method: Method, depth: int) -> list[int]:
    """Tower layers whose attention the method reads: that whose features are used, and those that it names."""
    found = {feature_layer(core, depth)}
    found |= {i + depth if i < 0 else i for i in getattr(method, "tower_layers", ())}
    return sorted(i for i in found if 0 <= i < depth)


def match_projector(model: nn.Module) -> VisualHost | None:
    """The host record of a model with vision for the stage ``projector``; None when ``model`` is none."""
    return _match(model, "projector")


def match_layer(model: nn.Module) -> VisualHost | None:
    """The host record for the stage ``layer``; language models alone as well."""
    return _match(model, "layer")


def _match(model: nn.Module, stage: str) -> VisualHost | None:
    cls: Any = host_class(model)
    if not cls.__module__.startswith("transformers."):
        return None
    core = core_of(model)
    check_whole(model, core, stage)
    if core is None and stage == "projector":
        return None
    loses = "fewer visual tokens" if stage == "projector" else LOSES  # before it, no row of a cache leaves
    # To layers that keep a state fewer tokens before the first are a shorter text; inside, each would have read others.
    before = stage == "projector"
    found = match_language(model, decodes=core is not None, bounded=True, states=before, loses=loses)
    if found is None:
        return None
    facts = Facts() if core is None else FACTS[host_class(core).__name__]
    language: Any = found.decoder
    layers = decoder_layers(model, list(found.attentions.values()))
    if len(layers) != len(found.attentions) + found.states:
        raise cache_refusal(cls.__name__, "its decoder layers are not known", loses)
    supplies = _supplies_layer(layers) if stage == "layer" else supplies_projector(core, facts)
    if stage == "projector" and not found.states and supplies_calibration(language, facts):
        supplies |= {"calibration"}
    family, states = f"transformers {cls.__name__}", found.states > 0
    return VisualHost(family, model, core, language, layers, facts, supplies, stage, states)


def check_whole(model: Any, core: nn.Module | None, stage: str) -> None:
    """Refuse what is no whole model that can be patched here, for its own reason, whatever its cache is like.

    Raises:
        UnsupportedModelError: its outputs are tied to every token, its images are not known, or it is a tower alone.
    """
    config, name = words.CONFIG.part(model), host_class(model).__name__
    if core is not None and core is not model and core in model.modules() and not _generates(model):
        path = next(where for where, module in model.named_modules() if module is core)
        raise UnsupportedModelError(
            f"transformers' {name} ties its outputs to every token of the prompt, by the caller's mask or ids, which "
            f"fewer tokens do not fit: apply to the model inside it (model.{path}) and take its outputs"
        )
    if core is None and stage == "projector" and _sees(config) and _generates(model):
        # Where layers read images, the prompt has one token for a whole image, or none.
        why = (
            "reads its images in layers of cross-attention beside the prompt, in which are no visual tokens to leave"
            if words.PICTURED_LAYERS.part(words.TEXT.part(config, config)) is not None
            else "is a model with vision of a family whose image features, and their places in the prompt, tokred does "
            f"not know (it knows {', '.join(FACTS)})"
        )
        raise UnsupportedModelError(f"transformers' {name} {why}")
    if core is None and is_tower(model):
        raise UnsupportedModelError(
            f"transformers' {name} is the vision tower of a model with vision, and methods of the stage {stage!r} act "
            "behind it: apply to the whole model"
        )


def _generates(model: Any) -> bool:
    return bool(members.CAN_GENERATE.part(model, lambda: False)())


def _sees(config: Any) -> bool:
    return words.VISION.part(config) is not None


def _supplies_layer(layers: list[tuple[str, nn.Module]]) -> frozenset[str]:
    from tokred.adapters.vlm.decoder_attention import norm_behind_attention, supplies_rows

    found = {"x", "prompt", "carried"}
    if all(norm_behind_attention(layer) is not None for _, layer in layers):
        found.add("stream")
    if all(supplies_rows(layer) for _, layer in layers):
        found |= {"rows", "rows_before", "v"}
    return frozenset(found)


def supplies_projector(core: Any, facts: Facts) -> frozenset[str]:
    found = {"x", "grid", "text", "carried"} | ({"project"} if facts.tokenwise else set())
    if facts.clips or any(modality == "video" for _, modality in facts.getters):
        found |= {"frames", "motion"} | ({"shots"} if tower.tower_of(core, facts) is not None else set())
    found |= ({"sound"} if facts.sound else set()) | ({"tower"} if facts.projector else set())
    if last_attention(core) is not None:
        found.add("attention")
    if words.JOINED.on(members.TOWER.part(core)) and words.BLOCKS.on(members.TOWER.part(core)):
        found.add("pixels")  # the tower is given patches, those of one token together
    if facts.heads and tower_layers(core, facts):
        found |= {"q", "k", "attention", "tower_layers"}
        if class_tokens(core, facts):
            found.add("class_attention")
    return frozenset(found)
