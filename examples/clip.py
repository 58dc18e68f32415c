"""CLIP: images and texts drawn together, by a temperature that learns.

python examples/clip.py
"""

from __future__ import annotations

import math

import torch
from torch import nn

from action_kernels import clip_loss

PAIRS, THINGS, DIM, STEPS = 256, 24, 32, 150


class TwoTowers(nn.Module):
    """As CLIP: an image encoder, a text encoder, and the logarithm of a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, DIM))
        self.text = nn.Sequential(nn.EmbeddingBag(1000, 128), nn.GELU(), nn.Linear(128, DIM))
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        temperature = (-self.log_scale).exp()
        return clip_loss(self.image(images), self.text(tokens), temperature=temperature)


def pairs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and captions of the same things: 24 traits, each seen in the image, each a word or its opposite."""
    traits = torch.rand(PAIRS, THINGS, generator=generator) < 0.5
    looks = torch.randn(THINGS, 64, generator=torch.Generator().manual_seed(7))
    images = (2.0 * traits - 1) @ looks + torch.randn(PAIRS, 64, generator=generator)
    words = 2 * torch.arange(THINGS) + traits.long()
    return images, words


def main() -> dict[str, float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = TwoTowers()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(STEPS):
        loss = model(*pairs(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.log_scale.clamp_(0, math.log(100))  # as CLIP bounds it
        if (step + 1) % 30 == 0:
            scale = model.log_scale.exp().item()
            print(f"step {step + 1}: loss {loss:.3f}, temperature {1 / scale:.4f}")
    images, tokens = pairs(generator)
    with torch.no_grad():
        a, b = (nn.functional.normalize(x) for x in (model.image(images), model.text(tokens)))
        right = (a @ b.T).argmax(1) == torch.arange(PAIRS)
    accuracy = right.float().mean().item()
    print(f"images that find their text among {PAIRS}: {accuracy:.0%}")
    return {"accuracy": accuracy, "temperature": 1 / model.log_scale.exp().item()}


if __name__ == "__main__":
    main()
