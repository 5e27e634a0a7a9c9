"""Learn a few-step solver for a model you have (AMED, arXiv 2312.00094, and learned linear multistep).

    accelerate launch examples/train_amed.py                                    # AMED for the embedded digits, minutes
    accelerate launch examples/train_amed.py --student lms --nfe 5              # the strongest one
    accelerate launch examples/train_amed.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --student ipndm --teacher ipndm --nfe 5 --guidance_scale 7.5 --prompts_dataset ... --mixed_precision fp16

Writes an `AMEDScheduler` for `from_pretrained`, pictures of teacher, learned and plain solver, and their errors.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from diffusers_fastdiff import AMEDPredictor, AMEDScheduler
from diffusers_fastdiff.errors import require
from diffusers_fastdiff.models.amed_predictor import FEATURE_SIZE
from diffusers_fastdiff.numerics.sigma_grids import check_grid
from diffusers_fastdiff.numerics.solver_methods import AMEDCoefficients, Solver
from diffusers_fastdiff.numerics.solvers import solve
from diffusers_fastdiff.pictures import labelled_grid, to_pil
from diffusers_fastdiff.pretrained import open_pipeline
from diffusers_fastdiff.schedulers.scheduling_amed import STUDENTS, constant_coefficients, sample_shape
from diffusers_fastdiff.training.arguments import add_optimization_arguments, add_run_arguments, training_parser
from diffusers_fastdiff.training.distillation import refine_grid, student_intervals, teacher_states
from diffusers_fastdiff.training.linear_distillation import (
    INGREDIENTS,
    LearnableLinearSolver,
    best_range,
    follow_linear,
)
from diffusers_fastdiff.training.model_card import launch_command, push_folder, write_model_card
from diffusers_fastdiff.training.pipeline_denoiser import PipelineDenoiser, search_pipeline_grid
from diffusers_fastdiff.training.randomness import BatchRandom, derive_seed
from diffusers_fastdiff.training.run import TrainingRun, check_flags, start_processes
from diffusers_fastdiff.training.teacher_data import TeacherData, make_teacher_data, teacher_grid

TEACHERS = ("heun", "dpm2", "dpmpp", "euler", "ipndm")
LINEAR_DEFAULTS = {
    "learning_rate": 4e-2, "train_batch_size": 96, "max_train_steps": 300, "lr_scheduler": "cosine", "lr_warmup_steps": 10,
    "adam_beta2": 0.99,  # the first gradients are large; a longer memory of them would stall the rest of a short run
}  # fmt: skip
AMED_DEFAULTS = {"learning_rate": 5e-3, "train_batch_size": 64, "max_train_steps": 160, "lr_scheduler": "constant"}


def parse_args() -> argparse.Namespace:
    parser = training_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", default="digits-dit", help="embedded name, folder or Hub name")
    group.add_argument("--revision", help="of a model on the Hub")
    group.add_argument("--guidance_scale", type=float, default=1.0, help="the solver will fit this guidance; 1 for none")
    group.add_argument("--prompts_dataset", help="text-to-image: dataset of prompts, on the Hub or on disk")
    group.add_argument("--prompts_file", help="text-to-image: text file with one prompt in each line")
    group.add_argument("--prompts_split", default="train")
    group.add_argument("--prompt_column", default="text")
    group.add_argument("--negative_prompt", default="")

    group = parser.add_argument_group("student")
    group.add_argument("--student", choices=STUDENTS, default="amed")
    group.add_argument("--nfe", type=int, default=5, help="model evaluations for an image")
    group.add_argument(
        "--analytical_first_step", action=argparse.BooleanOptionalAction, help="AFS; by default on for odd --nfe (not lms)"
    )
    group.add_argument("--solver_order", type=int, default=2, help="ipndm: 1 to 4, dpmpp: 1 to 3; lms starts from dpmpp of it")
    group.add_argument("--predict_x0", action=argparse.BooleanOptionalAction, default=True, help="dpmpp in data prediction")
    group.add_argument("--lower_order_final", action=argparse.BooleanOptionalAction, default=True, help="dpmpp")
    group.add_argument("--scale_dir", type=float, default=0.01, help="half-width of the direction scale, 0 for none")
    group.add_argument("--scale_time", type=float, default=0.2, help="half-width of the time scale, 0 for none")
    group.add_argument(
        "--initialization", choices=["neutral", "published"], default="neutral", help="begin as the plain solver, or at random"
    )
    group.add_argument(
        "--objective", choices=["interval", "end"], default="interval",
        help="AMED: what is brought near the teacher: every interval by itself, as published, or the end of the run",
    )  # fmt: skip
    group.add_argument("--static", action="store_true", help="learn constants: the predictor sees nothing of the sample")
    group.add_argument("--export_static", action="store_true", help="also write mean constants of the predictor, to static/")
    group.add_argument("--ingredients", nargs="+", choices=INGREDIENTS, default=list(INGREDIENTS), help="lms: what is learned")

    group = parser.add_argument_group("grid and teacher")
    group.add_argument("--sigma_schedule", choices=["polynomial", "logsnr", "time_uniform", "discrete"], default="polynomial")
    group.add_argument("--rho", type=float, help="exponent of the grid; by default 7 for polynomial, 1 for the others")
    group.add_argument("--sigma_min", type=float, help="by default that of the model; lms searches it")
    group.add_argument("--sigma_max", type=float, help="by default that of the model; lms searches it")
    group.add_argument("--sigmas", type=float, nargs="+", help="a grid of your own, instead of the above")
    group.add_argument("--search_grid", action="store_true", help="choose the grid by GITS (arXiv 2405.11326)")
    group.add_argument("--teacher", choices=TEACHERS, help="by default heun; dpmpp for lms")
    group.add_argument("--teacher_order", type=int, help="by default 4 for ipndm, 2 for dpmpp")
    group.add_argument("--teacher_points", type=int, default=1, help="points the teacher has inside each interval")
    group.add_argument("--teacher_evaluations", type=int, default=100, help="lms: evaluations of the teacher")
    group.add_argument("--num_trajectories", type=int, default=3072, help="lms: teacher trajectories to learn from")
    group.add_argument("--teacher_dir", help="lms: where trajectories are kept, to share them; by default inside output_dir")
    group.add_argument("--held_out", type=int, default=256, help="trajectories to report errors on")

    add_optimization_arguments(parser, use_ema=False)
    add_run_arguments(parser, output_dir="amed-solver")
    student = parser.parse_known_args()[0].student
    defaults = LINEAR_DEFAULTS if student == "lms" else AMED_DEFAULTS
    parser.set_defaults(**defaults, logging_steps=10, checkpointing_steps=50, validation_steps=0)
    parser.set_defaults(teacher="dpmpp" if student == "lms" else "heun", num_validation_images=20, dataloader_num_workers=0)
    args = parser.parse_args()
    if args.analytical_first_step is None:
        args.analytical_first_step = student != "lms" and args.nfe % 2 == 1
    if args.teacher_order is None:
        args.teacher_order = {"ipndm": 4, "dpmpp": 2}.get(args.teacher, 1)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    for name in ("nfe", "teacher_evaluations", "num_trajectories", "held_out", "num_validation_images"):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    if args.teacher_points < 0:
        raise ValueError(f"`--teacher_points` must not be negative, got {args.teacher_points}.")
    if args.student == "lms":
        if args.analytical_first_step or args.search_grid or args.static:
            raise ValueError("`--student lms` has no use for `--analytical_first_step`, `--search_grid` and `--static`.")
    elif (args.nfe + args.analytical_first_step) % 2:
        other = "--no-analytical_first_step" if args.analytical_first_step else "--analytical_first_step"
        raise ValueError(f"`--nfe` {args.nfe}: every interval has two evaluations; use {other} or another number.")
    for name in ("scale_dir", "scale_time"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must lie in [0, 1), got {getattr(args, name)}.")
    if args.sigmas is not None:
        check_grid(args.sigmas, "--sigmas")
    Solver(args.teacher, args.teacher_order)
    check_flags(args)


def read_prompts(args: argparse.Namespace) -> list[str] | None:
    if args.prompts_file is not None:
        return [line.strip() for line in Path(args.prompts_file).read_text().splitlines() if line.strip()]
    if args.prompts_dataset is None:
        return None
    datasets = require("datasets", "train")
    data = datasets.load_dataset(args.prompts_dataset, split=args.prompts_split)
    if args.prompt_column not in data.column_names:
        raise ValueError(f"`--prompt_column` {args.prompt_column!r} is not among {data.column_names}.")
    return list(data[args.prompt_column])


# -- AMED -----------------------------------------------------------------------------------------------------------------


class AMEDTask:
    """Student and teacher on one grid."""

    def __init__(self, args: argparse.Namespace, pipe, scheduler: AMEDScheduler, denoiser: PipelineDenoiser):
        self.args, self.denoiser, self.student = args, denoiser, scheduler.solver
        self.skips = args.analytical_first_step
        self.teacher = Solver(args.teacher, args.teacher_order)
        self.grid = args.sigmas or scheduler.interval_grid(args.nfe)
        if args.search_grid:
            self.grid = search_pipeline_grid(denoiser, self.grid, len(self.grid), seed=args.seed)
        intervals = (args.nfe + self.skips) // 2
        if len(self.grid) != intervals + 1 or self.grid[-1] <= 0:
            raise ValueError(f"The grid for {args.nfe} evaluations must have {intervals + 1} positive levels, got {self.grid}.")
        self.stride = args.teacher_points + 1
        self.teacher_sigmas = refine_grid(self.grid, args.teacher_points)

    def trajectory(self, choice: torch.Tensor, noise: torch.Tensor) -> tuple[Callable, torch.Tensor, list[torch.Tensor]]:
        """Denoiser, start and what the teacher reaches at the end of every interval."""
        denoise = self.denoiser.bind(self.denoiser.conditions(choice))
        start = self.denoiser.start(noise, self.grid[0])
        return denoise, start, teacher_states(denoise, start, self.teacher_sigmas, self.teacher, self.stride)

    def coefficients(self, predictor: torch.nn.Module, batch_size: int) -> Callable[[int], AMEDCoefficients]:
        """Coefficients of an interval, after its first evaluation."""

        def of(interval: int) -> AMEDCoefficients:
            if self.args.static or (interval == 0 and self.skips):
                features = torch.zeros(batch_size, FEATURE_SIZE, FEATURE_SIZE, device=self.denoiser.network.device)
            else:
                features = self.denoiser.features(batch_size)
            return predictor(features, self.grid[interval], self.grid[interval + 1])

        return of

    @torch.no_grad()
    def ends(self, predictor: AMEDPredictor | None, choice: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where teacher, learned and plain solver end, in batches."""
        ends: dict[str, list[torch.Tensor]] = {"teacher": [], "learned": [], "plain": []}
        for rows in torch.arange(len(noise)).split(self.args.train_batch_size):
            denoise, start, states = self.trajectory(choice[rows], noise[rows])
            ends["teacher"].append(states[-1])
            learned = self.coefficients(predictor, len(rows))
            for name, coefficients in (("learned", learned), ("plain", [AMEDCoefficients()] * (len(self.grid) - 1))):
                ends[name].append(solve(denoise, start, self.grid, self.student, coefficients, self.skips))
        return {name: torch.cat(parts) for name, parts in ends.items()}


