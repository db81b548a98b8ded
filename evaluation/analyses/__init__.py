"""What happens inside a model, and what finished evaluations tell beside their scores."""
