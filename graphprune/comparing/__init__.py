"""Two plans, or two outputs, side by side."""
