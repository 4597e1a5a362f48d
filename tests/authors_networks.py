"""Networks in the layouts of the authors' checkpoints, for the tests; ``rates`` and ``rank`` as in their code."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RankMajorCPD(nn.Module):
    """1x1, Kx1 and 1xK, each with R * O channels in the order r * O + o, summed over r at the end."""

    def __init__(self, cin: int, cout: int, rank: int, stride: int = 1, bias: bool = False):
        super().__init__()
        n = rank * cout
        self.shape = (rank, cout)
        self.feature = nn.Sequential(
            OrderedDict(
                pointwise=nn.Conv2d(cin, n, 1, bias=False),
                vertical=nn.Conv2d(n, n, (3, 1), (stride, 1), (1, 0), groups=n, bias=False),
                horizontal=nn.Conv2d(n, n, (1, 3), (1, stride), (0, 1), groups=n, bias=False),
            )
        )
        self.bias = nn.Parameter(torch.randn(cout)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.feature(x).unflatten(1, self.shape).sum(1)
        return y if self.bias is None else y + self.bias[:, None, None]


def conv3(cin: int, cout: int, rank: int, stride: int = 1, bias: bool = False) -> nn.Module:
    if rank:
        return RankMajorCPD(cin, cout, rank, stride, bias)
    return nn.Conv2d(cin, cout, 3, stride, 1, bias=bias)


def keep(full: int, rate: float) -> int:
    return int(full * (1 - rate))


class Block(nn.Module):
    """A basic block with the symmetric zero padding (or cropping) of whatever widths there are."""

    def __init__(self, cin: int, mid: int, cout: int, stride: int, rank: int):
        super().__init__()
        self.conv1, self.bn1 = conv3(cin, mid, rank, stride), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv3(mid, cout, rank), nn.BatchNorm2d(cout)
        self.stride, self.extra = stride, cout - cin

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)))


class CifarResNet(nn.Module):
    def __init__(self, depth: int, rates: list[float], rank: int, head: str):
        super().__init__()
        n = (depth - 2) // 6
        stages = [keep(16, rates[1]), keep(32, rates[2]), 64]
        cin = keep(16, rates[0])
        self.conv1, self.bn1 = conv3(3, cin, rank), nn.BatchNorm2d(cin)
        for s, (full, cout) in enumerate(zip((16, 32, 64), stages)):
            blocks = []
            for i in range(n):
                mid = keep(full, rates[3 + s * n + i])
                blocks.append(Block(cin, mid, cout, 2 if s and not i else 1, rank))
                cin = cout
            setattr(self, f'layer{s + 1}', nn.Sequential(*blocks))
        setattr(self, head, nn.Linear(64, 10))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return getattr(self, self.head)(x)


class CifarVGG(nn.Module):
    def __init__(self, rates: list[float], rank: int):
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        cin, rates = 3, [*rates, 0.0]
        layout = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512]
        for i, full in enumerate(layout):
            if not full:
                layers[f'pool{i}'] = nn.MaxPool2d(2)
                continue
            cout = keep(full, rates.pop(0))
            layers[f'conv{i}'] = conv3(cin, cout, rank, bias=True)
            layers[f'norm{i}'], layers[f'relu{i}'] = nn.BatchNorm2d(cout), nn.ReLU()
            cin = cout
        self.features = nn.Sequential(layers)
        head = dict(linear1=nn.Linear(cin, 512), norm1=nn.BatchNorm1d(512), relu1=nn.ReLU(), linear2=nn.Linear(512, 10))
        self.classifier = nn.Sequential(OrderedDict(head))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.avg_pool2d(self.features(x), 2).flatten(1))


class Growing(nn.Module):
    def __init__(self, cin: int, growth: int, rank: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), conv3(cin, growth, rank)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)


class Halving(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, cout, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class CifarDenseNet(nn.Module):
    def __init__(self, rates: list[float], rank: int):
        super().__init__()
        rates, cin = rates[1:], 24
        self.conv1 = conv3(3, 24, rank)
        for stage in (1, 2, 3):
            layers = []
            for _ in range(12):
                growth = keep(12, rates.pop(0))
                layers.append(Growing(cin, growth, rank))
                cin += growth
            setattr(self, f'dense{stage}', nn.Sequential(*layers))
            if stage < 3:
                cout = keep(cin, rates.pop(0))
                setattr(self, f'trans{stage}', Halving(cin, cout))
                cin = cout
        self.bn, self.fc = nn.BatchNorm2d(cin), nn.Linear(cin, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans2(self.dense2(self.trans1(self.dense1(self.conv1(x)))))
        return self.fc(F.relu(self.bn(self.dense3(x))).mean((2, 3)))


def chain(*spec: tuple[int, int, int]) -> list[nn.Module]:
    """Convolution, batch norm and ReLU for every (in, out, kernel)."""
    layers: list[nn.Module] = []
    for cin, cout, k in spec:
        layers += [nn.Conv2d(cin, cout, k, padding=k // 2), nn.BatchNorm2d(cout), nn.ReLU()]
    return layers


class Inception(nn.Module):
    def __init__(self, cin: int, row: list[int], rate: float, last: bool):
        super().__init__()
        n1, r3, n3, r5, n5, pool = row
        mid = keep(n5, rate)
        n3, n5 = (n3, n5) if last else (keep(n3, rate), mid)
        self.branch1x1 = nn.Sequential(*chain((cin, n1, 1)))
        self.branch3x3 = nn.Sequential(*chain((cin, r3, 1), (r3, n3, 3)))
        self.branch5x5 = nn.Sequential(*chain((cin, r5, 1), (r5, mid, 3), (mid, n5, 3)))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), *chain((cin, pool, 1)))
        self.width = n1 + n3 + n5 + pool

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1x1(x), self.branch3x3(x), self.branch5x5(x), self.branch_pool(x)], 1)


class CifarGoogLeNet(nn.Module):
    ROWS = (
        'a3 64 96 128 16 32 32; b3 128 128 192 32 96 64; a4 192 96 208 16 48 64; b4 160 112 224 24 64 64; '
        'c4 128 128 256 24 64 64; d4 112 144 288 32 64 64; e4 256 160 320 32 128 128; a5 256 160 320 32 128 128; '
        'b5 384 192 384 48 128 128'
    )

    def __init__(self, rates: list[float], rank: int = 0):
        super().__init__()
        self.pre_layers = nn.Sequential(*chain((3, 192, 3)))
        cin, self.order = 192, []
        for row, rate in zip(self.ROWS.split('; '), rates[1:]):
            name, *numbers = row.split()
            block = Inception(cin, [int(n) for n in numbers], rate, last=name == 'b5')
            setattr(self, f'inception_{name}', block)
            self.order.append(name)
            cin = block.width
        self.linear = nn.Linear(cin, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_layers(x)
        for name in self.order:
            x = getattr(self, f'inception_{name}')(x)
            if name in ('b3', 'e4'):
                x = F.max_pool2d(x, 3, 2, 1)
        return self.linear(x.mean((2, 3)))


class Inverted(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, t: int):
        super().__init__()
        n = cin * t
        layers: list[nn.Module] = []
        if t > 1:
            layers += [nn.Conv2d(cin, n, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU6()]
        layers += [nn.Conv2d(n, n, 3, stride, 1, groups=n, bias=False), nn.BatchNorm2d(n), nn.ReLU6()]
        layers += [nn.Conv2d(n, cout, 1, bias=False), nn.BatchNorm2d(cout)]
        self.conv = nn.Sequential(*layers)
        self.add = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.add else self.conv(x)


class CifarMobileNet(nn.Module):
    def __init__(self, rates: list[float], rank: int = 0):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        ]
        cin = 32
        rows = '1 16 1 1; 6 24 2 1; 6 32 3 2; 6 64 4 2; 6 96 3 1; 6 160 3 2; 6 320 1 1'.split('; ')
        for row, rate in zip(rows, rates[1:]):
            t, c, n, s = (int(v) for v in row.split())
            for i in range(n):
                layers.append(Inverted(cin, keep(c, rate), s if i == 0 else 1, t))
                cin = keep(c, rate)
        layers.append(nn.Sequential(nn.Conv2d(cin, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(3).mean(2))


class Bottleneck(nn.Module):
    def __init__(self, cin: int, mid: int, cout: int, stride: int, down: bool, rank: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, mid, 1, bias=False), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = conv3(mid, mid, rank, stride), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = nn.Conv2d(mid, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.downsample = (
            nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout)) if down else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ImageNetResNet50(nn.Module):
    def __init__(self, rates: list[float], rank: int):
        super().__init__()
        cin = keep(64, rates[0])
        self.conv1, self.bn1 = nn.Conv2d(3, cin, 7, 2, 3, bias=False), nn.BatchNorm2d(cin)
        inner = list(rates[4:])
        for s, n in enumerate((3, 4, 6, 3)):
            cout = keep(256 * 2**s, rates[s + 1]) if s < 3 else 2048
            blocks = []
            for i in range(n):
                mid = keep(64 * 2**s, inner.pop(0))
                blocks.append(Bottleneck(cin, mid, cout, 2 if s and not i else 1, i == 0, rank))
                cin = cout
            setattr(self, f'layer{s + 1}', nn.Sequential(*blocks))
        self.fc = nn.Linear(2048, 1000)

    def body(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        found = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x)[-1].mean((2, 3)))
