"""Gates that are learned: what stays of a structure is chosen while the weights train."""
