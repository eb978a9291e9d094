"""Models as training sees them: trainable copies, adapters, masks, and what is minimised."""
