"""Match of the encoder: latents, head and feature norm; the trunks are in `match_trunk`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigbigan.config import EncoderConfig
from weights_conversion.algebra import Layer, Poly, equal, of_layer, vector
from weights_conversion.errors import ConversionError
from weights_conversion.layers import LayerTable
from weights_conversion.match_mlp import match_mlp
from weights_conversion.match_trunk import match_trunk
from weights_conversion.patterns import State, affine, expand, expect, mismatch


@dataclass(frozen=True)
class EncoderMatch:
    config: EncoderConfig
    default: str  # which output the signature's `default` is


def match_encoder(outputs: dict[str, Poly], table: LayerTable, state: State) -> EncoderMatch:
    """Configuration; writes the state dict of `bigbigan.encoder.Encoder`."""
    pooled = expect("avepool_feat", outputs["avepool_feat"], "Mean")
    trunk = match_trunk(state, pooled.input, table)
    _features(state, outputs["bn_crelu_feat"], pooled)
    kind, source = _latent(state, outputs)
    head, _ = match_mlp(state, "head", "encoder head", source, lambda p: p.only is pooled)
    names = [name for name in state.norms if name.startswith("trunk.")]
    eps = state.common_eps(names, EncoderConfig.bn_eps)
    bn_affine = state.settle_norms(names, eps)
    feature_eps = state.common_eps(["feature_norm"], EncoderConfig.feature_norm_eps)
    feature_affine = state.settle_norms(["feature_norm"], feature_eps)
    settle_head(state, "head", eps)
    config = EncoderConfig(
        head=head,
        z_dim=outputs["z_mean"].shape[-1],
        output=kind,  # type: ignore[arg-type]
        bn_eps=eps,
        bn_affine=bn_affine,
        feature_norm_eps=feature_eps,
        feature_norm_affine=feature_affine,
        **trunk,
    )
    default = outputs.get("default", outputs["z_sample"])
    same = [name for name in ("z_sample", "z_mean") if outputs[name].key() == default.key()]
    if not same:
        raise mismatch("default", "z_sample or z_mean", default)
    return EncoderMatch(config, same[0])


def settle_head(state: State, name: str, eps: float) -> None:
    """Norms of a residual MLP, which always have gains and offsets in the port."""
    names = [n for n in state.norms if n.startswith(f"{name}.")]
    if names and not state.settle_norms(names, eps):
        for n in names:
            size = state.norms[n].scale.size
            state.put(f"{n}.weight", np.ones(size))
            state.put(f"{n}.bias", np.zeros(size))


def _features(state: State, poly: Poly, pooled: Layer) -> None:
    """[ReLU(h), ReLU(-h)] of the normalised average pool h."""
    where = "bn_crelu_feat"
    if (relu := poly.only) is not None and relu.kind == "Relu":  # of [h, -h]
        halves = list(expect(where, relu.input, "Concat").inputs)
    else:
        halves = [expect(where, half, "Relu").input for half in expect(where, poly, "Concat").inputs]
    if len(halves) != 2 or halves[0].single is not pooled or halves[1].key() != halves[0].scale(-1.0).key():
        raise mismatch(where, "ReLU(h) and ReLU(-h) of a batch norm of avepool_feat", poly)
    state.norm("feature_norm", where, halves[0])


def _latent(state: State, outputs: dict[str, Poly]) -> tuple[str, Poly]:
    """Which kind of output, and what the last linear layer takes."""
    mean, sample, stdev = outputs["z_mean"], outputs["z_sample"], outputs["z_stdev"]
    kind, linears = "deterministic", [mean]
    if mean.only is not None and mean.only.kind == "Tanh":
        kind, linears = "tanh", [mean.only.input]
    deviation = stdev.only
    if stdev.monomials:
        if kind == "tanh" or deviation is None or deviation.kind != "Softplus":
            raise mismatch("z_stdev", "the softplus of a linear layer", stdev)
        kind, linears = "stochastic", [mean, deviation.input]
        draws = [m for m in expand(sample).monomials if len(m) == 2 and {x.kind for x in m} == {"Noise", "Softplus"}]
        if len(draws) != 1 or expand(sample).key() != expand(_sample(mean, deviation, draws[0])).key():
            raise mismatch("z_sample", "z_mean + noise * z_stdev", expand(sample))
    elif not equal(stdev.const, 0) or sample.key() != mean.key():
        raise mismatch("z_sample", "z_mean, with a z_stdev of zero", sample)
    denses = [affine("z_mean", linear, "Dense") for linear in linears]
    if any(dense.input.key() != denses[0].input.key() for dense in denses):
        raise mismatch("z_stdev", f"a linear layer of {denses[0].input}", denses[1])
    state.put(
        "latent.weight",
        np.concatenate([(d.weight * p.terms[(d,)]).T for d, p in zip(denses, linears, strict=True)]),
    )
    state.put("latent.bias", np.concatenate([vector(p.const, p.shape[-1]) for p in linears]))
    return kind, denses[0].input


def _sample(mean: Poly, deviation: Layer, draw: tuple[Layer, ...]) -> Poly:
    if deviation not in draw:
        raise ConversionError("z_sample: its noise is not multiplied by z_stdev")
    noise = next(layer for layer in draw if layer is not deviation)
    return mean + of_layer(noise) * of_layer(deviation)
