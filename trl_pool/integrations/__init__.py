"""The pool inside TRL's own trainers: [`patch_trl`] and what it needs. The core never imports this package."""

from .trl import TrlPatch, patch_trl, unpatch_trl

__all__ = ["TrlPatch", "patch_trl", "unpatch_trl"]
