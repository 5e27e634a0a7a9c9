"""Class labels with a null label, as classifier-free guidance needs them."""

import torch

DIT_PIPELINE_NULL_LABEL = 1000
"""The label that `DiTPipeline` writes for "no class", whatever the number of classes."""


def prepare_labels(class_labels: torch.Tensor, num_classes: int, batch_size: int, dropout_prob: float = 0.0) -> torch.Tensor:
    """Labels for an embedding table with `num_classes + 1` rows, the last one for "no class".

    Args:
        class_labels: (B,) integers in 0 .. num_classes; in models with fewer than 1000 classes 1000 also means "no class".
        num_classes: classes of the model.
        batch_size: B.
        dropout_prob: chance that a sample loses its label, drawn once per sample from the global generator.

    Raises:
        ValueError: if the number of labels or a label does not fit. On an accelerator labels are not looked at, because that
            would wait for the device; there the embedding itself fails.
    """
    labels = class_labels.reshape(-1)
    if labels.shape[0] != batch_size:
        raise ValueError(f"`class_labels` must hold {batch_size} labels, got {labels.shape[0]}.")
    if num_classes < DIT_PIPELINE_NULL_LABEL:
        labels = labels.masked_fill(labels == DIT_PIPELINE_NULL_LABEL, num_classes)
    is_readable = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_readable and bool(((labels < 0) | (labels > num_classes)).any()):
        raise ValueError(
            f"`class_labels` must lie in 0 .. {num_classes} (the last one means no label), got {class_labels.tolist()}."
        )
    if dropout_prob > 0:
        dropped = torch.rand(batch_size, device=labels.device) < dropout_prob
        labels = labels.masked_fill(dropped, num_classes)
    return labels
