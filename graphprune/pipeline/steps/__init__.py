"""The passes that recipes have by name, one a file: each runs what `graphprune.passes` has."""
