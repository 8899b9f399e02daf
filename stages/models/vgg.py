"""VGG-11 with BatchNorm (Simonyan and Zisserman 2015), global average and one linear layer, as used on small images."""

from torch import Tensor, nn

WIDTHS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class Vgg11(nn.Module):
    """Five blocks of 3×3 convolutions. A ``small`` one pools after the first three only: total stride 8, not 32."""

    stages = ("block2", "block3", "block4")
    head = "classifier"

    def __init__(self, num_classes: int, channels: int, small: bool):
        super().__init__()
        pools = 3 if small else len(WIDTHS)
        for number, widths in enumerate(WIDTHS):
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            if number < pools:
                layers.append(nn.MaxPool2d(2))
            self.add_module(f"block{number}", nn.Sequential(*layers))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        for number in range(len(WIDTHS)):
            x = self.get_submodule(f"block{number}")(x)
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out