def learn_amed(args: argparse.Namespace, pipe, denoiser: PipelineDenoiser, state: PartialState):
    """A predictor of the coefficients, or constants."""
    options = {
        "student": args.student, "solver_order": args.solver_order, "data_prediction": args.predict_x0,
        "lower_order_final": args.lower_order_final, "analytical_first_step": args.analytical_first_step,
    }  # fmt: skip
    grid = {name: getattr(args, name) for name in ("sigma_schedule", "rho", "sigma_min", "sigma_max")}
    task = AMEDTask(args, pipe, AMEDScheduler.from_config(pipe.scheduler.config, **options, **grid), denoiser)
    denoiser.watch_bottleneck()
    predictor = AMEDPredictor(scale_dir=args.scale_dir, scale_time=args.scale_time)
    if args.initialization == "neutral":
        predictor.initialize_neutral()
    run = TrainingRun(args, predictor)
    for step in run.steps():
        (by_interval if args.objective == "interval" else by_end)(task, run, step)

    with run.averaged_weights():
        ends = task.ends(predictor, *held_out(args, denoiser))
        config = {"sigmas": task.grid, "sigma_schedule": None, "rho": None, "sigma_min": None, "sigma_max": None, **options}
        fitted = fitted_to(args, pipe, denoiser)
        make = lambda **more: AMEDScheduler.from_config(pipe.scheduler.config, **config, fitted_to=fitted, **more)  # noqa: E731
        if args.static:
            scheduler = make(coefficients=as_lists(constant_coefficients(predictor, task.grid)))
        else:
            scheduler = make(mode="attached")
            scheduler.predictor = predictor.requires_grad_(False).eval()
            if args.export_static and state.is_main_process:
                constants = mean_coefficients(task, predictor, *held_out(args, denoiser))
                make(coefficients=constants).save_pretrained(run.output_dir / "static")
    return scheduler, run, ends


