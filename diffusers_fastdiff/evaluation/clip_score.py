"""CLIP score: how well images fit their prompts. Hessel et al., arXiv 2104.08718, without its factor 2.5."""

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..errors import require
from .images import ImageSet


@torch.no_grad()
def clip_scores(
    images: ImageSet, prompts: list[str], model: str, batch_size: int = 32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """`100 max(cos(image, prompt), 0)` for each image, float64 (n,); their mean is the CLIP score.

    Args:
        model: folder or Hub name of a CLIP model; only safetensors are read.
        prompts: one for each image; they are cut at the length that the model reads.

    Raises:
        ValueError: if there is not one prompt for each image.
    """
    if len(prompts) != len(images):
        raise ValueError(f"There must be one prompt for each image: {len(images)} images, {len(prompts)} prompts.")
    transformers = require("transformers", "eval")
    clip = transformers.CLIPModel.from_pretrained(model, use_safetensors=True).to(device).eval()
    # from transformers 5 on, the processor without torchvision has a name of its own
    processor_class = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = processor_class.from_pretrained(model)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(model)
    length = clip.config.text_config.max_position_embeddings
    scores = []
    for start in tqdm(range(0, len(images), batch_size), "CLIP score"):
        stop = min(start + batch_size, len(images))
        pictures = [_picture(images[index]) for index in range(start, stop)]
        pixels = processor(pictures, return_tensors="pt")["pixel_values"].to(device)
        text = tokenizer(prompts[start:stop], padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        output = clip(pixel_values=pixels, **text)  # its embeddings have length 1
        scores.append(100 * (output.image_embeds.double() * output.text_embeds.double()).sum(dim=1).clamp_min(0).cpu())
    return torch.cat(scores)


def _picture(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()))
