"""Flags that several training scripts share, named as in the scripts of diffusers."""

import argparse

from diffusers.optimization import SchedulerType


def training_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows every default."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data (default: the digits of scikit-learn)")
    group.add_argument("--dataset_name", help="dataset on the Hub or on disk")
    group.add_argument("--dataset_config_name", help="configuration of that dataset")
    group.add_argument("--dataset_split", default="train")
    group.add_argument("--train_data_dir", help="folder of images, one subfolder for each class or a metadata file")
    group.add_argument("--image_column", help="column of images; by default the first one")
    group.add_argument("--label_column", help="column of labels; by default the first one, if any")
    group.add_argument("--conditioning_column", help="column of vectors to condition on, instead of labels")
    group.add_argument("--unconditional", action="store_true", help="ignore labels: every label is 0")
    group.add_argument("--resolution", type=int, help="side of the images, in pixels; digits have 8")
    group.add_argument("--random_flip", action="store_true", help="mirror half of the images")
    group.add_argument("--dataloader_num_workers", type=int, default=0)
    group.add_argument("--vae", help="autoencoder for latent diffusion: a folder or Hub name of an AutoencoderKL")
    group.add_argument("--vae_subfolder", help="subfolder of the autoencoder")
    group.add_argument("--latents_dir", help="encode all images into this folder first, or read what is there")
    group.add_argument("--encode_batch_size", type=int, default=16)


def add_optimization_arguments(parser: argparse.ArgumentParser, **defaults) -> None:
    """`defaults` override those below, for the method at hand."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--train_batch_size", type=int, default=128, help="samples on each process at a time")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--max_train_steps", type=int, default=10_000)
    group.add_argument("--learning_rate", type=float, default=1e-4)
    group.add_argument("--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=0.0)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--max_grad_norm", type=float, default=0.0, help="0 for no clipping")
    group.add_argument("--use_ema", action=argparse.BooleanOptionalAction, default=True, help="average the weights")
    group.add_argument("--ema_decay", type=float, default=0.9999)
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="by default that of accelerate's config")
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)


def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default=output_dir)
    group.add_argument("--checkpointing_steps", type=int, default=1000, help="0 for no checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, default=2)
    group.add_argument("--resume_from_checkpoint", help="'latest', or a checkpoint of this output_dir")
    group.add_argument("--logging_steps", type=int, default=50)
    group.add_argument("--logging_dir", default="logs", help="for trackers, inside output_dir")
    group.add_argument("--report_to", help="tracker: tensorboard, wandb, ...; log.jsonl is always written")
    group.add_argument("--validation_steps", type=int, default=1000, help="steps between sample grids, 0 for none")
    group.add_argument("--num_validation_images", type=int, default=40)
    group.add_argument("--validation_guidance_scale", type=float, default=1.5)
    group.add_argument("--validation_num_inference_steps", type=int, default=20)
    group.add_argument("--save_precision", choices=["float32", "float16", "bfloat16"], default="float32")
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id", help="by default the name of output_dir")
    group.add_argument("--hub_token")
    group.add_argument("--hub_private_repo", action="store_true")
