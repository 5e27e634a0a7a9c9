"""Train a fixed-point diffusion transformer (FPDM, arXiv 2401.08741), or a plain DiT of the same width to compare with.

    accelerate launch examples/train_fpdm.py                                    # digits, on a laptop
    accelerate launch examples/train_fpdm.py --preset XL/2 --dataset_name ... --vae stabilityai/sd-vae-ft-ema \\
        --latents_dir latents --resolution 256 --mixed_precision bf16           # the published set-up

Each step draws how many fixed-point iterations run without and with gradient, alike on all processes (S-JFB).
"""

import argparse
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler

from diffusers_fastdiff import FasterDiffusionDiTTransformer2DModel, FixedPointDiTTransformer2DModel, PixelAutoencoder
from diffusers_fastdiff.errors import require
from diffusers_fastdiff.models.transformer_fixed_point_dit import read_preset
from diffusers_fastdiff.numerics.gaussian_diffusion import DiffusionSchedule, linear_betas, rescale_zero_terminal_snr
from diffusers_fastdiff.pictures import labelled_grid, to_pil
from diffusers_fastdiff.training.arguments import (
    add_data_arguments,
    add_optimization_arguments,
    add_run_arguments,
    training_parser,
)
from diffusers_fastdiff.training.data import DataInfo
from diffusers_fastdiff.training.fixed_point import check_iteration_ranges, draw_iterations
from diffusers_fastdiff.training.initialization import initialize_dit
from diffusers_fastdiff.training.latents import open_training_data
from diffusers_fastdiff.training.losses import (
    VELOCITY_WEIGHTINGS,
    diffusion_loss,
    rectified_flow_loss,
    rectified_flow_noise,
)
from diffusers_fastdiff.training.model_card import push_folder, write_model_card
from diffusers_fastdiff.training.run import TrainingRun, check_flags, start_processes
from diffusers_fastdiff.training.validation import sample_latents


