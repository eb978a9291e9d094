"""``python -m graphprune`` is the command line."""

from graphprune.cli.app import main

main()
