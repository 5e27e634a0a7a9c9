"""Initialisation of diffusion transformers as published: arXiv 2212.09748, section 3 (adaLN-Zero)."""

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ..models.transformer_fixed_point_dit import FixedPointDiTTransformer2DModel


@torch.no_grad()
def initialize_dit(model: FixedPointDiTTransformer2DModel | DiTTransformer2DModel) -> None:
    """Xavier-uniform weights and zero biases, embeddings from N(0, 0.02^2), modulations and output zero.

    Draws from the global generator: seed it first.

    Raises:
        TypeError: for other models.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    if isinstance(model, FixedPointDiTTransformer2DModel):
        _initialize_injection(model)
        embedders, modulations = [model.time_embedder], list(model.modulations)
    elif isinstance(model, DiTTransformer2DModel):
        norms = [block.norm1 for block in model.transformer_blocks]
        embedders, modulations = [norm.emb.timestep_embedder for norm in norms], [norm.linear for norm in norms]
    else:
        raise TypeError(f"`model` must be a diffusion transformer, got {type(model).__name__}.")
    for embedder in embedders:
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
    for linear in (*modulations, model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def _initialize_injection(model: FixedPointDiTTransformer2DModel) -> None:
    """The two halves of the input projection are one 2D x 2D matrix, and are drawn as such."""
    state = model.transformer_blocks[model.config.num_pre_layers].state_proj
    whole = torch.empty(state.out_features, 2 * state.in_features)
    nn.init.xavier_uniform_(whole)
    state.weight.copy_(whole[:, : state.in_features])
    model.injection_out.weight.copy_(whole[:, state.in_features :])