def parse_args() -> argparse.Namespace:
    parser = training_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--preset", help="published size and patch: S/2, B/2, L/2, XL/2, ... XL/8; overrides the five below")
    group.add_argument("--num_layers", type=int, default=8, help="depth of the plain DiT this model stands for")
    group.add_argument("--num_attention_heads", type=int, default=4)
    group.add_argument("--attention_head_dim", type=int, default=24)
    group.add_argument("--patch_size", type=int, default=2)
    group.add_argument("--num_iterations", type=int, help="default of the model; num_layers minus pre and post layers")
    group.add_argument("--num_pre_layers", type=int, default=1)
    group.add_argument("--num_post_layers", type=int, default=1)
    group.add_argument("--pre_post_timestep_conditioning", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--class_dropout_prob", type=float, default=0.1, help="chance that a sample loses its label")
    group.add_argument("--learn_sigma", action="store_true", help="learn the variance, too (hybrid loss)")
    group.add_argument("--min_no_grad_iterations", type=int, default=0)
    group.add_argument("--max_no_grad_iterations", type=int, default=10, help="as published; small models need fewer")
    group.add_argument("--min_grad_iterations", type=int, default=1)
    group.add_argument("--max_grad_iterations", type=int, default=12, help="as published; small models need fewer")
    group.add_argument("--baseline_dit", action="store_true", help="train diffusers' plain DiT with num_layers instead")
    group.add_argument("--pretrained_model_name_or_path", help="pipeline whose transformer to go on training")
    group.add_argument("--lora_rank", type=int, help="train a LoRA adapter of this rank on the pretrained model")
    group.add_argument("--lora_alpha", type=float, help="by default the rank")
    group.add_argument("--lora_target_modules", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"])
    group = parser.add_argument_group("diffusion")
    group.add_argument("--prediction_type", choices=["epsilon", "v_prediction", "flow_prediction"], default="epsilon")
    group.add_argument("--velocity_weighting", choices=VELOCITY_WEIGHTINGS, default="p2")
    group.add_argument("--zero_terminal_snr", action="store_true", help="end in pure noise; needs v_prediction")
    add_data_arguments(parser)
    add_optimization_arguments(parser)
    add_run_arguments(parser, output_dir="fpdm-digits")
    args = parser.parse_args()
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    check_flags(args)
    check_iteration_ranges(
        (args.min_no_grad_iterations, args.max_no_grad_iterations), (args.min_grad_iterations, args.max_grad_iterations)
    )
    if args.zero_terminal_snr and args.prediction_type != "v_prediction":
        raise ValueError("`--zero_terminal_snr` needs `--prediction_type v_prediction`: pure noise says nothing about itself.")
    if args.prediction_type == "flow_prediction" and args.learn_sigma:
        raise ValueError("`--learn_sigma` has no meaning for `--prediction_type flow_prediction`.")
    if args.lora_rank is not None and (args.pretrained_model_name_or_path is None or args.baseline_dit):
        raise ValueError("`--lora_rank` needs `--pretrained_model_name_or_path` of a fixed-point model to adapt.")
    if args.latents_dir is not None and args.vae is None:
        raise ValueError("`--latents_dir` needs `--vae`.")


def build_model(
    args: argparse.Namespace, info: DataInfo
) -> FixedPointDiTTransformer2DModel | FasterDiffusionDiTTransformer2DModel:
    model_class = FasterDiffusionDiTTransformer2DModel if args.baseline_dit else FixedPointDiTTransformer2DModel
    if args.pretrained_model_name_or_path is not None:
        return model_class.from_pretrained(args.pretrained_model_name_or_path, subfolder="transformer")
    depth, dim, heads = args.num_layers, args.num_attention_heads * args.attention_head_dim, args.num_attention_heads
    patch_size = args.patch_size
    if args.preset is not None:
        depth, dim, heads, patch_size = read_preset(args.preset)
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": info.channels,
        "out_channels": info.channels * (2 if args.learn_sigma else 1),
        "sample_size": info.resolution,
        "patch_size": patch_size,
    }
    num_classes = 1 if args.unconditional or not info.label_names else len(info.label_names)
    if args.baseline_dit:
        if info.conditioning_dim is not None:
            raise ValueError("`--baseline_dit` is conditioned on labels only; leave `--conditioning_column` out.")
        model = FasterDiffusionDiTTransformer2DModel(
            **config, num_layers=depth, num_embeds_ada_norm=num_classes, norm_eps=1e-6, class_dropout_prob=0.0
        )
    else:
        model = FixedPointDiTTransformer2DModel(
            **config,
            num_pre_layers=args.num_pre_layers,
            num_post_layers=args.num_post_layers,
            num_iterations=args.num_iterations or depth - args.num_pre_layers - args.num_post_layers,
            num_classes=None if info.conditioning_dim else num_classes,
            conditioning_dim=info.conditioning_dim,
            class_dropout_prob=0.0,  # conditions are dropped outside, independent of how a batch is split
            pre_post_timestep_conditioning=args.pre_post_timestep_conditioning,
        )
    initialize_dit(model)
    return model


def sampling_scheduler(args: argparse.Namespace) -> DDIMScheduler | DPMSolverMultistepScheduler:
    if args.prediction_type == "flow_prediction":
        return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type=args.prediction_type,
        rescale_betas_zero_snr=args.zero_terminal_snr,
        timestep_spacing="trailing" if args.zero_terminal_snr else "linspace",
    )


