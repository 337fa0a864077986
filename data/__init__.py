"""Text in, token files out, batches from them; prepared data sets live beside in data/<name>/."""
