"""Limited: a policy under a hard limit of bytes, while the prompt is read in chunks and while tokens are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tokred.core.method import Parameters, from_dict
from tokred.core.registry import methods, register
from tokred.kv.keeping import Keeping
from tokred.kv.parts import When, check_count, parse_bytes
from tokred.kv.policy import CachePolicy, Parts
from tokred.kv.site import CacheSite


@register("limited")
@dataclass(frozen=True)
class Limited(CachePolicy):
    """Another policy's score and fate, after every chunk of the prompt; the cache never holds more than the limit.

    The limit takes the place of the policy's budget and time. It counts keys, values, positions and the policy's state,
    of all layers of one sample, with the rows of the chunk that is being read: what is left beside those is the budget.
    While tokens are generated layers are cut every so often, within the room for half a chunk that is left for that.

    Args:
        policy: a policy of the stage ``cache``, or its name. Its score has to judge a chunk without those to come.
        limit: bytes of one sample such as "64 MiB"; a batch of B holds B times that.
        chunk: most tokens of a forward. ``generate`` cuts the prompt by itself.

    Source: ours; chunks under a limit of memory as in Park et al., KeyDiff, arXiv 2504.15364.
    """

    summary: ClassVar[str] = "a policy under a hard limit of bytes, chunk by chunk"
    source: ClassVar[str] = "tokred"
    example: ClassVar[Parameters] = {"limit": "16 KiB", "chunk": 16}
    nothing: ClassVar[Parameters | None] = None

    policy: CachePolicy | str = "keydiff"
    limit: str = "64 MiB"
    chunk: int = 512

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", _policy(self.policy))
        if not isinstance(self.limit, str):
            raise TypeError(f"limit must be bytes such as '64 MiB', got {self.limit!r}")
        parse_bytes(self.limit, "limit")
        check_count(self.chunk, "chunk", 1)
        why = refusal(self.inner)
        if why:
            raise ValueError(f"{self.inner.name or 'the policy'} cannot hold a limit: {why}. {_others()} can")

    @property
    def inner(self) -> CachePolicy:
        assert isinstance(self.policy, CachePolicy)  # made so above
        return self.policy

    @property
    def parts(self) -> Parts:
        """The policy's, under the limit."""
        parts = self.inner.parts
        when = When(every=parts.when.every, turns=True, chunk=self.chunk)
        return parts._replace(budget=parts.budget.of(self.limit), when=when)

    @property
    def closes(self) -> bool:
        """Where those of the policy are positions inside the cache."""
        return self.inner.closes

    def guards(self, n: int, rows: int) -> tuple[int, int]:
        return self.inner.guards(n, rows)

    def guarded(self, site: CacheSite, rows: tuple[int, ...]) -> Tensor:
        return self.inner.guarded(site, rows)


def refusal(policy: CachePolicy) -> str:
    """The reason why a policy cannot hold a limit while a prompt comes in chunks; empty where it can."""
    if isinstance(policy, Limited):
        return "it has one already"
    if len(policy.members) > 1:
        return "it acts between layers too, on the whole prompt"
    if isinstance(policy, Keeping):
        return f"it evicts nothing; give its store to one that does, as in store={policy.parts.store.name!r}"
    parts = policy.parts
    if getattr(parts.score, "repeats", None) is not None:
        return "its score needs the whole context, which it reads again"
    return parts.score.why_no_chunks or parts.budget.why_no_limit or ""


def _policy(value: Any) -> CachePolicy:
    if isinstance(value, dict):
        value = from_dict(value)
    elif isinstance(value, str):
        value = methods.get(value)()
    if not isinstance(value, CachePolicy):
        raise TypeError(f"policy must be a policy for caches or its name, got {value!r}")
    return value


def _others() -> str:
    """Names of the policies that can hold one."""
    found = [name for name in methods if issubclass(methods.get(name), CachePolicy)]
    able = [name for name in found if name != "limited" and not refusal(methods.get(name)())]  # type: ignore[arg-type]
    return f"{', '.join(able[:-1])} and {able[-1]}"
