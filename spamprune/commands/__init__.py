"""The commands that are more than a line or two; spamprune.cli puts them together."""