def by_interval(task: AMEDTask, run: TrainingRun, step: int) -> None:
    """As published: an optimisation step for each interval, on its squared error to the teacher."""
    rounds = []
    for _, random in run.micro_batches(step):
        choice, noise = task.denoiser.draw(random), random.normal(*task.denoiser.sample_shape)
        denoise, start, targets = task.trajectory(choice, noise)
        coefficients = task.coefficients(run.model, len(noise))
        rounds.append(student_intervals(denoise, start, task.grid, task.student, coefficients, targets, task.skips))
    for interval in range(len(task.grid) - 1):
        for number, results in enumerate(rounds):
            with run.gradient_round(number):
                run.backward(next(results).squared_error.mean())
        keep_numbers(run.bare_model)
        if interval < len(task.grid) - 2:
            run.take_step()
    run.update(step)


def by_end(task: AMEDTask, run: TrainingRun, step: int) -> None:
    """One optimisation step on the squared error of the end point, through all intervals."""
    for _, random in run.micro_batches(step):
        choice, noise = task.denoiser.draw(random), random.normal(*task.denoiser.sample_shape)
        denoise, start, targets = task.trajectory(choice, noise)
        coefficients = task.coefficients(run.model, len(noise))
        end = solve(denoise, start, task.grid, task.student, coefficients, task.skips)
        run.backward((end - targets[-1]).square().mean())
    keep_numbers(run.bare_model)
    run.update(step)


