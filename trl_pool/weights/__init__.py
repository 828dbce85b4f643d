"""Weight updates: who takes part, which version everybody holds, and how tensors travel."""

from .coordinator import WeightCoordinator
from .transport import ControlOnlyTransport, GroupMember, WeightTransport

__all__ = ["ControlOnlyTransport", "GroupMember", "WeightCoordinator", "WeightTransport"]
