"""The four-block convolutional network of few-shot learning, with normalisation that keeps no running statistics."""

from torch import nn

from bilevel_lightning.errors import BilevelError


class ConvNet(nn.Sequential):
    """Blocks of 3x3 convolution, group normalisation, ReLU, 2x2 max-pooling; then a linear layer.

    Group normalisation (8 channels a group) makes a loss a function of parameters and data alone, which
    differentiating through lower steps needs; batch normalisation would change its statistics at every step.

    Args:
        image_shape: channels, height, width. Default that of MNIST.
        classes: number of classes. Default 10.
        width: channels of each block, a multiple of 8. Default 32.
        blocks: number of blocks; each halves height and width. Default: 4, or as many as the image allows.

    Raises:
        BilevelError: if the image is too small for the blocks, or width is not a multiple of 8.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
        width: int = 32,
        blocks: int | None = None,
    ) -> None:
        channels, height, rows = image_shape
        most = min(height, rows).bit_length() - 1
        blocks = min(4, most) if blocks is None else blocks
        if not 1 <= blocks <= most:
            raise BilevelError(
                f"ConvNet.blocks must be between 1 and {most} for images of {height}x{rows}, got {blocks}."
            )
        if width < 8 or width % 8:
            raise BilevelError(f"ConvNet.width must be a multiple of 8, got {width}.")
        layers: list[nn.Module] = []
        for i in range(blocks):
            layers += [
                nn.Conv2d(width if i else channels, width, 3, padding=1),
                nn.GroupNorm(width // 8, width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        features = width * (height >> blocks) * (rows >> blocks)
        super().__init__(*layers, nn.Flatten(), nn.Linear(features, classes))
