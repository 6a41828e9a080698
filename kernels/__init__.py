"""GPU kernels of CTC drafting, one file per kernel: Triton, a torch reference of the same signature, a dispatcher.

What they take and give is in `contract.py`. They import nothing of the package that imports them.
"""
