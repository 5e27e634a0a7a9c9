"""Small models of the real classes, with inputs; deterministic."""

import torch

from diffusers_fastdiff import FasterDiffusionDiTTransformer2DModel, FixedPointDiTTransformer2DModel

SIZES = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "sample_size": 8, "patch_size": 2}


def fixed_point_dit(seed: int = 0, **overrides) -> FixedPointDiTTransformer2DModel:
    torch.manual_seed(seed)
    config = SIZES | {"num_iterations": 3, "num_classes": 10, "class_dropout_prob": 0.1} | overrides
    return FixedPointDiTTransformer2DModel(**config)


def faster_dit(seed: int = 0, **overrides) -> FasterDiffusionDiTTransformer2DModel:
    torch.manual_seed(seed)
    config = SIZES | {"out_channels": 8, "num_layers": 2, "num_embeds_ada_norm": 10} | overrides
    return FasterDiffusionDiTTransformer2DModel(**config)


def dit_inputs(batch_size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timestep": torch.randint(1000, (batch_size,), generator=generator),
        "class_labels": torch.randint(10, (batch_size,), generator=generator),
    }
