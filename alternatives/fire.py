"""FIRE: convolutions become near orthogonal, and the head is drawn anew.

Han et al. 2026, as in the code of their DQN (`rl/dqn/cleanrl/dqn_atari_resume.py`). There linear layers go
back to the weights with which the run began. Here they are drawn anew, as in the other arms; and --moments
says whether the head's moments are emptied, which that code keeps. The encoder's moments stay in both.
"""

import math

import torch
import torch.nn as nn

from alternatives.alternative import AgentParts, Alternative, NoSettings, Words

ITERATIONS = 10


def near_isometry(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (..., rows, columns) with singular values nearer to 1, by Newton and Schulz's iteration.

    X ← 1.5 X − 0.5 X XᵀX, from X divided by its Frobenius norm on. Small singular values take more than these
    iterations to get to 1. A zero matrix stays zero.
    """
    wide = matrices.shape[-2] < matrices.shape[-1]
    x = matrices.mT if wide else matrices
    norms = torch.linalg.matrix_norm(x, keepdim=True)
    x = torch.where(norms > 0, x / norms, x)
    for _ in range(ITERATIONS):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x.mT if wide else x


def orthogonalise(convolution: nn.Conv2d) -> None:
    """Each position of the kernel by itself, as the matrix (out, in) that it is. The bias stays."""
    num_out, num_in, height, width = convolution.weight.shape
    # (height, width, out, in), in float64, since a GPU may multiply float32 with 10-bit mantissas
    by_position = convolution.weight.permute(2, 3, 0, 1).double()
    scale = math.sqrt(num_out / num_in) / (height * width)
    convolution.weight.copy_(scale * near_isometry(by_position).permute(2, 3, 0, 1))


def fire(parts: AgentParts, settings: NoSettings) -> None:
    """Orthogonalises the encoder's convolutions, and gives the head that learns the weights of a new one.

    Raises ValueError where the encoder has none: it would be a reset of the head.
    """
    convolutions = [module for module in parts.encoder.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ValueError("FIRE makes convolutions orthogonal, and this encoder has none")
    for convolution in convolutions:
        orthogonalise(convolution)
    parts.head.load_state_dict(parts.draw_head().state_dict())


ALTERNATIVE = Alternative(
    name="fire",
    words=Words(
        log="convolutions made near orthogonal, head drawn anew (FIRE)",
        noun="FIRE",
        plural="FIRE",
        deed="FIRE",
    ),
    apply=fire,
    draws_head=True,
)
