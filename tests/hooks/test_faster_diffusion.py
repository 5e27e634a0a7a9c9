"""Encoder propagation in stock pipelines: what it computes, what it leaves alone, and that no run sees another one."""

import gc
import warnings

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_fastdiff import (
    AMEDPredictor,
    AMEDScheduler,
    EDMPipeline,
    EDMUNet2DModel,
    FasterDiffusionConfig,
    FDMEDMScheduler,
    FDMVEScheduler,
    FDMVPScheduler,
    FixedPointSamplingConfig,
    GDDIMScheduler,
    IPNDMMultistepScheduler,
    apply_faster_diffusion,
    apply_fixed_point_sampling,
    remove_faster_diffusion,
)
from diffusers_fastdiff.hooks.encoder_cut import EncoderCut, encoder_cut
from tests.hooks import tiny_pipelines as tiny
from tests.hooks.tiny_pipelines import PIPELINES, draw
from tests.models.tiny import fixed_point_dit

KEYS = FasterDiffusionConfig(key_steps=[0, 3, 5])
BATCHED = FasterDiffusionConfig(key_steps=[0, 3, 5], batched=True)
SERIAL_STEPS = ["key", "decode", "decode", "key", "decode", "key", "decode", "decode"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def attributes(pipe) -> dict:
    """Names of everything that lies on the modules and the scheduler of a pipeline."""
    modules = {(part, name): module for part, owner in pipe.components.items() if isinstance(owner, torch.nn.Module)
               for name, module in owner.named_modules()}  # fmt: skip
    modules |= {"scheduler": pipe.scheduler}
    return {key: (set(vars(module)), len(getattr(module, "_forward_hooks", ()))) for key, module in modules.items()}


@pytest.fixture(params=PIPELINES)
def pipe(request, tmp_path):
    return PIPELINES[request.param](tmp_path)


def edm_unet(**overrides) -> EDMUNet2DModel:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "model_channels": 8, "channel_mult": (1, 2), "attention_resolutions": (4,)}
    return EDMUNet2DModel(**sizes, layers_per_block=1, **overrides)


def loop(model, scheduler, steps: int = 8, extra: dict | None = None) -> torch.Tensor:
    """Sampling without a pipeline."""
    channels = model.config.in_channels
    sample = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = model(sample, timestep, **(extra or {})).sample[:, :channels]
            sample = scheduler.step(output, timestep, sample, generator=torch.Generator().manual_seed(1)).prev_sample
    return sample


# ---- neutral setting and removal -----------------------------------------------------------------------------------------


def test_all_key_is_plain_and_removal_leaves_nothing(pipe):
    plain, before = draw(pipe), attributes(pipe)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(every=1))
    assert torch.equal(draw(pipe), plain)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(every=3, batched=True, noise_injection=0.003))
    assert not torch.equal(draw(pipe), plain)
    remove_faster_diffusion(pipe)
    remove_faster_diffusion(pipe)
    assert torch.equal(draw(pipe), plain)
    assert attributes(pipe) == before


def test_batched_is_serial(pipe):
    hook = apply_faster_diffusion(pipe, KEYS)
    serial = draw(pipe)
    is_key = [step == "key" for step in hook.steps_computed]
    hook = apply_faster_diffusion(pipe, BATCHED)
    assert_close(draw(pipe), serial)
    assert hook.steps_computed == ["key" if key else "buffer" for key in is_key]
    two_steps = 2 * 4  # guidance doubles the two images
    hook = apply_faster_diffusion(pipe, FasterDiffusionConfig(key_steps=[0, 3, 5], batched=True, max_batch=two_steps))
    assert_close(draw(pipe), serial)
    assert {"decode", "buffer"} <= set(hook.steps_computed)


# ---- what is computed ----------------------------------------------------------------------------------------------------


class Replayed:
    """Encoder propagation once more, written with forward hooks: at a step that is not a key step, each module that hands
    something to the decoder answers with what it returned at the last key step."""

    def __init__(self, model, modules, keys):
        self.keys, self.step, self.stored = keys, -1, {}
        model.register_forward_pre_hook(self.count)
        for module in modules:
            module.register_forward_hook(self.answer)

    def count(self, module, arguments):
        self.step += 1

    def answer(self, module, arguments, output):
        if self.step in self.keys:
            self.stored[module] = output
        return self.stored[module]


