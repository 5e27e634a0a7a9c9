"""The blocks of the fixed-point diffusion transformer: adaLN-Zero DiT blocks with their modulation computed outside.

Sources: Peebles and Xie, arXiv 2212.09748 (blocks); Bai and Melas-Kyriazi, arXiv 2401.08741 (shared block).
"""

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

Modulation = tuple[torch.Tensor, ...]
"""shift, 1 + scale, gate of the attention, then of the MLP: six tensors of shape (B, 1, D)."""


class FixedPointDiTAttnProcessor:
    """Scaled dot-product self-attention through the dispatcher of diffusers, so that attention backends can be chosen."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "FixedPointDiTAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in (query, key, value))
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](hidden_states.flatten(2, 3))


class FixedPointDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with biases, (B, N, D) -> (B, N, D)."""

    _default_processor_cls = FixedPointDiTAttnProcessor
    _available_processors = [FixedPointDiTAttnProcessor]

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.heads = num_heads
        self.head_dim = dim // num_heads
        self.use_bias = True
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class FixedPointDiTBlock(nn.Module):
    """adaLN-Zero DiT block whose modulation is computed outside, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = FixedPointDiTAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")

    def forward(self, hidden_states: torch.Tensor, modulation: Modulation) -> torch.Tensor:
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation
        normed = torch.addcmul(shift_attn, self.norm1(hidden_states), scale_attn)
        hidden_states = torch.addcmul(hidden_states, gate_attn, self.attn(normed))
        normed = torch.addcmul(shift_ff, self.norm2(hidden_states), scale_ff)
        return torch.addcmul(hidden_states, gate_ff, self.ff(normed))


class FixedPointDiTSharedBlock(FixedPointDiTBlock):
    """One iteration: merge the state with the injection, then a DiT block.

    The published `fc1([z; inj])` is split into `state_proj(z) + injection`, the second term being constant over iterations.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__(dim, num_heads, mlp_ratio)
        self.state_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.merge_proj = nn.Linear(2 * dim, dim)

    def forward(  # type: ignore[override]  # one input more than an ordinary block
        self, hidden_states: torch.Tensor, modulation: Modulation, injection: torch.Tensor
    ) -> torch.Tensor:
        merged = F.gelu(self.state_proj(hidden_states) + injection, approximate="tanh")
        return super().forward(self.merge_proj(merged), modulation)


for _block in (FixedPointDiTBlock, FixedPointDiTSharedBlock):
    TransformerBlockRegistry.register(
        _block, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    )
