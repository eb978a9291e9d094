"""The masked model, and the proof that a slim one computes the same."""
