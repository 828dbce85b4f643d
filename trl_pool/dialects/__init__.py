"""Wire protocols: one module each, none of which does I/O."""

from .base import Dialect, Endpoint, Job
from .trl import TrlDialect

__all__ = ["Dialect", "Endpoint", "Job", "TrlDialect"]
