"""What is checked of files that were written."""
