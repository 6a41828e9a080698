"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) in a dtype that the machine computes in.

`torch.optim.Muon` orthogonalises in bf16. A CPU without bf16 instructions emulates them: a step of a drafter for a
target of hidden size 576 took 60 seconds, 4 of them outside of the optimizer.
"""

import torch
from torch import Tensor


def orthogonal_dtype(device: torch.device) -> torch.dtype:
    """bf16, as published, where the device has instructions for it, else fp32."""
    if device.type != "cpu":
        return torch.bfloat16
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def orthogonalize(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """`U V^T` of `matrix = U S V^T`, `[n, m]`, up to singular values between 0.5 and 1.5: Newton-Schulz iterations of
    a quintic, `X <- a X + (b A + c A A) X` with `A = X X^T`. Computed and returned in `dtype`."""
    a, b, c = coefficients
    x = matrix.to(dtype, copy=True)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=eps))  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Muon(torch.optim.Muon):
    """torch's Muon, with its options and state. The orthogonalisation is in `orthogonal_dtype`, the learning rate that
    of `adjust_lr_fn="match_rms_adamw"`: an update has the size that AdamW's would have (arXiv 2502.16982)."""

    def __init__(self, params, lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise ValueError("this optimizer takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        gradient, momentum = parameter.grad, group["momentum"]
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = orthogonalize(
            gradient.lerp(buffer, momentum),
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
            orthogonal_dtype(parameter.device),
        )
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)