def encoder(unet) -> list[torch.nn.Module]:
    return [unet.conv_in, *unet.down_blocks, unet.mid_block]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_decoder_gets_stored_features_and_current_conditions(name, tmp_path):
    pipe = PIPELINES[name](tmp_path)
    hook = apply_faster_diffusion(pipe, KEYS)
    actual = draw(pipe)
    assert hook.steps_computed == SERIAL_STEPS
    remove_faster_diffusion(pipe)
    Replayed(pipe.unet, encoder(pipe.unet), [0, 3, 5])
    assert torch.equal(draw(pipe), actual)


@pytest.mark.parametrize("make", [tiny.pixel_unet, edm_unet, lambda: tiny.pixel_unet(class_embed_type="timestep")])
@pytest.mark.parametrize("batched", [False, True])
def test_unets_without_text(make, batched):
    model, scheduler = make().eval(), tiny.scheduler()
    extra = {"class_labels": torch.tensor([3, 4])} if getattr(model, "class_embedding", None) is not None else {}
    apply_faster_diffusion(model, BATCHED if batched else KEYS, scheduler=scheduler)
    actual = loop(model, scheduler, extra=extra)
    remove_faster_diffusion(model)
    Replayed(model, encoder(model), [0, 3, 5])
    assert_close(actual, loop(model, scheduler, extra=extra))


def test_a_dit_of_other_depth_keeps_the_published_share():
    pipe = tiny.dit(num_layers=6)
    apply_faster_diffusion(pipe, KEYS)
    actual = draw(pipe)
    remove_faster_diffusion(pipe)
    Replayed(pipe.transformer, pipe.transformer.transformer_blocks[3:4], [0, 3, 5])  # 18/28 of 6 blocks are 4
    assert torch.equal(draw(pipe), actual)


def test_encoder_share():
    pipe = tiny.dit(num_layers=6)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(key_steps=[0, 3, 5], encoder_share=0.3))
    actual = draw(pipe)
    remove_faster_diffusion(pipe)
    Replayed(pipe.transformer, pipe.transformer.transformer_blocks[1:2], [0, 3, 5])
    assert torch.equal(draw(pipe), actual)


def test_the_encoder_does_not_compute_between_key_steps():
    pipe, computed = tiny.dit(num_layers=6), []
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn1.register_forward_hook(lambda *_, index=index: computed.append(index))
    apply_faster_diffusion(pipe, KEYS)
    draw(pipe)
    assert [computed.count(index) for index in range(6)] == [3, 3, 3, 3, 8, 8]


def test_controlnet_computes_at_key_steps_only(tmp_path):
    pipe, calls = tiny.controlled(tmp_path), []
    pipe.controlnet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    hook = apply_faster_diffusion(pipe, KEYS)
    for _ in range(2):
        draw(pipe)
    assert len(calls) == 6
    assert hook.controlnet_hook.num_calls == 3


def test_fixed_point_dit_iterates_at_key_steps_only():
    pipe = tiny.dit()
    pipe.transformer = fixed_point_dit(in_channels=1, out_channels=1).eval()
    plain, computed = draw(pipe), []
    pipe.transformer.transformer_blocks[1].merge_proj.register_forward_hook(lambda *_: computed.append(1))
    apply_faster_diffusion(pipe, FasterDiffusionConfig(every=1))
    assert torch.equal(draw(pipe), plain)
    assert len(computed) == 8 * 3
    apply_faster_diffusion(pipe, KEYS)
    draw(pipe)
    assert len(computed) == 8 * 3 + 3 * 3
    apply_fixed_point_sampling(pipe, FixedPointSamplingConfig(num_iterations=2))
    with pytest.raises(ValueError, match="apply_fixed_point_sampling"):
        draw(pipe)


@pytest.mark.parametrize(("propagation", "degree"), [("hold", 0), ("linear", 1), ("taylor", 2)])
@pytest.mark.parametrize("batched", [False, True])
def test_a_forecast_is_exact_for_polynomials(propagation, degree, batched):
    """A registered model whose encoder returns a polynomial of the step."""

    class Polynomial(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, sample, timestep):
            step = 7 - torch.as_tensor(timestep).double().expand(len(sample))[:, None]
            return (self.decoder(self.encoder(step**degree / 7)),)

    @encoder_cut.register
    def _(model: Polynomial, encoder_share: float | None = None) -> EncoderCut:
        return EncoderCut(skipped=(model.encoder,), resumed=model.decoder)

    scheduler, model = DDPMScheduler(), Polynomial().eval()
    scheduler.set_timesteps(timesteps=list(range(7, -1, -1)))
    scheduler.num_inference_steps = 8
    plain = [model(torch.zeros(2, 3), timestep)[0] for timestep in scheduler.timesteps]
    config = FasterDiffusionConfig(key_steps=[0, 1, 2, 5], propagation=propagation, batched=batched)
    hook = apply_faster_diffusion(model, config, scheduler=scheduler)
    for timestep, expected in zip(scheduler.timesteps, plain, strict=True):
        assert_close(model(torch.zeros(2, 3), timestep)[0], expected, 1e-12)
    assert hook.steps_computed.count("key") == 4