def keep_numbers(model: torch.nn.Module) -> None:
    """Zero what is not a number in the gradients, as published."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.nan_to_num_()


def as_lists(coefficients: list[AMEDCoefficients]) -> list[list[float]]:
    return [[float(value) for value in interval] for interval in coefficients]


@torch.no_grad()
def mean_coefficients(task: AMEDTask, predictor: AMEDPredictor, choice: torch.Tensor, noise: torch.Tensor) -> list[list[float]]:
    """The predictor's coefficients averaged over samples: constants for the static mode."""
    seen: dict[int, list[list[float]]] = {}
    for rows in torch.arange(len(noise)).split(task.args.train_batch_size):
        learned = task.coefficients(predictor, len(rows))

        def remember(interval: int, learned=learned) -> AMEDCoefficients:
            found = learned(interval)
            means = [float(v.mean()) if isinstance(v, torch.Tensor) else v for v in found]
            seen.setdefault(interval, []).append(means)
            return found

        denoise = task.denoiser.bind(task.denoiser.conditions(choice[rows]))
        solve(denoise, task.denoiser.start(noise[rows], task.grid[0]), task.grid, task.student, remember, task.skips)
    return [torch.tensor(seen[interval]).mean(0).tolist() for interval in range(len(task.grid) - 1)]


