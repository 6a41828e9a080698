"""Lets PyPI's torchvision load beside torch's CPU build: Python imports this from PYTHONPATH when it starts.

Its compiled part needs CUDA and is left out, but two of its operators are described on import and have to exist by
then. Image processors resize by torch and call neither.
"""

import torch

library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
