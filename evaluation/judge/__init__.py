"""GPTscores of finished answers, by a judge at an OpenAI-compatible endpoint."""
