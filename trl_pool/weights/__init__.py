"""Weight updates: who takes part, which version everybody holds, and how tensors travel."""

from .coordinator import ControlResult, WeightCoordinator
from .transport import ControlOnlyTransport, GroupMember, WeightTransport

__all__ = ["ControlOnlyTransport", "ControlResult", "GroupMember", "WeightCoordinator", "WeightTransport"]