# ---- schedulers ----------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "ddpm": (DDPMScheduler, {}, 8),
    "dpmsolver++": (DPMSolverMultistepScheduler, {}, 8),
    "unipc": (UniPCMultistepScheduler, {}, 8),
    "pndm": (PNDMScheduler, {}, 6),
    "heun": (HeunDiscreteScheduler, {}, 5),
    "euler ancestral": (EulerAncestralDiscreteScheduler, {}, 8),
    "ipndm": (IPNDMMultistepScheduler, {}, 8),
    "amed": (AMEDScheduler, {}, 8),
    "gddim": (GDDIMScheduler, {"order": 2}, 8),
    "gddim pece": (GDDIMScheduler, {"order": 1, "corrector": "pece"}, 8),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_schedulers(name, guidance_scale, tmp_path):
    """Key steps count model calls, whatever a scheduler makes of them."""
    make, options, steps = SCHEDULERS[name]
    pipe = tiny.stable_diffusion(tmp_path)
    pipe.scheduler = make.from_config(pipe.scheduler.config, **options)
    options = {"steps": steps, "guidance_scale": guidance_scale}
    plain = draw(pipe, **options)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(every=1))
    assert torch.equal(draw(pipe, **options), plain)
    hook = apply_faster_diffusion(pipe, KEYS)
    serial = draw(pipe, **options)
    assert hook.steps_computed[:6] == SERIAL_STEPS[:6]
    assert len(hook.steps_computed) == len(pipe.scheduler.timesteps)
    assert torch.equal(draw(pipe, **options), serial)
    apply_faster_diffusion(pipe, BATCHED)
    assert_close(draw(pipe, **options), serial)
    remove_faster_diffusion(pipe)
    Replayed(pipe.unet, encoder(pipe.unet), [0, 3, 5])
    assert torch.equal(draw(pipe, **options), serial)


@pytest.mark.parametrize("scheduler", [FDMEDMScheduler, FDMVPScheduler, FDMVEScheduler])
def test_edm_pipeline(scheduler):
    pipe = EDMPipeline(edm_unet(num_classes=3).eval(), scheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {"class_labels": [0, 1], "guidance_scale": 2.0, "output_type": "latent"}
    plain = draw(pipe, 9, **options)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(every=1))
    assert torch.equal(draw(pipe, 9, **options), plain)
    hook = apply_faster_diffusion(pipe, KEYS)
    serial = draw(pipe, 9, **options)
    assert hook.steps_computed == [*SERIAL_STEPS, "decode"]
    apply_faster_diffusion(pipe, BATCHED)
    assert_close(draw(pipe, 9, **options), serial)
    remove_faster_diffusion(pipe)
    Replayed(pipe.unet, encoder(pipe.unet), [0, 3, 5])
    assert torch.equal(draw(pipe, 9, **options), serial)


def test_a_learned_solver_keeps_seeing_the_bottleneck():
    """The bottleneck of a DiT lies among the blocks that are skipped: the solver sees that of the last key step."""
    pipe = tiny.dit()
    torch.manual_seed(0)
    predictor = AMEDPredictor()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = AMEDScheduler(mode="attached")
    scheduler.predictor = predictor.eval()
    scheduler.attach(pipe)
    plain = draw(pipe)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(every=1))
    assert torch.equal(draw(pipe), plain)
    apply_faster_diffusion(pipe, KEYS)
    actual = draw(pipe)
    assert torch.equal(draw(pipe), actual)
    apply_faster_diffusion(pipe, BATCHED)
    with pytest.raises(ValueError, match="batched"):
        draw(pipe)
    remove_faster_diffusion(pipe)
    blocks = pipe.transformer.transformer_blocks
    scheduler.detach()
    Replayed(pipe.transformer, [blocks[2], blocks[3]], [0, 3, 5])  # the tap listens behind this
    scheduler.attach(pipe)
    assert_close(draw(pipe), actual)


