"""``python -m spamprune``."""

from spamprune.cli import main

main()
