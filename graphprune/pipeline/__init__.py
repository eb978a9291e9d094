"""The whole way from a source to files."""
