"""Plans: which units stay, and how people name them."""
