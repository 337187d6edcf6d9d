"""From regressions to the tensors of an adapter, of either kind.

Shape legend: L KB layers, S slots, P encoder dim, X hidden size, N query heads, K key/value heads, H head dim, V = K*H,
R key coordinates per head.

Kind "shared" holds the regressions as they are. Kind "paper" (KBLaM, arXiv 2410.10450, eqs. 5-8) has no bias of the
query, no gate, and keys of H numbers per head behind one LayerNorm. The closest to a shared score that it can express:

- every head takes the same R = H - 1 directions, those whose scores vary most over tokens and keys: the best
  approximation of rank R in that measure (Eckart and Young 1936). What needs more than R directions is lost;
- the last number of a head's key is a constant, so that its factor in the query is a gate that is linear in the
  hidden state. It is large beside the others: it rules the LayerNorm's variance, which must not differ between facts;
- half of the heads have keys and queries of the other sign, so that the mean that the LayerNorm takes off is 0;
- queries and gates have no bias of their own: a constant part is expressed as far as hidden states have a constant
  direction, and the overall shift is `kb_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kblam_ray.attention.adapter.config import AdapterConfig
from kblam_ray.attention.projections import LAYER_NORM_EPS

CONSTANT = 10.0
"""The constant number of a key beside the root mean square of all of its other numbers in one head."""


@dataclass(frozen=True)
class Regressions:
    """What the regressions found, float64.

    Attributes:
        key_mean_P, key_scale: of the keys.
        key_covariance_PP: of the keys.
        queries: by KB layer [P, X+1], scored with centred keys.
        hidden_squares: by KB layer [X, X], mean products of hidden states; kind "paper" only.
        values: by KB layer [N*H, P+1].
    """

    key_mean_P: torch.Tensor
    key_scale: float
    key_covariance_PP: torch.Tensor
    queries: Mapping[int, torch.Tensor]
    hidden_squares: Mapping[int, torch.Tensor]
    values: Mapping[int, torch.Tensor]


def adapter_tensors(
    config: AdapterConfig, found: Regressions, gates: Mapping[int, torch.Tensor], value_scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """All tensors by name, float32 on the CPU.

    Args:
        gates: by KB layer [N, X+1]; of kind "paper" the last column is zero.
        value_scale: factor on the values.
    """
    width = config.heads_width
    value_SVP = torch.zeros(config.slots, width, config.dim + 1, dtype=torch.float64)
    for layer in config.layers:
        value_SVP[config.slot_of(layer)] = found.values[layer].cpu() * value_scale
    tensors = {
        "value_projection.weight": value_SVP[..., :-1].flatten(0, 1),
        "value_projection.bias": value_SVP[..., -1].flatten(),
    }
    if config.kind == "paper":
        tensors |= _paper_tensors(config, found, gates)
    else:
        tensors |= {"key_mean": found.key_mean_P, "key_scale": torch.tensor([found.key_scale])}
        for layer in config.layers:
            query_PX = found.queries[layer] * found.key_scale
            tensors[f"query_heads.{layer}.weight"], tensors[f"query_heads.{layer}.bias"] = _split(query_PX)
            tensors[f"gates.{layer}.weight"], tensors[f"gates.{layer}.bias"] = _split(gates[layer])
    return {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}


def _split(weight_AX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weight_AX[:, :-1], weight_AX[:, -1]


def _paper_tensors(
    config: AdapterConfig, found: Regressions, gates: Mapping[int, torch.Tensor]
) -> dict[str, torch.Tensor]:
    shape = config.base_shape
    heads, head_dim = shape.num_heads, shape.head_dim
    device = found.key_covariance_PP.device
    directions = {layer: _directions(found, layer, head_dim - 1) for layer in config.layers}
    num_directions = len(next(iter(directions.values()))[0])
    # Keys along the directions are whitened: their square is about the number of directions.
    constant = CONSTANT * num_directions**0.5
    key_SNHP = torch.zeros(config.slots, heads, head_dim, config.dim, dtype=torch.float64, device=device)
    bias_SNH = torch.zeros(config.slots, heads, head_dim, dtype=torch.float64, device=device)
    sign_N = torch.ones(heads, dtype=torch.float64, device=device)
    sign_N[1::2] = -1
    for layer, (keys_RP, _) in directions.items():
        slot = config.slot_of(layer)
        key_SNHP[slot, :, : len(keys_RP)] = sign_N[:, None, None] * keys_RP
        bias_SNH[slot, :, : len(keys_RP)] = -sign_N[:, None] * (keys_RP @ found.key_mean_P)
        bias_SNH[slot, :, -1] = sign_N * constant
    # Mean square of a key's numbers, whose root the LayerNorm divides by: the same for all facts but for little.
    num_numbers = config.slots * heads * head_dim
    variance = sum(
        heads * (((keys_RP @ found.key_covariance_PP) * keys_RP).sum() + constant**2)
        for keys_RP, _ in directions.values()
    )
    norm = (variance / num_numbers + LAYER_NORM_EPS) ** 0.5
    tensors = {
        "key_projection.weight": key_SNHP.flatten(0, 2),
        "key_projection.bias": bias_SNH.flatten(),
    }
    for layer, (keys_RP, queries_RX) in directions.items():
        query_NHX = torch.zeros(heads, head_dim, shape.hidden_size, dtype=torch.float64, device=device)
        query_NHX[:, : len(keys_RP)] = queries_RX
        query_NHX[:, -1] = gates[layer][:, :-1].to(device) / constant
        query_NHX *= sign_N[:, None, None] * norm * head_dim**0.5
        tensors[f"query_heads.{layer}.weight"] = query_NHX.flatten(0, 1)
    return tensors


def _directions(found: Regressions, layer: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key rows [R, P] and query rows [R, X] whose products give the layer's scores up to rank R <= `rank`."""
    weight_PX = found.queries[layer][:, :-1]
    values_P, vectors_PP = torch.linalg.eigh(found.key_covariance_PP)
    # Directions in which keys do not vary carry no score.
    is_used_P = values_P > 1e-9 * values_P[-1]
    root_P, vectors_PP = values_P[is_used_P].sqrt(), vectors_PP[:, is_used_P]
    # <u, e> of e = vectors (root z) with z white.
    scores_PX = (vectors_PP * root_P).T @ weight_PX
    spread_PP = scores_PX @ found.hidden_squares[layer] @ scores_PX.T
    _, main_PP = torch.linalg.eigh((spread_PP + spread_PP.T) / 2)
    main_PR = main_PP.flip(1)[:, :rank]
    keys_RP = (main_PR.T / root_P) @ vectors_PP.T
    return keys_RP, main_PR.T @ scores_PX
