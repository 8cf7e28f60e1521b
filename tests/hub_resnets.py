"""ResNets with the names of torchvision and timm, written as a plain torch module from the published architecture.

torchvision has no build beside a torch for CPUs alone, and timm imports it. Their ResNets are one: conv1 7x7 stride 2,
bn1, max pool 3x3 stride 2, layer1 to layer4 of basic or bottleneck blocks (He et al. 2015; the stride in the 3x3
convolution), mean, fc. Names are those of the files that both publish.
"""

import torch
from torch import nn


class Block(nn.Module):
    """conv1, bn1, ... and, where the shape changes, downsample.0 and downsample.1."""

    def __init__(self, kind, num_in, inner, num_out, stride):
        super().__init__()
        if kind == "basic":
            sizes = [(num_in, num_out, 3, stride), (num_out, num_out, 3, 1)]
        else:
            sizes = [(num_in, inner, 1, 1), (inner, inner, 3, stride), (inner, num_out, 1, 1)]
        self.count = len(sizes)
        for index, (before, after, size, step) in enumerate(sizes, 1):
            setattr(self, f"conv{index}", nn.Conv2d(before, after, size, step, padding=size // 2, bias=False))
            setattr(self, f"bn{index}", nn.BatchNorm2d(after))
        self.downsample = None
        if stride != 1 or num_in != num_out:
            self.downsample = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x):
        y = x
        for index in range(1, self.count + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            y = torch.relu(y) if index < self.count else y
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """float[N, C, H, W] -> logits, or features without classes."""

    def __init__(self, kind, depths, *, num_classes=5, width=64, times=1, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        num_in, expansion = width, 1 if kind == "basic" else 4
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Block(kind, num_in, inner * times, inner * expansion, stride))
                num_in = inner * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_stages = len(depths)
        self.fc = nn.Linear(num_in, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(self.num_stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def randomise(model, seed):
    """Every parameter and statistic with signal; returns the model in evaluation mode."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(leaf.shape, generator=draw)
            if leaf.ndim > 1:
                leaf.copy_(noise * (2 / leaf[0].numel()) ** 0.5)
            elif name.endswith("running_var"):
                leaf.copy_(0.5 + torch.rand(leaf.shape, generator=draw))
            elif leaf.is_floating_point():
                leaf.copy_(0.2 * noise + (1.0 if leaf.ndim and name.endswith("weight") else 0.0))
            else:
                leaf.fill_(7)
    return model.eval()
