"""Edge clients: a device drafts with a small model, and a server verifies (SLED, arXiv 2506.09397)."""
