"""Text in, token ids out: what only preparation needs."""
