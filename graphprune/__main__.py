"""``python -m graphprune`` is the command line."""

from graphprune.cli import main

main()
