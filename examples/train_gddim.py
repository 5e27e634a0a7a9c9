"""Train a critically damped Langevin (CLD), blurring or variance-preserving diffusion model for gDDIM (arXiv 2206.05564).

    accelerate launch examples/train_gddim.py                                   # CLD on digits, on a laptop
    accelerate launch examples/train_gddim.py --process blur --output_dir blur-digits
    accelerate launch examples/train_gddim.py --preset cifar10 --dataset_name cifar10 --mixed_precision bf16

A preset is a published network with its published optimisation; every flag that is given as well overrides it.
"""

import argparse
from pathlib import Path

import torch
from accelerate.utils import set_seed

from diffusers_fastdiff.models.unet_edm import EDMUNet2DModel
from diffusers_fastdiff.pictures import labelled_grid
from diffusers_fastdiff.pipelines.pipeline_gddim import GDDIMPipeline
from diffusers_fastdiff.schedulers.scheduling_gddim import GDDIMScheduler
from diffusers_fastdiff.training.arguments import (
    add_data_arguments,
    add_optimization_arguments,
    add_run_arguments,
    training_parser,
)
from diffusers_fastdiff.training.data import DataInfo
from diffusers_fastdiff.training.gddim_loss import gddim_loss, training_times
from diffusers_fastdiff.training.latents import open_training_data
from diffusers_fastdiff.training.model_card import push_folder, write_model_card
from diffusers_fastdiff.training.run import TrainingRun, check_flags, start_processes

PRESETS = {
    "cifar10": {
        "resolution": 32,
        "random_flip": True,
        "unconditional": True,
        "train_batch_size": 128,
        "max_train_steps": 1_000_001,
        "learning_rate": 2e-4,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 5000,
        "max_grad_norm": 1.0,
        "ema_decay": 0.9999,
    },
}
NETWORKS = {"cifar10": "cld-cifar10"}
"""Presets of `EDMUNet2DModel`; the number of channels follows from data and process."""


def parse_args() -> argparse.Namespace:
    parser = training_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=list(PRESETS), help="published network and optimisation")
    group.add_argument("--model_channels", type=int, default=32, help="unit of width; this and the next four without preset")
    group.add_argument("--channel_mult", type=int, nargs="+", default=[1, 2], help="width of each resolution in that unit")
    group.add_argument("--layers_per_block", type=int, default=1)
    group.add_argument("--attention_resolutions", type=int, nargs="*", help="by default the lowest one")
    group.add_argument("--dropout", type=float, default=0.0)
    group.add_argument("--class_dropout_prob", type=float, default=0.1, help="chance that a sample loses its label")
    group.add_argument("--pretrained_model_name_or_path", help="pipeline whose network to go on training")
    group = parser.add_argument_group("diffusion")
    group.add_argument("--process", choices=["cld", "blur", "vp"], default="cld")
    group.add_argument("--process_parameters", nargs="*", default=[], metavar="NAME=NUMBER", help="for example gamma=0.04")
    group.add_argument("--parametrization", choices=["R", "L"], default="R", help="K in `score = -K^-T eps`")
    group.add_argument("--mixed_score", action="store_true", help="CLD: let the network leave out K^-1 (0, v)")
    add_data_arguments(parser)
    add_optimization_arguments(parser)
    add_run_arguments(parser, output_dir="gddim-digits")
    preset = parser.parse_known_args()[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args()
    check_flags(args)
    if args.vae is not None or args.conditioning_column is not None:
        raise ValueError("`--vae` and `--conditioning_column` are not supported: these networks see pixels and labels.")
    return args


def build_scheduler(args: argparse.Namespace, info: DataInfo) -> GDDIMScheduler:
    parameters = {"image_size": [info.resolution, info.resolution]} if args.process == "blur" else {}
    for entry in args.process_parameters:
        name, _, number = entry.partition("=")
        try:
            parameters[name] = float(number)
        except ValueError:
            raise ValueError(f"`--process_parameters` must be of the form NAME=NUMBER, got {entry!r}.") from None
    return GDDIMScheduler(
        process=args.process,
        process_parameters=parameters,
        network_parametrization=args.parametrization,
        mixed_score=args.mixed_score,
    )


def build_model(args: argparse.Namespace, info: DataInfo, block: int) -> EDMUNet2DModel:
    if args.pretrained_model_name_or_path is not None:
        return EDMUNet2DModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="unet")
    has_labels = info.label_names is not None and not args.unconditional
    data = {
        "sample_size": info.resolution,
        "in_channels": block * info.channels,
        "num_classes": len(info.label_names) if has_labels else None,
    }
    if args.preset is not None:
        model = EDMUNet2DModel.from_preset(NETWORKS[args.preset], **data)
    else:
        names = ("model_channels", "channel_mult", "layers_per_block", "dropout")
        lowest = info.resolution >> (len(args.channel_mult) - 1)
        attention = [lowest] if args.attention_resolutions is None else args.attention_resolutions
        model = EDMUNet2DModel(**data, **{name: getattr(args, name) for name in names}, attention_resolutions=attention)
    model.initialize_weights()
    return model


