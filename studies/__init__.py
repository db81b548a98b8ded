"""Does it work? Protocols, the drawn world, and what finds out; docs/ says what was found. Not installed."""