# ---- one run after another -----------------------------------------------------------------------------------------------

RUNS = [
    {},
    {"labels": (3,), "guidance_scale": 1.0},
    {"labels": (4, 5, 6), "steps": 5},
    {"steps": 1},
    {"steps": 1},
    {"steps": 13},
]


@pytest.mark.parametrize("options", [{"every": 3}, {"every": 3, "batched": True}, {"every": 2, "propagation": "taylor"},
                                     {"every": 3, "noise_injection": 0.01, "noise_injection_below": 0.8}])  # fmt: skip
def test_runs_in_a_row_equal_fresh_ones(options):
    config = FasterDiffusionConfig(**options)
    fresh = []
    for run in RUNS:
        pipe = tiny.dit()
        apply_faster_diffusion(pipe, config)
        fresh.append(draw(pipe, **run))
    pipe = tiny.dit()
    hook = apply_faster_diffusion(pipe, config)
    for run, expected in [*zip(RUNS, fresh, strict=True), *zip(RUNS, fresh, strict=True)]:
        assert torch.equal(draw(pipe, **run), expected)
        assert hook.features.nbytes() == 0


def test_scheduler_and_image_size_may_change_between_runs(tmp_path):
    def change(pipe, scheduler, size):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        return draw(pipe, height=size, width=size)

    changes = [(DPMSolverMultistepScheduler, 16), (DDPMScheduler, 32), (GDDIMScheduler, 16)]
    fresh = []
    for scheduler, size in changes:
        pipe = tiny.stable_diffusion(tmp_path)
        apply_faster_diffusion(pipe, BATCHED)
        fresh.append(change(pipe, scheduler, size))
    pipe = tiny.stable_diffusion(tmp_path)
    apply_faster_diffusion(pipe, BATCHED)
    for (scheduler, size), expected in zip(changes, fresh, strict=True):
        assert torch.equal(change(pipe, scheduler, size), expected)


@pytest.mark.parametrize("config", [KEYS, BATCHED])
@pytest.mark.parametrize("failing_call", [1, 2, 4])
def test_an_exception_in_mid_run_leaves_the_next_run_correct(config, failing_call):
    pipe = tiny.dit()
    apply_faster_diffusion(pipe, config)
    expected, calls = draw(pipe), []

    def fail(*_):
        calls.append(1)
        if len(calls) == min(failing_call, 3):
            raise KeyboardInterrupt

    handle = pipe.transformer.proj_out_2.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe)
    handle.remove()
    assert torch.equal(draw(pipe), expected)


def test_an_interrupted_run_leaves_the_next_one_correct(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path)
    apply_faster_diffusion(pipe, BATCHED)
    expected = draw(pipe)

    def interrupt(pipe, step, timestep, values):
        pipe._interrupt = step == 1
        return values

    draw(pipe, callback_on_step_end=interrupt)
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("config", [KEYS, BATCHED])
def test_callbacks_may_switch_guidance_off_in_mid_run(config, tmp_path):
    """Half the batch is gone at step 2, which then has to be a key step."""

    def stop_guidance(pipe, step, timestep, values):
        if step == 1:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[1]
        return values

    options = {"callback_on_step_end": stop_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    pipe = tiny.stable_diffusion(tmp_path)
    hook = apply_faster_diffusion(pipe, config)
    actual = draw(pipe, **options)
    assert hook.steps_computed[2] == "key"
    remove_faster_diffusion(pipe)
    Replayed(pipe.unet, encoder(pipe.unet), [0, 2, 3, 5])
    assert_close(draw(pipe, **options), actual)


def test_changed_conditions_are_noticed_by_batched_decoding(tmp_path):
    def change(pipe, step, timestep, values):
        return {"prompt_embeds": values["prompt_embeds"] * 1.5} if step == 1 else values

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    pipe = tiny.stable_diffusion(tmp_path)
    apply_faster_diffusion(pipe, KEYS)
    serial = draw(pipe, **options)
    apply_faster_diffusion(pipe, BATCHED)
    assert_close(draw(pipe, **options), serial)


def test_a_training_step_between_runs_sees_and_leaves_nothing():
    pipe = tiny.dit()
    apply_faster_diffusion(pipe, KEYS)
    expected = draw(pipe)
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.tensor([3, 900]),
        "class_labels": torch.tensor([1, 2]),
    }
    pipe.transformer.train()
    torch.manual_seed(0)
    with_hook = pipe.transformer(**inputs).sample
    pipe.transformer.eval()
    assert torch.equal(draw(pipe), expected)
    remove_faster_diffusion(pipe)
    torch.manual_seed(0)
    assert torch.equal(pipe.transformer.train()(**inputs).sample, with_hook)


