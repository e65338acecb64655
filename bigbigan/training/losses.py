"""Objectives as pure functions of the scores of real pairs (x, E(x)) and generated pairs (G(z), z).

The terms s of the sums are the scores that the model has, of s_x, s_z and s_xz: all three is BigBiGAN (section 2), s_xz
alone BiGAN, s_x alone a GAN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbigan.discriminator import DiscriminatorOutput

Objective = Literal["hinge", "logistic"]


def discriminator_loss(real: DiscriminatorOutput, fake: DiscriminatorOutput, objective: Objective = "hinge") -> Tensor:
    """L_D, each score clamped separately.

    hinge: sum over s of E[max(0, 1 - s(real))] + E[max(0, 1 + s(fake))] (BigBiGAN, section 2).
    logistic: sum over s of the cross-entropy of "real", averaged over both kinds of pairs (BiGAN).
    """
    if objective == "hinge":
        return _sum(real, lambda s: F.relu(1 - s)) + _sum(fake, lambda s: F.relu(1 + s))
    return (_sum(real, lambda s: F.softplus(-s)) + _sum(fake, F.softplus)) / 2


def generator_encoder_loss(
    real: DiscriminatorOutput, fake: DiscriminatorOutput, objective: Objective = "hinge"
) -> Tensor:
    """L_EG: E lowers its pairs' scores, G raises its own.

    hinge: sum over s of E[s(real)] - E[s(fake)], without clamping. logistic: L_D with the labels exchanged.
    """
    if objective == "hinge":
        return _sum(real, lambda s: s) + _sum(fake, lambda s: -s)
    return (_sum(real, F.softplus) + _sum(fake, lambda s: F.softplus(-s))) / 2


def rotation_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of telling by how many quarter turns an image is rotated (SS-GAN).

    logits: [4 M, 4], of M images turned by 0, then of the same by 90, 180 and 270 degrees.
    """
    labels = torch.arange(4, device=logits.device).repeat_interleave(len(logits) // 4)
    return F.cross_entropy(_wide(logits), labels)


def turn(x: Tensor) -> Tensor:
    """Images [M, C, S, S] rotated by 90, then all by 180, then all by 270 degrees: [3 M, C, S, S]."""
    return torch.cat([x.rot90(k, (2, 3)) for k in (1, 2, 3)])


def _sum(output: DiscriminatorOutput, term: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([term(_wide(score)).mean() for score in output.present()]).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
