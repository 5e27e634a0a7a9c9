"""Train a U-Net in the EDM, VP or VE formulation, with the momentum of the Fast Diffusion Model (FDM, arXiv 2306.06991) or not.

    accelerate launch examples/train_fdm.py                                     # EDM-FDM on digits, on a laptop
    accelerate launch examples/train_fdm.py --precondition vp --no-fdm --output_dir vp-digits
    accelerate launch examples/train_fdm.py --preset cifar10-ddpmpp --dataset_name cifar10 --mixed_precision bf16

A preset is a published network with its published optimisation; every flag that is given as well overrides it. Schedules
count images, so they do not change with the batch. `--train_data_dir` may be a ZIP archive (see examples/prepare_images.py).
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from diffusers_fastdiff.models.unet_edm import PRESETS as NETWORKS
from diffusers_fastdiff.models.unet_edm import EDMUNet2DModel
from diffusers_fastdiff.numerics.momentum import warmup_clamp
from diffusers_fastdiff.numerics.preconditioning import KINDS
from diffusers_fastdiff.pictures import labelled_grid
from diffusers_fastdiff.pipelines.pipeline_edm import EDMPipeline
from diffusers_fastdiff.schedulers.scheduling_fdm import FDMEDMScheduler, FDMVEScheduler, FDMVPScheduler
from diffusers_fastdiff.training.arguments import (
    add_data_arguments,
    add_optimization_arguments,
    add_run_arguments,
    training_parser,
)
from diffusers_fastdiff.training.data import DataInfo
from diffusers_fastdiff.training.edm_augmentation import NUM_LABELS, augment
from diffusers_fastdiff.training.edm_loss import edm_loss
from diffusers_fastdiff.training.edm_schedule import half_life_decay, ramp_up_steps
from diffusers_fastdiff.training.latents import TrainingData, open_training_data
from diffusers_fastdiff.training.model_card import push_folder, write_model_card
from diffusers_fastdiff.training.run import TrainingRun, check_flags, start_processes
from diffusers_fastdiff.training.zip_data import ZipDataset

SCHEDULERS = {"vp": FDMVPScheduler, "ve": FDMVEScheduler, "edm": FDMEDMScheduler}
_CIFAR10 = {
    "train_batch_size": 512,
    "max_train_steps": 390_625,
    "learning_rate": 1e-3,
    "augment_probability": 0.12,
    "resolution": 32,
}
_FACES = {
    "train_batch_size": 256,
    "max_train_steps": 781_250,
    "learning_rate": 2e-4,
    "augment_probability": 0.15,
    "resolution": 64,
}
_IMAGENET = {
    "train_batch_size": 4096,
    "max_train_steps": 610_352,
    "learning_rate": 1e-4,
    "ema_half_life": 50e6,
    "resolution": 64,
}
_LONG = {"ema_half_life": 500e3, "lr_ramp_up": 10e6, "class_dropout_prob": 0.0}
OPTIMIZATION = {"cifar10": _LONG | _CIFAR10, "ffhq": _LONG | _FACES, "afhqv2": _LONG | _FACES, "imagenet64": _LONG | _IMAGENET}
"""Published optimisation of each data set, for all processes together on one."""
PRESETS = [name for name in NETWORKS if name.partition("-")[0] in OPTIMIZATION]


def parse_args() -> argparse.Namespace:
    parser = training_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=PRESETS, help="published network and optimisation")
    group.add_argument("--model_channels", type=int, default=20, help="unit of width; this and the next four without preset")
    group.add_argument("--channel_mult", type=int, nargs="+", default=[1, 2], help="width of each resolution in that unit")
    group.add_argument("--layers_per_block", type=int, default=1)
    group.add_argument("--attention_resolutions", type=int, nargs="*", default=[4])
    group.add_argument("--dropout", type=float, default=0.0)
    group.add_argument("--class_dropout_prob", type=float, default=0.1, help="chance that a sample loses its label")
    group.add_argument("--pretrained_model_name_or_path", help="pipeline whose network to go on training")
    group = parser.add_argument_group("diffusion")
    group.add_argument("--precondition", choices=KINDS, default="edm", help="formulation of denoiser and noise levels")
    group.add_argument("--fdm", action=argparse.BooleanOptionalAction, default=True, help="momentum")
    group.add_argument("--multiplier", type=float, default=1.0, help="of the momentum; the published command line has 2")
    group.add_argument(
        "--warmup_steps", type=int, help="steps with a bound on loss weights; by default 200 with momentum, else 0"
    )
    group.add_argument("--augment_probability", type=float, default=0.0, help="of each of EDM's augmentations")
    group.add_argument("--lr_ramp_up", type=float, default=12_800, help="images over which the learning rate rises")
    group.add_argument("--ema_half_life", type=float, default=50_000, help="of the average of weights, in images")
    group.add_argument("--ema_ramp_up", type=float, default=0.05, help="largest half-life as a share of the images seen")
    add_data_arguments(parser)
    add_optimization_arguments(parser, lr_scheduler="constant_with_warmup", learning_rate=1e-3, max_train_steps=6000)
    add_run_arguments(parser, output_dir="fdm-digits")
    parser.set_defaults(validation_num_inference_steps=17, save_precision="float32")
    preset = parser.parse_known_args()[0].preset
    parser.set_defaults(**OPTIMIZATION.get((preset or "").partition("-")[0], {}))
    args = parser.parse_args()
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    check_flags(args)
    if args.vae is not None or args.conditioning_column is not None:
        raise ValueError("`--vae` and `--conditioning_column` are not supported: these networks see pixels and labels.")
    for name in ("augment_probability", "class_dropout_prob"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"`--{name}` must be a probability, got {getattr(args, name)}.")
    if args.fdm and args.multiplier <= 0:
        raise ValueError(f"`--multiplier` must be positive, got {args.multiplier}; use `--no-fdm` for no momentum.")
    if args.validation_num_inference_steps % 2 == 0:
        raise ValueError(
            f"`--validation_num_inference_steps` must be odd for Heun's method, got {args.validation_num_inference_steps}."
        )
    if args.warmup_steps is None:
        args.warmup_steps = 200 if args.fdm else 0


def open_data(args: argparse.Namespace, state: PartialState) -> TrainingData:
    """Images as the data flags say; a ZIP archive in `--train_data_dir` as well."""
    if args.train_data_dir is None or Path(args.train_data_dir).suffix.lower() != ".zip":
        return open_training_data(args, state)
    dataset = ZipDataset(args.train_data_dir, args.resolution)
    return TrainingData(dataset, dataset.info, None, args.random_flip, args.unconditional)


def build_model(args: argparse.Namespace, info: DataInfo) -> EDMUNet2DModel:
    if args.pretrained_model_name_or_path is not None:
        return EDMUNet2DModel.from_pretrained(args.pretrained_model_name_or_path, subfolder="unet")
    has_labels = info.label_names is not None and not args.unconditional
    data = {
        "sample_size": info.resolution,
        "in_channels": info.channels,
        "num_classes": len(info.label_names) if has_labels else None,
        "augment_dim": NUM_LABELS if args.augment_probability else 0,
    }
    if args.preset is not None:
        model = EDMUNet2DModel.from_preset(args.preset, **data)
    else:
        names = ("model_channels", "channel_mult", "layers_per_block", "attention_resolutions", "dropout")
        model = EDMUNet2DModel(**data, **{name: getattr(args, name) for name in names})
    model.initialize_weights()
    return model


def build_scheduler(args: argparse.Namespace) -> FDMEDMScheduler | FDMVPScheduler | FDMVEScheduler:
    scheduler = SCHEDULERS[args.precondition](multiplier=args.multiplier if args.fdm else None)
    if args.pretrained_model_name_or_path is not None:
        saved = scheduler.load_config(args.pretrained_model_name_or_path, subfolder="scheduler")
        ours = (type(scheduler).__name__, scheduler.config.multiplier or None)
        theirs = (saved.get("_class_name"), saved.get("multiplier") or None)
        if theirs[0] in {cls.__name__ for cls in SCHEDULERS.values()} and ours != theirs:
            raise ValueError(
                f"`--pretrained_model_name_or_path` holds a network for {theirs[0]} with multiplier {theirs[1]}, not for "
                f"{ours[0]} with {ours[1]}: set `--precondition`, `--fdm` and `--multiplier` accordingly."
            )
        scheduler = type(scheduler).from_config(saved) if ours == theirs else scheduler
    return scheduler


def main() -> None:
    # Arguments and data
    args = parse_args()
    state = start_processes()
    set_seed(args.seed)
    data = open_data(args, state)
    info = data.info
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * state.num_processes
    args.lr_warmup_steps = args.lr_warmup_steps or ramp_up_steps(args.lr_ramp_up, batch_size)

    # Model
    model = build_model(args, info)
    if model.config.augment_dim not in (0, NUM_LABELS) or (args.augment_probability and not model.config.augment_dim):
        raise ValueError(
            f"`--augment_probability` needs a model with augment_dim={NUM_LABELS}, this one has {model.config.augment_dim}."
        )
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    scheduler = build_scheduler(args)
    pipeline = EDMPipeline(model, scheduler)
    preconditioning = scheduler.preconditioning

    # Loss
    def loss_of(network, batch, random, step) -> torch.Tensor:
        clean = data.clean(batch, random)
        condition = {}
        if model.null_label is not None:
            condition = data.condition(batch, random, args.class_dropout_prob, model.null_label)
        if args.augment_probability:
            clean, condition["augment_labels"] = augment(clean, random, args.augment_probability)
        draws = random.normal() if args.precondition == "edm" else random.uniform()
        sigma, noise = preconditioning.training_sigma(draws), random.normal(*clean.shape[1:])
        max_weight = warmup_clamp(step, args.warmup_steps)
        return edm_loss(network, clean, sigma, noise, preconditioning, max_weight, **condition).total.mean()

    # Training
    run = TrainingRun(args, model, data.dataset)
    for step in run.steps():
        for batch, random in run.micro_batches(step):
            run.backward(loss_of(run.model, batch, random, step))
        if run.ema is not None:  # both, so that diffusers' own warm-up has no say
            run.ema.decay = run.ema.min_decay = half_life_decay(step, run.batch_size, args.ema_half_life, args.ema_ramp_up)
        run.update(step)
        if args.validation_steps and (step + 1) % args.validation_steps == 0 and state.is_main_process:
            with run.averaged_weights():
                validate(args, pipeline, info, run.output_dir / "samples" / f"{step + 1:07d}.png")

    # Results
    if state.is_main_process:
        with run.averaged_weights():
            save(args, pipeline, info, run)


def validate(args, pipeline: EDMPipeline, info: DataInfo, path: Path) -> None:
    """A grid of samples, the classes in turn."""
    count, is_conditional = args.num_validation_images, pipeline.unet.null_label is not None
    labels = [index % pipeline.unet.null_label for index in range(count)] if is_conditional else None
    pictures = pipeline(
        class_labels=labels,
        batch_size=count,
        num_inference_steps=args.validation_num_inference_steps,
        guidance_scale=args.validation_guidance_scale if is_conditional and args.class_dropout_prob else 1.0,
        generator=torch.Generator().manual_seed(args.seed),
    ).images
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(pictures, [info.label_names[label] for label in labels] if labels else None).save(path)


def save(args, pipeline: EDMPipeline, info: DataInfo, run: TrainingRun) -> None:
    cast = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}[args.save_precision]
    getattr(pipeline.unet, cast)()
    pipeline.save_pretrained(run.output_dir)
    labels = "class_labels=[1], " if pipeline.unet.null_label is not None else ""
    usage = (
        "from diffusers_fastdiff import EDMPipeline\n\n"
        f'pipe = EDMPipeline.from_pretrained("{args.hub_model_id or run.output_dir}")\n'
        f"image = pipe({labels}num_inference_steps=35).images[0]"
    )
    formulation = args.precondition.upper() + ("-FDM" if args.fdm else "")
    facts = {
        "data": args.dataset_name or args.train_data_dir or "scikit-learn digits",
        "resolution": f"{info.resolution} x {info.resolution} x {info.channels}",
        "formulation": formulation + (f", multiplier {args.multiplier:g}" if args.fdm else ""),
        "parameters": f"{pipeline.unet.num_parameters():,}",
        "steps": args.max_train_steps,
        "batch": run.batch_size,
        "images seen": f"{args.max_train_steps * run.batch_size:,}",
        "seed": args.seed,
    }
    description = f"A U-Net in the {formulation} formulation, for `EDMPipeline`."
    write_model_card(run.output_dir, run.output_dir.name, description, usage, facts, tags=["edm", "fdm", args.precondition])
    if args.push_to_hub:
        print(push_folder(run.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
