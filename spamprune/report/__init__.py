"""What a run measured: the numbers, the figures and the page."""
