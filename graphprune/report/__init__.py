"""What a run has done, for people and programs."""
