"""Analyses of a model and of finished evaluation runs: `granulon-analyse`."""
