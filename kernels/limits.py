"""Limits of the kernels that the command line needs too. Kept free of torch, so that it starts quickly."""

MAX_NODES = 64  # of a tree: a row's ancestors are one 64-bit word; the anchor needs no bit, every row sees it
