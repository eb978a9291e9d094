"""Where a run computes: on the processor, or on an accelerator with the rest waiting in memory."""

from graphprune.placement.devices import CPU, find_device, let_go
from graphprune.placement.place import Placement, on_device, present, settled

__all__ = ["CPU", "Placement", "find_device", "let_go", "on_device", "present", "settled"]
