"""Speed of `EDMUNet2DModel` beside a plain transcription of the same graph with the same weights, in one run.

    python examples/benchmark_edm_unet.py                     # DDPM++ for CIFAR-10, batch 4, forward and backward
    python examples/benchmark_edm_unet.py --preset cifar10-ncsnpp --dtype bfloat16 --channels_last

The transcription follows the published formulas one operation at a time: resampling kernels repeated in every call, attention
written out with float32 weights. Outputs are compared before anything is timed.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from diffusers_fastdiff.conversion.edm_unet import edm_unet_state_dict
from diffusers_fastdiff.models.unet_edm import EDMUNet2DModel


class Transcription:
    """DDPM++ or NCSN++ as functions of the original state dict."""

    def __init__(self, model: EDMUNet2DModel):
        self.config = model.config
        self.weights = {key: value.detach().clone() for key, value in edm_unet_state_dict(model).items()}
        for key, value in self.weights.items():
            value.requires_grad_(not key.endswith((".resample_filter", ".freqs")))

    def conv(self, name: str, x: torch.Tensor, up: bool = False, down: bool = False) -> torch.Tensor:
        weight, bias = self.weights.get(f"{name}.weight"), self.weights.get(f"{name}.bias")
        if up or down:
            taps = self.weights[f"{name}.resample_filter"].to(x.dtype)
            pad, channels = (taps.shape[-1] - 1) // 2, x.shape[1]
            if up:
                kernel = (4 * taps).tile([channels, 1, 1, 1])
                x = F.conv_transpose2d(x, kernel, groups=channels, stride=2, padding=pad)
            else:
                x = F.conv2d(x, taps.tile([channels, 1, 1, 1]), groups=channels, stride=2, padding=pad)
        return x if weight is None else F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        groups = min(32, x.shape[1] // 4)
        return F.group_norm(x, groups, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def block(self, name: str, x: torch.Tensor, emb: torch.Tensor, up: bool = False, down: bool = False) -> torch.Tensor:
        origin, scale = x, math.sqrt(0.5)
        x = self.conv(f"{name}.conv0", F.silu(self.norm(f"{name}.norm0", x)), up, down)
        x = F.silu(self.norm(f"{name}.norm1", x + self.linear(f"{name}.affine", emb)[:, :, None, None]))
        x = self.conv(f"{name}.conv1", F.dropout(x, self.config.dropout, training=False))
        skip = f"{name}.skip.weight" in self.weights
        x = (x + (self.conv(f"{name}.skip", origin, up, down) if skip else origin)) * scale
        if f"{name}.qkv.weight" in self.weights:
            qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x))
            q, k, v = qkv.reshape(x.shape[0], x.shape[1], 3, -1).unbind(2)
            weights = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(k.shape[1])).float()).softmax(2).to(q.dtype)
            x = (self.conv(f"{name}.proj", torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)) + x) * scale
        return x

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        config, image = self.config, x
        half = config.model_channels * config.noise_channel_mult // 2
        if config.embedding_type == "fourier":
            phases = timestep.outer(2 * math.pi * self.weights["map_noise.freqs"].float())
        else:
            phases = timestep.outer((1 / 10000) ** (torch.arange(half, device=x.device) / (half - 1)))
        emb = torch.cat([phases.sin(), phases.cos()], dim=1).to(x.dtype)
        emb = F.silu(self.linear("map_layer1", F.silu(self.linear("map_layer0", emb))))
        sizes = [config.sample_size >> level for level in range(len(config.channel_mult))]
        skips = []
        for level, size in enumerate(sizes):
            if level == 0:
                x = self.conv(f"enc.{size}x{size}_conv", x)
            else:
                x = self.block(f"enc.{size}x{size}_down", x, emb, down=True)
                if config.encoder_type == "residual":
                    x = image = (x + self.residual(f"enc.{size}x{size}_aux_residual", image)) * math.sqrt(0.5)
            skips.append(x)
            for index in range(config.layers_per_block):
                x = self.block(f"enc.{size}x{size}_block{index}", x, emb)
                skips.append(x)
        for size in reversed(sizes):
            if size == sizes[-1]:
                x = self.block(f"dec.{size}x{size}_in1", self.block(f"dec.{size}x{size}_in0", x, emb), emb)
            else:
                x = self.block(f"dec.{size}x{size}_up", x, emb, up=True)
            for index in range(config.layers_per_block + 1):
                x = self.block(f"dec.{size}x{size}_block{index}", torch.cat([x, skips.pop()], dim=1), emb)
        name = f"dec.{sizes[0]}x{sizes[0]}_aux"
        return self.conv(f"{name}_conv", F.silu(self.norm(f"{name}_norm", x)))

    def residual(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Filter and halve in one go, as the original fuses them."""
        taps = self.weights[f"{name}.resample_filter"].to(x.dtype).tile([x.shape[1], 1, 1, 1])
        weight, pad = self.weights[f"{name}.weight"], taps.shape[-1] // 2 - 1
        x = F.conv2d(x, taps, groups=x.shape[1], padding=pad + weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], stride=2)


def seconds(run: Callable[[], torch.Tensor]) -> float:
    """Of one forward and backward: of the clock on a GPU, of this process on a CPU, which others may be using as well."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    synchronize()
    start = clock()
    run().float().square().mean().backward()
    synchronize()
    return clock() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["cifar10-ddpmpp", "cifar10-ncsnpp", "ffhq-ddpmpp"], default="cifar10-ddpmpp")
    parser.add_argument("--model_channels", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--channels_last", action="store_true", help="for our model")
    args = parser.parse_args()
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = EDMUNet2DModel.from_preset(args.preset, model_channels=args.model_channels, augment_dim=0).to(device).eval()
    side = model.config.sample_size
    x, timestep = torch.randn(args.batch_size, 3, side, side, device=device), torch.randn(args.batch_size, device=device)
    plain = Transcription(model)
    with torch.no_grad():
        error = (model(x, timestep).sample - plain(x, timestep)).abs().max() / plain(x, timestep).abs().max()
    print(f"{args.preset}, {model.num_parameters():,} parameters, batch {args.batch_size}, {args.dtype}, {device}")
    print(f"largest difference of the outputs, relative: {error:.1e}")
    model.to(dtype)
    plain = Transcription(model)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    ours_input, plain_input = x.to(dtype, memory_format=layout), x.to(dtype)
    runs = {"EDMUNet2DModel": lambda: model(ours_input, timestep).sample, "transcription": lambda: plain(plain_input, timestep)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            elapsed = seconds(run)
            if repeat:  # the first one warms up
                times[name].append(elapsed)
    for name, values in times.items():
        print(f"{name}: forward and backward {min(values):.3f} s at best, {statistics.median(values):.3f} s in the middle")
    print(f"the model takes {min(times['EDMUNet2DModel']) / min(times['transcription']):.2f} times the transcription's time")


if __name__ == "__main__":
    main()
