"""Curvature, priors, posteriors, evidence, and SpaM training."""