# -- Learned linear multistep ---------------------------------------------------------------------------------------------


def learn_linear(args: argparse.Namespace, pipe, denoiser: PipelineDenoiser, state: PartialState):
    """All numbers of the solver at once, by the squared error of its end points."""
    device, teacher = denoiser.network.device, Solver(args.teacher, args.teacher_order)
    sigmas, teacher_dir = (
        teacher_grid(denoiser, args.teacher_evaluations),
        Path(args.teacher_dir or f"{args.output_dir}/teacher"),
    )
    settings = {
        "model": args.pretrained_model_name_or_path, "revision": args.revision, "guidance_scale": args.guidance_scale,
        "teacher": [args.teacher, args.teacher_order], "batch_size": args.train_batch_size,
    }  # fmt: skip

    def pairs(name: str, count: int) -> TeacherData:
        seed = derive_seed(args.seed, name)
        return make_teacher_data(
            teacher_dir / name, denoiser, teacher, sigmas, count, args.train_batch_size, seed, settings, state
        )

    data, test = pairs("train", args.num_trajectories), pairs("held_out", args.held_out)
    few = {key: values[: args.held_out].to(device) for key, values in data.tensors.items()}
    base = Solver("dpmpp", args.solver_order)
    if args.sigmas is not None:
        start, error = [*args.sigmas, 0.0] if args.sigmas[-1] > 0 else args.sigmas, None
    else:
        start, error = best_range(denoiser, base, args.nfe, few["noise"], few["choice"], few["end"], args.train_batch_size)
        if state.is_main_process:
            print(f"Starting from DPM-Solver++({base.order}) on {start[0]:.4g} .. {start[-2]:.4g}: error {error:.4f}.")
    if len(start) != args.nfe + 1:
        raise ValueError(f"`--sigmas` for {args.nfe} evaluations must have as many positive levels, got {start[:-1]}.")
    solver = LearnableLinearSolver(base, start, tuple(args.ingredients))
    plain = LearnableLinearSolver(base, start).to(device)
    run = TrainingRun(args, solver, data)
    for step in run.steps():
        for batch, _ in run.micro_batches(step):
            conditions = denoiser.conditions(batch["choice"])
            end = follow_linear(denoiser, run.model(), batch["noise"], conditions, args.gradient_checkpointing)
            run.backward((end - batch["end"]).square().mean())
        run.update(step)

    with run.averaged_weights():
        noise, choice, target = (test.tensors[key].to(device) for key in ("noise", "choice", "end"))
        ends = {"teacher": target}
        for name, one in (("learned", solver), ("plain", plain)):
            numbers = one()
            parts = torch.arange(len(noise)).split(args.train_batch_size)
            ends[name] = torch.cat(
                [follow_linear(denoiser, numbers, noise[rows], denoiser.conditions(choice[rows])) for rows in parts]
            )
        scheduler = AMEDScheduler.from_config(
            pipe.scheduler.config,
            student="lms",
            linear_solver=solver.export().to_dict(),
            fitted_to=fitted_to(args, pipe, denoiser),
        )
    return scheduler, run, ends


# -- Results --------------------------------------------------------------------------------------------------------------


def held_out(args: argparse.Namespace, denoiser: PipelineDenoiser) -> tuple[torch.Tensor, torch.Tensor]:
    """Choice of conditions and noise that training never sees."""
    count = args.held_out
    random = BatchRandom(derive_seed(args.seed, "held out"), 0, count, 0, count, denoiser.network.device)
    return denoiser.draw(random), random.normal(*denoiser.sample_shape)


