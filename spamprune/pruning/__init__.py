"""Masks, importances, and the plan, apply, verify steps of structured pruning."""
