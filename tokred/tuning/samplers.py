"""Where shapes come from: Optuna's sampler, which learns from the trials, or plain chance."""

from __future__ import annotations

import random
import warnings
from typing import Any

from tokred.tuning.space import Dice


class Chance:
    """Dice without memory.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def integer(self, name: str, low: int, high: int) -> int:
        return self._rng.randint(low, high)

    def number(self, name: str, low: float, high: float) -> float:
        return self._rng.uniform(low, high)

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        return self._rng.choice(options)

    def ask(self) -> Dice:
        """The dice for the next shape."""
        return self

    def tell(self, value: float) -> None:
        """Learn what became of it."""


class Learned:
    """Optuna's tree-structured Parzen estimator.

    Args:
        seed: of the draws.

    Raises:
        ImportError: Optuna is not installed.
    """

    def __init__(self, seed: int) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ImportError("search='optuna' needs Optuna: pip install 'tokred[tune]', or search='greedy'") from error
        self._optuna = optuna
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the sampler of groups is experimental
                sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=12)
            self._study = optuna.create_study(sampler=sampler)
        finally:
            optuna.logging.set_verbosity(level)
        self._trial: Any = None

    def integer(self, name: str, low: int, high: int) -> int:
        found: int = self._trial.suggest_int(name, low, high)
        return found

    def number(self, name: str, low: float, high: float) -> float:
        found: float = self._trial.suggest_float(name, low, high)
        return found

    def choice(self, name: str, options: tuple[Any, ...]) -> Any:
        return self._trial.suggest_categorical(name, options)

    def ask(self) -> Dice:
        """The dice for the next shape."""
        self._trial = self._study.ask()
        return self

    def tell(self, value: float) -> None:
        """Learn what became of it; infinity: it was no setting at all."""
        state = self._optuna.trial.TrialState
        if value == float("inf"):
            self._study.tell(self._trial, state=state.FAIL)
        else:
            self._study.tell(self._trial, value)


def sampler(search: str, seed: int) -> Chance | Learned:
    """The sampler of ``"greedy"``, ``"optuna"``, or, for ``"auto"``, the best there is."""
    if search == "greedy":
        return Chance(seed)
    try:
        return Learned(seed)
    except ImportError:
        if search == "optuna":
            raise
        return Chance(seed)