def fitted_to(args: argparse.Namespace, pipe, denoiser: PipelineDenoiser) -> dict:
    return {
        "num_inference_steps": args.nfe,
        "guidance_scale": args.guidance_scale,
        "model_class": type(denoiser.network).__name__,
        "sample_shape": sample_shape(denoiser.network),
        "model_id": args.pretrained_model_name_or_path,
        "model_revision": args.revision,
        "teacher": f"{args.teacher} of order {args.teacher_order}",
    }


def draw_pictures(args: argparse.Namespace, pipe, ends: dict[str, torch.Tensor], path: Path) -> None:
    """Rows of the same samples by teacher, learned and plain solver."""
    count = min(args.num_validation_images, len(ends["teacher"]))
    pictures, captions = [], []
    for name, latents in ends.items():
        latents = latents[:count].to(getattr(pipe, "vae", None).dtype if getattr(pipe, "vae", None) else torch.float32)
        if getattr(pipe, "vae", None) is not None:
            latents = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        pictures += to_pil(latents)
        captions += [name] * count
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(pictures, captions, columns=count).save(path)


def save(args: argparse.Namespace, pipe, scheduler: AMEDScheduler, run: TrainingRun, ends: dict[str, torch.Tensor]) -> None:
    errors = {name: float((ends[name] - ends["teacher"]).square().mean().sqrt()) for name in ("learned", "plain")}
    report = {
        "held_out": len(ends["teacher"]),
        "error to the teacher": errors,
        "steps": args.max_train_steps,
        "command": launch_command(),
    }
    (run.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    scheduler.save_pretrained(run.output_dir)
    draw_pictures(args, pipe, ends, run.output_dir / "samples" / "teacher-learned-plain.png")
    attach = "AMEDScheduler.from_pretrained({0!r}).attach(pipe)" if scheduler.config.mode == "attached" else (
        "pipe.scheduler = AMEDScheduler.from_pretrained({0!r})"
    )  # fmt: skip
    usage = (
        "from diffusers_fastdiff import AMEDScheduler\n\n"
        + attach.format(args.hub_model_id or str(run.output_dir))
        + f"\nimages = pipe(..., guidance_scale={args.guidance_scale}, num_inference_steps={args.nfe}).images"
    )
    facts = {
        "model": args.pretrained_model_name_or_path, "student": args.student, "evaluations": args.nfe,
        "guidance": args.guidance_scale, "teacher": args.teacher, "seed": args.seed,
        "error to the teacher": f"{errors['learned']:.4f} (plain solver: {errors['plain']:.4f})",
    }  # fmt: skip
    description = "A solver with learned coefficients for one model and number of evaluations."
    write_model_card(run.output_dir, run.output_dir.name, description, usage, facts, tags=["amed", "scheduler"])
    print(f"Error to the teacher {errors['learned']:.4f}, plain solver {errors['plain']:.4f}: {run.output_dir}")
    if args.push_to_hub:
        print(push_folder(run.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo))


def main() -> None:
    args = parse_args()
    state = start_processes()
    set_seed(args.seed)
    pipe = open_pipeline(args.pretrained_model_name_or_path, revision=args.revision)
    if args.mixed_precision in ("fp16", "bf16"):
        pipe.to(dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision])
    pipe.to(state.device)
    plain = AMEDScheduler.from_config(pipe.scheduler.config)
    denoiser = PipelineDenoiser(pipe, plain.noise_model, args.guidance_scale, read_prompts(args), args.negative_prompt)
    learn = learn_linear if args.student == "lms" else learn_amed
    scheduler, run, ends = learn(args, pipe, denoiser, state)
    if state.is_main_process:
        with torch.no_grad():
            save(args, pipe, scheduler, run, ends)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, TypeError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
