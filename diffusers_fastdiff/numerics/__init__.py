"""Pure numerics of the five methods: float64 coefficients, no `nn.Module`, no diffusers import.

Glossary. The symbols below keep one meaning everywhere in this package.

| symbol | meaning | shape, unit or range |
|---|---|---|
| `x_0`, `sample` | clean data | (B, C, H, W), data units, about [-1, 1] |
| `x_t`, `noisy` | `alpha * x_0 + sigma * noise` | (B, C, H, W) |
| `t`, `index` | discrete diffusion time | integers 0 (clean) .. T - 1 (noise) |
| `alphas_cumprod` | squared signal level `alpha^2` of a variance-preserving process | float64, (T,) |
| `z` | fixed-point state (tokens) | (B, N, D) |
| `residual` | relative change of `z` in one iteration, `|f(z) - z| / |f(z)|` | (B,), >= 0 |
| `budget` | fixed-point iterations of a whole sampling run | integer >= number of steps |
"""
