"""Methods that make single weights zero, one a file."""
