"""Analysis: axis inference, structures, roles, layers and cost."""