def main() -> None:
    # Arguments and data
    args = parse_args()
    state = start_processes()
    set_seed(args.seed)
    data = open_training_data(args, state)
    info = data.info

    # Model
    scheduler = build_scheduler(args, info)
    process = scheduler.forward_process
    model = build_model(args, info, process.block)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    pipeline = GDDIMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    # Loss
    def loss_of(network, batch, random):
        clean = data.clean(batch, random)
        condition = {}
        if model.null_label is not None:
            condition = data.condition(batch, random, args.class_dropout_prob, model.null_label)
        timestep = 999 * training_times(random.uniform())
        noise = random.normal(process.block * clean.shape[1], *clean.shape[2:])
        return gddim_loss(
            network,
            clean,
            noise,
            scheduler.time_of(timestep),
            timestep,
            process,
            parametrization=args.parametrization,
            mixed_score=args.mixed_score,
            embedding_type=model.config.embedding_type,
            **condition,
        ).total.mean()

    # Training
    run = TrainingRun(args, model, data.dataset)
    for step in run.steps():
        for batch, random in run.micro_batches(step):
            run.backward(loss_of(run.model, batch, random))
        run.update(step)
        if args.validation_steps and (step + 1) % args.validation_steps == 0 and state.is_main_process:
            with run.averaged_weights():
                validate(args, pipeline, info, run.output_dir / "samples" / f"{step + 1:07d}.png")

    # Results
    if state.is_main_process:
        with run.averaged_weights():
            save(args, pipeline, info, run)


def validate(args, pipeline: GDDIMPipeline, info: DataInfo, path: Path) -> None:
    """A grid of samples, the classes in turn."""
    count, is_conditional = args.num_validation_images, pipeline.unet.null_label is not None
    labels = [index % pipeline.unet.null_label for index in range(count)] if is_conditional else None
    pictures = pipeline(
        class_labels=labels,
        batch_size=count,
        num_inference_steps=args.validation_num_inference_steps,
        guidance_scale=args.validation_guidance_scale if is_conditional else 1.0,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(pictures, [info.label_names[label] for label in labels] if labels else None).save(path)


def save(args, pipeline: GDDIMPipeline, info: DataInfo, run: TrainingRun) -> None:
    cast = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}[args.save_precision]
    getattr(pipeline.unet, cast)()
    pipeline.save_pretrained(run.output_dir)
    labels = "class_labels=[1], " if pipeline.unet.null_label is not None else ""
    usage = (
        "from diffusers_fastdiff import GDDIMPipeline\n\n"
        f'pipe = GDDIMPipeline.from_pretrained("{args.hub_model_id or run.output_dir}")\n'
        f"image = pipe({labels}num_inference_steps=50).images[0]"
    )
    kind = {
        "cld": "critically damped Langevin diffusion (CLD)",
        "blur": "blurring diffusion",
        "vp": "variance-preserving diffusion",
    }[args.process]
    facts = {
        "data": args.dataset_name or args.train_data_dir or "scikit-learn digits",
        "resolution": f"{info.resolution} x {info.resolution} x {info.channels}",
        "process": " ".join([args.process, *args.process_parameters]),
        "prediction": f"eps in {args.parametrization}" + (", mixed score" if args.mixed_score else ""),
        "parameters": f"{pipeline.unet.num_parameters():,}",
        "steps": args.max_train_steps,
        "batch": run.batch_size,
        "seed": args.seed,
    }
    description = f"A U-Net for {kind}, sampled with gDDIM in `GDDIMPipeline`."
    write_model_card(run.output_dir, run.output_dir.name, description, usage, facts, tags=["gddim", args.process])
    if args.push_to_hub:
        print(push_folder(run.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
