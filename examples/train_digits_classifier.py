"""Train the classifier that measures digits: `python examples/train_digits_classifier.py`, half a minute on a laptop."""

import argparse

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffusers_fastdiff.evaluation.digits import DigitsClassifier
from diffusers_fastdiff.training.data import DigitsDataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", default="digits_classifier.safetensors")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
data = DigitsDataset()
order = torch.randperm(len(data))
train, held_out = order[360:], order[:360]
model = DigitsClassifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
for _ in range(args.epochs):
    for rows in train[torch.randperm(len(train))].split(64):
        images = data.images[rows]
        images = images + 0.1 * torch.randn_like(images)  # samples are not on the 17 grey levels of the data
        loss = F.cross_entropy(model(images), data.labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    schedule.step()

accuracy = (model.eval()(data.images[held_out]).argmax(1) == data.labels[held_out]).float().mean()
print(f"held-out accuracy {accuracy:.4f} on {len(held_out)} digits")
save_file({key: value.half() for key, value in model.state_dict().items()}, args.output)
