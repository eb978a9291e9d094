"""Writing a slim program in the forms that people deploy."""
