"""What an output was made of, and the files that say so."""