# ---- noise injection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [KEYS, BATCHED])
def test_noise_is_added_after_every_late_update(config):
    pipe, strength, below = tiny.dit(), 0.01, 0.5
    options = {"key_steps": config.key_steps, "noise_injection": strength, "noise_injection_below": below}
    apply_faster_diffusion(pipe, FasterDiffusionConfig(**options, batched=config.batched))
    actual = draw(pipe, guidance_scale=1.0)
    remove_faster_diffusion(pipe)
    model, scheduler = pipe.transformer, pipe.scheduler
    apply_faster_diffusion(model, KEYS, scheduler=scheduler)
    initial = sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(8)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            sample = scheduler.step(
                model(sample, timestep.expand(2), torch.tensor([1, 2])).sample, timestep, sample
            ).prev_sample
            sample = sample + strength * initial * (timestep < 500)
    assert_close(actual, sample)


def test_noise_injection_follows_the_scheduler_and_refuses_correctors(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path)
    config = FasterDiffusionConfig(every=1, noise_injection=0.01, noise_injection_below=0.5)
    first, plain = pipe.scheduler, draw(pipe)
    apply_faster_diffusion(pipe, config)
    assert not torch.equal(draw(pipe), plain)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(first.config)
    draw(pipe)
    assert "step" not in vars(first)
    remove_faster_diffusion(pipe)
    assert "step" not in vars(pipe.scheduler)
    pipe.scheduler = UniPCMultistepScheduler.from_config(first.config)
    with pytest.raises(ValueError, match="noise_injection"):
        apply_faster_diffusion(pipe, config)


# ---- precision, compilation, offloading, memory --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("propagation", ["hold", "linear"])
def test_half_precision(dtype, propagation, tmp_path):
    pipe = tiny.stable_diffusion(tmp_path).to(dtype)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(every=2, propagation=propagation, batched=True))
    latents = draw(pipe)
    assert latents.dtype == dtype
    assert latents.isfinite().all()


