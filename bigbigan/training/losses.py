"""BigBiGAN's objective (section 2), as pure functions of the scores of real and generated pairs.

A real pair is (x, E(x)), a generated pair is (G(z), z); the terms s of the sums are the scores that the model has,
of s_x, s_z and s_xz.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigbigan.discriminator import DiscriminatorOutput


def discriminator_loss(real: DiscriminatorOutput, fake: DiscriminatorOutput) -> Tensor:
    """L_D = sum over s of E[max(0, 1 - s(real))] + E[max(0, 1 + s(fake))]; each score is clamped separately."""
    terms = [F.relu(1 - s.float()).mean() for s in real.present()] + [
        F.relu(1 + s.float()).mean() for s in fake.present()
    ]
    return sum(terms[1:], terms[0])


def generator_encoder_loss(real: DiscriminatorOutput, fake: DiscriminatorOutput) -> Tensor:
    """L_EG = sum over s of E[s(real)] - E[s(fake)], without clamping: E lowers its pairs' scores, G raises its own."""
    terms = [s.float().mean() for s in real.present()] + [-s.float().mean() for s in fake.present()]
    return sum(terms[1:], terms[0])
