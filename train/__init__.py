"""Training data, recipes and trainers."""