def main() -> None:
    # Arguments and data
    args = parse_args()
    state = start_processes()
    set_seed(args.seed)
    data = open_training_data(args, state)
    info = data.info

    # Model
    model = build_model(args, info)
    if args.lora_rank is not None:
        lora_config = require("peft", "train").LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_alpha or args.lora_rank, target_modules=args.lora_target_modules
        )
        model.requires_grad_(False)
        model.add_adapter(lora_config)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()

    # Loss
    is_flow = args.prediction_type == "flow_prediction"
    betas = linear_betas()
    schedule = DiffusionSchedule.from_betas(rescale_zero_terminal_snr(betas) if args.zero_terminal_snr else betas)
    schedule = schedule.to(state.device)

    def loss_of(network, batch, random, iterations) -> torch.Tensor:
        clean = data.clean(batch, random)
        condition = data.condition(batch, random, args.class_dropout_prob, model.null_label)
        timestep, noise = random.integers(1000), random.normal(*clean.shape[1:])
        add_noise = rectified_flow_noise if is_flow else schedule.add_noise
        output = network(add_noise(clean, noise, timestep), timestep, **condition, **iterations, return_dict=False)[0].float()
        if is_flow:
            return rectified_flow_loss(output, clean, noise).total.mean()
        loss = diffusion_loss(output, clean, noise, timestep, schedule, args.prediction_type, args.velocity_weighting)
        return loss.total.mean()

    # Training
    run = TrainingRun(args, model, data.dataset)
    pipeline = DiTPipeline(model, data.vae or PixelAutoencoder(info.channels), sampling_scheduler(args))
    for step in run.steps():
        iterations = {}
        if not args.baseline_dit:
            no_grad, grad = draw_iterations(
                args.seed,
                step,
                (args.min_no_grad_iterations, args.max_no_grad_iterations),
                (args.min_grad_iterations, args.max_grad_iterations),
            )
            iterations = {"num_no_grad_iterations": no_grad, "num_iterations": grad}
        for batch, random in run.micro_batches(step):
            run.backward(loss_of(run.model, batch, random, iterations))
        run.update(step)
        if args.validation_steps and (step + 1) % args.validation_steps == 0 and state.is_main_process:
            with run.averaged_weights():
                validate(args, pipeline, info, data.dataset, run.output_dir / "samples" / f"{step + 1:07d}.png")

    # Results
    if state.is_main_process:
        with run.averaged_weights():
            save(args, pipeline, info, run)


@torch.no_grad()
def validate(args, pipeline, info: DataInfo, dataset, path: Path) -> None:
    """A grid of samples, the classes (or the first conditioning vectors of the data) in turn."""
    count, device = args.num_validation_images, pipeline.device
    if info.conditioning_dim is not None:
        condition = torch.stack([dataset[index % len(dataset)]["conditioning"] for index in range(count)]).to(device)
        name, null, captions = "conditioning", torch.zeros_like(condition), None
    else:
        names = info.label_names if info.label_names and not args.unconditional else ("",)
        condition = torch.arange(count, device=device) % len(names)
        name, null, captions = (
            "class_labels",
            torch.full_like(condition, pipeline.transformer.null_label),
            [names[k] for k in condition.tolist()],
        )

    def denoise(latents: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return pipeline.transformer(latents, timestep.to(device).expand(len(latents)), **{name: condition}).sample

    latents = sample_latents(
        denoise,
        pipeline.scheduler,
        (count, info.channels, info.resolution, info.resolution),
        condition,
        null,
        num_inference_steps=args.validation_num_inference_steps,
        guidance_scale=args.validation_guidance_scale,
        seed=args.seed,
    )
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(to_pil(images), captions if captions and any(captions) else None).save(path)


def save(args, pipeline: DiTPipeline, info: DataInfo, run: TrainingRun) -> None:
    if args.lora_rank is not None:
        pipeline.transformer.save_lora_adapter(run.output_dir)
    else:
        cast = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}[args.save_precision]
        getattr(pipeline.transformer, cast)()
        pipeline.save_pretrained(run.output_dir)
    kind = "plain DiT" if args.baseline_dit else "fixed-point DiT (FPDM)"
    size = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    usage = (
        "import diffusers_fastdiff  # makes its classes known to diffusers\n"
        "from diffusers import DiTPipeline\n\n"
        f'pipe = DiTPipeline.from_pretrained("{args.hub_model_id or run.output_dir}")\n'
        "image = pipe(class_labels=[1], num_inference_steps=50).images[0]"
    )
    facts = {
        "data": args.dataset_name or args.train_data_dir or "scikit-learn digits",
        "resolution of the model": f"{info.resolution} x {info.resolution} x {info.channels}",
        "parameters": f"{size:,}",
        "steps": args.max_train_steps,
        "batch": run.batch_size,
        "seed": args.seed,
        "prediction": args.prediction_type + (", zero terminal SNR" if args.zero_terminal_snr else ""),
    }
    description = f"A {kind} for class-conditional image generation in diffusers' `DiTPipeline`."
    write_model_card(run.output_dir, run.output_dir.name, description, usage, facts, tags=["fpdm", "dit"])
    if args.push_to_hub:
        print(push_folder(run.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
