"""The kernels of CTC drafting: tensors in, tensors out, on a GPU or a CPU. `contract.py` holds their common types.

A large kernel is a folder, a small one a file with the same parts:

    __init__.py    the contract: mathematics, arguments, and the function that chooses by device
    gpu.py         `*_triton`; serves a GPU
    reference.py   `*_reference`, in torch; serves a CPU too, unless its first line says otherwise
    cpu.py         `*_cpu`; serves a CPU in place of the reference

The oracle of the searches is `drafter/oracle.py`, in fp64, one prefix at a time. Kernels import nothing of the package
that imports them.
"""
