"""The errors that tokred raises beyond ``ValueError`` and ``TypeError``, and the warnings that it gives."""

from __future__ import annotations


class TokredError(Exception):
    """Base of tokred's own errors."""


class UnsupportedModelError(TokredError, TypeError):
    """The model has no place where tokens can rightly be reduced; the message says why and what to do."""


class UnknownModelError(UnsupportedModelError):
    """No adapter knows the model, or any part of it, at the stage that was asked for."""


class MissingInputError(TokredError, ValueError):
    """A method asked a site for something that the site does not have."""


class UnknownMethodError(TokredError, ValueError):
    """No method of this name is registered; the message names the nearest ones."""


class TokenStateError(TokredError, RuntimeError):
    """The sizes and the source map that belong to a token sequence were lost between two blocks."""


class NothingRecordedError(TokredError, RuntimeError):
    """A report or a trace was asked for before any (uncompiled) forward had run."""


class TokredWarning(UserWarning):
    """Base of tokred's own warnings."""


class UntestedVersionWarning(TokredWarning):
    """A host library is older or newer than the versions that tokred was tested with."""
