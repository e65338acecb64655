"""From a model folder's weights to training's: the start of fine-tuning, the inverse of `layers.effective_state`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.layers import ConditionLinear, SpectralNorm
from bigbigan.model import BigBiGAN
from bigbigan.schema import ConfigError
from bigbigan.training.step import TrainingState

TOLERANCE = 1e-5  # how far rounding leaves the spectral norm of a normalised weight from 1


@torch.no_grad()
def load_model(state: TrainingState, model: BigBiGAN) -> list[str]:
    """Sets networks and averages of a fresh state to a model that they compute exactly, as a forward pass does.

    Returns the parts that the model lacks; they keep their initial weights.

    Raises:
        ConfigError: a part of another architecture, or a weight that spectral norm would change.
    """
    for name, network in state.networks.items():
        part = getattr(model, name)
        if part is None:
            continue
        if part.config != network.config:
            raise ConfigError(f"{name} of {model.info.name!r} is {part.config}, of the run {network.config}")
        try:
            _load(network, {key: value.to(state.device) for key, value in part.state_dict().items()})
        except ConfigError as error:
            raise ConfigError(f"{name} of {model.info.name!r}: {error}") from None
        if name in state.ema:
            state.ema[name].module.load_state_dict(network.state_dict(), strict=True)
    return [name for name in state.networks if getattr(model, name) is None]


def _load(network: nn.Module, plain: dict[str, Tensor]) -> None:
    own = network.state_dict()
    conditions = {f"{name}.linear": m for name, m in network.named_modules() if isinstance(m, ConditionLinear)}
    shared = getattr(network, "shared", None)
    folded = conditions if shared is not None else {}
    if shared is not None:
        shared.mul_(_shared_scale(shared, [(plain[f"{k}.weight"], plain[f"{k}.bias"]) for k in folded]))
        own["shared"] = shared
    for name, layer in network.named_modules():
        if not isinstance(layer, SpectralNorm):
            continue
        weight = plain[f"{name}.weight"].double()
        if name in folded:
            assert shared is not None
            bias = plain.pop(f"{name}.bias").double()
            weight = plain[f"{name}.weight"] = _with_shared(weight, bias, shared.double())
        plain[f"{name}.u"] = _left_vector(weight.flatten(1), name)
    plain = {**({"shared": own["shared"]} if shared is not None else {}), **plain}
    network.load_state_dict(plain, strict=True)


def _left_vector(matrix: Tensor, name: str) -> Tensor:
    """The `u` [1, out] from which a power iteration estimates spectral norm 1, as the weight is divided already.

    Its spectral norm may be a little larger than 1 if it was divided by an estimate; then `u` leans aside, so that
    sum c^2 s^4 = sum c^2 s^2 over its coordinates c along the singular vectors.
    """
    tall = matrix.shape[0] > matrix.shape[1]  # as G's first layer: 24,576 x 20, whose other product takes 5 GB
    squares, vectors = torch.linalg.eigh(matrix.t() @ matrix if tall else matrix @ matrix.t())  # ascending

    def left(i: int) -> Tensor:
        return F.normalize(matrix @ vectors[:, i], dim=0) if tall else vectors[:, i]

    excess, slack = (squares[-1] ** 2 - squares[-1]).item(), squares - squares**2
    side = int(slack.argmax())
    if abs(squares[-1].item() ** 0.5 - 1) < TOLERANCE:
        return left(-1).unsqueeze(0)
    if excess < 0 or slack[side] <= 0:
        raise ConfigError(f"{name}.weight has spectral norm {squares[-1].item() ** 0.5:.4f}, and training makes it 1")
    lean = excess / (excess + slack[side].item())
    return ((1 - lean) ** 0.5 * left(-1) + lean**0.5 * left(side)).unsqueeze(0)


def _shared_scale(shared: Tensor, layers: list[tuple[Tensor, Tensor]]) -> float:
    """Factor of the shared vector that leaves room for every layer's constant below spectral norm 1."""
    needed = 1.0
    for weight, bias in layers:
        room = 1 - torch.linalg.matrix_norm(weight.double(), 2).item() ** 2
        if room > 0:
            needed = max(needed, bias.double().norm().item() / (shared.norm().item() * (room / 2) ** 0.5))
    return needed


def _with_shared(weight: Tensor, bias: Tensor, shared: Tensor) -> Tensor:
    """[weight, s] of spectral norm 1 whose product with [z, shared] is weight @ z + bias.

    Only s @ shared = bias is given, so what the norm lacks goes where `shared` does not see it.
    """
    constant = torch.outer(bias, shared) / shared.square().sum()
    whole = torch.cat([weight, constant], dim=1)
    squares, vectors = torch.linalg.eigh(whole @ whole.t())
    unseen = torch.zeros_like(shared)
    unseen[0], unseen[1] = shared[1], -shared[0]
    unseen /= unseen.norm()
    whole[:, weight.shape[1] :] += (1 - squares[-1]).clamp(min=0).sqrt() * torch.outer(vectors[:, -1], unseen)
    return whole
