"""A user's own file, as ``module.path:function`` teachers find it: networks and functions of many kinds."""

from torch import nn


def tiny(num_classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))  # fmt: skip


class Pair(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(8 * 8 * 3, 5), nn.Linear(8 * 8 * 3, width)

    def forward(self, x):
        return self.a(x.flatten(1)), self.b(x.flatten(1))


def with_features():
    return Pair(7)


def two_heads():
    return Pair(5)


class Backwards(nn.Module):
    """Its second BatchNorm runs first, twice; a third one never."""

    def __init__(self):
        super().__init__()
        self.late, self.early, self.unused = nn.BatchNorm2d(6), nn.BatchNorm2d(3), nn.BatchNorm2d(9)
        self.mix, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.mix(self.early(x) + self.early(-x))
        return {"logits": self.fc(self.late(x).mean((2, 3)))}


def backwards():
    return Backwards()


def nan():
    net = tiny(5, 3)
    nn.init.constant_(net[0].weight, float("nan"))
    return net


def overflow():
    net = tiny(5, 3)
    nn.init.constant_(net[4].weight, 3e38)
    nn.init.constant_(net[0].bias, 3e38)
    return net


def wrong_width():
    return tiny(4, 3)


def scores():
    """A black box: numbers about images, from outside torch."""
    return lambda x: x.mean((2, 3)).numpy().repeat(2, 1)[:, :5]


def not_callable():
    return 3


def fails():
    raise KeyError("no such file")
