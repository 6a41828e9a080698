"""GPU kernels of CTC drafting, one file per kernel: Triton, a torch reference of the same signature, a dispatcher."""
