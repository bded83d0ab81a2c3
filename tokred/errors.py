"""The errors that tokred raises beyond ``ValueError`` and ``TypeError``, and the categories of its warnings."""

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


class BypassedError(TokenStateError):
    """A forward went past the patch: something has been put in front of the places where it acts, or they were
    exchanged. The message names the place, what stands in the way, and what to do."""


class TokredWarning(UserWarning):
    """Base of tokred's warnings, to be filtered by."""


class NothingRemovedWarning(TokredWarning):
    """A method is applied with settings, or ran in a place, that leave all tokens; the message says what to give."""


class MovedWarning(TokredWarning):
    """A name of tokred is used by the path that it had in an older version; the message has the new one."""


class UntestedVersionWarning(TokredWarning):
    """A host library is older or newer than the versions that tokred was tested with."""


class PluginWarning(TokredWarning):
    """A method of another package cannot be used and is left out; the message says which and why."""


class SettingWarning(TokredWarning):
    """A saved setting is loaded by an older tokred, or applied to another model than it was made for."""
