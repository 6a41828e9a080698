"""Limits of the kernels that are options of the command line too, which waits for no torch."""

MAX_NODES = 64  # of a tree: a row's ancestors are one 64-bit word, without the anchor, which every row sees
