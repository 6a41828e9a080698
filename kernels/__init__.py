"""The kernels of CTC drafting: tensors in, tensors out, on a GPU or a CPU. `contract.py` holds their common types.

A large kernel is a folder, a small one a file with the same parts:

    __init__.py    the contract: mathematics, arguments, and the function that chooses by device
    gpu.py         Triton; serves a GPU
    reference.py   torch; says whether a CPU is served with it
    cpu.py         numba; serves a CPU, where the reference does not

They import nothing of the package that imports them.
"""