@pytest.mark.slow
def test_compiled_models():
    """The hook stays outside of the compiled code, whichever came first."""
    pipe = tiny.dit(num_layers=2)
    apply_faster_diffusion(pipe, KEYS)
    expected = draw(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert_close(draw(pipe), expected)
    pipe.transformer = pipe.transformer._orig_mod
    remove_faster_diffusion(pipe)
    pipe.transformer.compile(backend="eager")
    hook = apply_faster_diffusion(pipe, KEYS)
    assert_close(draw(pipe), expected)
    assert hook.steps_computed == SERIAL_STEPS


def test_offloading_before_and_after():
    """What accelerate does to a module for CPU offloading, without an accelerator."""
    hooks = pytest.importorskip("accelerate.hooks")
    pipe = tiny.dit()
    apply_faster_diffusion(pipe, KEYS)
    expected, plain_forward = draw(pipe), type(pipe.transformer).forward
    remove_faster_diffusion(pipe)
    hooks.add_hook_to_module(pipe.transformer, hooks.ModelHook())
    hook = apply_faster_diffusion(pipe, KEYS)
    assert torch.equal(draw(pipe), expected)
    hooks.remove_hook_from_module(pipe.transformer)
    hooks.add_hook_to_module(pipe.transformer, hooks.ModelHook())
    assert torch.equal(draw(pipe), expected)
    assert hook.steps_computed == SERIAL_STEPS
    remove_faster_diffusion(pipe)
    hooks.remove_hook_from_module(pipe.transformer)
    assert pipe.transformer.forward.__func__ is plain_forward


def live_bytes() -> int:
    """Memory of all tensors, each storage once; fake ones, which compilation leaves behind, have none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("propagation", ["hold", "taylor"])
@pytest.mark.parametrize("name", ["dit", "controlnet"])
def test_the_extra_memory_is_the_stored_features(name, propagation, tmp_path):
    """Also with a ControlNet, whose residuals the pipeline itself keeps until the next step."""
    pipe, calls, measured = PIPELINES[name](tmp_path), [], {}
    model = pipe.transformer if name == "dit" else pipe.unet

    def measure(*_):
        if len(calls) % 8 in (5, 7):  # step 5 propagates from 4, 2 and 0; step 7 is the last
            measured[len(calls)] = live_bytes()
        calls.append(1)

    gc.collect()
    model.register_forward_hook(measure)
    draw(pipe)
    hook = apply_faster_diffusion(pipe, FasterDiffusionConfig(every=2, propagation=propagation))
    draw(pipe)
    assert measured[13] - measured[5] == hook.feature_bytes == hook.summary().feature_bytes
    assert measured[15] == measured[7]


# ---- refusals and summary ------------------------------------------------------------------------------------------------


def test_unknown_models_are_refused():
    with pytest.raises(TypeError, match=r"Linear.*register"):
        apply_faster_diffusion(torch.nn.Linear(1, 1), KEYS, scheduler=tiny.scheduler())
    with pytest.raises(TypeError, match="scheduler"):
        apply_faster_diffusion(tiny.dit().transformer, KEYS)
    with pytest.raises(TypeError, match="scheduler"):
        apply_faster_diffusion(tiny.dit(), KEYS, scheduler=tiny.scheduler())
    with pytest.raises(TypeError, match="denoiser"):
        apply_faster_diffusion(object(), KEYS)


def test_models_without_a_decoder_are_refused():
    for options, word in [({"num_post_layers": 0}, "num_post_layers"), ({"pre_post_timestep_conditioning": False}, "timestep")]:
        with pytest.raises(ValueError, match=word):
            apply_faster_diffusion(fixed_point_dit(**options), KEYS, scheduler=tiny.scheduler())
    with pytest.raises(ValueError, match="1 block"):
        apply_faster_diffusion(tiny.dit(num_layers=1), KEYS)
    config = FasterDiffusionConfig(every=2, encoder_share=0.5)
    with pytest.raises(ValueError, match="encoder_share"):
        apply_faster_diffusion(tiny.pixel_unet(), config, scheduler=tiny.scheduler())


def test_key_steps_that_do_not_fit_the_run_are_refused_before_it_begins():
    pipe = tiny.dit()
    apply_faster_diffusion(pipe, FasterDiffusionConfig(key_steps=[0, 9]))
    with pytest.raises(ValueError, match="Key step 9"):
        draw(pipe)


def test_batched_needs_the_timesteps_of_the_scheduler():
    pipe = tiny.dit()
    apply_faster_diffusion(pipe, BATCHED)
    pipe.scheduler.set_timesteps(8)
    with pytest.raises(ValueError, match="batched"):
        pipe.transformer(torch.zeros(2, 1, 8, 8), torch.tensor([5, 7]), torch.tensor([1, 2]))


def test_a_schedule_that_saves_nothing_says_so(monkeypatch):
    messages, pipe = [], tiny.dit()
    monkeypatch.setattr("diffusers_fastdiff.hooks.faster_diffusion.logger.warning", messages.append)
    apply_faster_diffusion(pipe, FasterDiffusionConfig(key_steps="dit-250"))
    draw(pipe)
    assert "nothing is saved" in messages[0]


def test_summary_before_and_after_a_run():
    pipe = tiny.dit(num_layers=28)
    hook = apply_faster_diffusion(pipe, FasterDiffusionConfig(key_steps="dit-250"))
    with pytest.raises(ValueError, match="num_steps"):
        hook.summary()
    rows = torch.empty(4, device="meta")
    inputs = {"hidden_states": torch.empty(4, 1, 8, 8, device="meta"), "timestep": rows, "class_labels": rows.long()}
    summary = hook.summary(250, inputs)
    assert len(summary.key_steps) == 113
    assert summary.encoder_modules == tuple(f"transformer_blocks.{index}" for index in range(18))
    assert 0.62 < summary.encoder_share < 18 / 28
    assert summary.compute_share == pytest.approx(1 - (137 / 250) * summary.encoder_share)
    assert "113 of 250: 0, 6-9" in str(summary)
    before = draw(pipe)
    assert hook.summary().num_steps == 8
    assert torch.equal(draw(pipe), before)


def test_the_models_own_switch():
    pipe = tiny.dit()
    apply_faster_diffusion(pipe, KEYS)
    expected = draw(pipe)
    pipe.transformer.disable_faster_diffusion()
    plain = draw(pipe)
    pipe.transformer.enable_faster_diffusion(pipe, key_steps=[0, 3, 5])
    assert torch.equal(draw(pipe), expected)
    pipe.transformer.disable_faster_diffusion()
    assert torch.equal(draw(pipe), plain)
    with pytest.raises(ValueError, match="config"):
        pipe.transformer.enable_faster_diffusion(pipe, KEYS, every=2)
