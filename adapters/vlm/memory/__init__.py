"""Models with vision whose prompt an encoder reads, for a decoder that attends to what it made of it."""
