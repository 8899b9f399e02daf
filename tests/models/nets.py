"""A user's own file, as ``module.path:function`` teachers find it: networks and functions of many kinds."""

import torch
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


class Answering(nn.Module):
    """Logits, changed at the last moment."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = tiny(5, 3), change

    def forward(self, x):
        return self.change(self.net(x))


def nan_in_a_tuple():
    return Answering(lambda logits: (logits * float("nan"), logits.argmax(1)))


def without_logits():
    return Answering(lambda logits: {"scores": logits, "labels": logits.argmax(1)})


def nothing_at_all():
    return Answering(lambda logits: None)


def of_one_image():
    return Answering(lambda logits: logits[:1])


def cut_off():
    return Answering(lambda logits: logits.detach())


def other_size():
    def refuse(logits):
        raise ValueError("Input image size (8) doesn't match model (224).")

    return Answering(refuse)


def scores():
    """A black box: numbers about images, from outside torch."""
    return lambda x: x.mean((2, 3)).numpy().repeat(2, 1)[:, :5]


def one_row():
    """A black box that forgets all images but one."""
    return lambda x: x[:1].mean((2, 3)).numpy().repeat(2, 1)[:, :5]


def opinions():
    """A black box that never is in two minds."""
    weight = torch.randn(3 * 8 * 8, 5, generator=torch.Generator().manual_seed(0)).numpy()
    return lambda x: 0.1 * x.flatten(1).numpy() @ weight


def not_callable():
    return 3


def fails():
    raise KeyError("no such file")


def tiny_seeded():
    torch.manual_seed(1)
    net = tiny(5, 3).eval()
    return net.requires_grad_(False)


class Changed(nn.Module):
    """The logits of :func:`tiny_seeded`, changed."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = tiny_seeded(), change

    def forward(self, x):
        return self.change(self.net(x))


def softmaxed():
    return Changed(lambda logits: logits.softmax(1))


def softmaxed_half():
    return Changed(lambda logits: logits.softmax(1).half())


def softmaxed_dict():
    return Changed(lambda logits: {"logits": logits.softmax(1)})


def softmaxed_numpy():
    """A black box that answers probabilities."""
    net = tiny_seeded()
    return lambda x: net(x).softmax(1).numpy()


def log_softmaxed():
    return Changed(lambda logits: logits.log_softmax(1))


def sigmoids():
    return Changed(lambda logits: logits.sigmoid())
