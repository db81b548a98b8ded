"""The controller's training: a corpus of questions with levels, and the fit to it."""
