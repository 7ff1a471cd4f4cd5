"""The examples' data: scikit-learn's digits, CIFAR-10 from a path, and text. Nothing is
downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from cifar10 import CLASSES, read_cifar10
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Examples(Dataset):
    """Tensors of equal length; a batch is one indexing of each (``__getitems__``), not a stack of
    single items."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        index = torch.as_tensor(indices)
        return tuple(t[index] for t in self.tensors)


def _already_a_batch(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch


class TensorDataModule(L.LightningDataModule):
    """Train and validation sets held in memory as tensors; subclasses fill ``train`` and ``val`` in
    ``setup``."""

    train: Examples
    val: Examples

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        # Whole batches only: BatchNorm over a remainder of one or two examples would disturb every
        # curve once per epoch.
        small = len(self.train) < self.batch_size
        return DataLoader(
            self.train,
            self.batch_size,
            shuffle=True,
            drop_last=not small,
            collate_fn=_already_a_batch,
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, max(self.batch_size, 500), collate_fn=_already_a_batch)


_DIGITS_MEAN, _DIGITS_DEVIATION = 0.305, 0.376  # of all pixels, which lie between 0 and 1
_DIGITS_BACKGROUND = -_DIGITS_MEAN / _DIGITS_DEVIATION


class Digits(TensorDataModule):
    """scikit-learn's handwritten digits: 1797 real images of 8 x 8, of which 500 are held out.

    Args:
        batch_size: Images per optimizer step. resolution: Edge of the images given to the network;
            above 8 they are
        enlarged. train_images: How many of the 1297 training images to use (None: all). noise:
            Standard deviation of
        the pixel noise added to training images, which are also moved by up to a pixel of the
        original. Without
            them a network knows the few images by heart after ten epochs: the gradients vanish, and
                with them
            everything that is to be seen.
    """

    channels, classes = 1, 10

    def __init__(
        self,
        batch_size: int = 64,
        resolution: int = 8,
        train_images: int | None = None,
        noise: float = 0.5,
    ) -> None:
        super().__init__(batch_size)
        self.resolution, self.train_images, self.noise = resolution, train_images, noise

    def setup(self, stage: str | None = None) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        images = (images - _DIGITS_MEAN) / _DIGITS_DEVIATION
        if self.resolution != 8:
            images = F.interpolate(
                images,
                size=(self.resolution, self.resolution),
                mode="bilinear",
                align_corners=False,
            )
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(
            len(labels), generator=torch.Generator().manual_seed(0)
        )  # writers come in blocks; the split is always this one
        val, train = order[:500], order[500:][: self.train_images]
        self.train, self.val = (
            Examples(images[train], labels[train]),
            Examples(images[val], labels[val]),
        )

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if self.trainer is not None and self.trainer.training and self.noise > 0:
            images = random_crop(images, pad=self.resolution // 8, border=_DIGITS_BACKGROUND)
            images = images + self.noise * torch.randn_like(images)
        return images, labels


class Cifar10(TensorDataModule):
    """CIFAR-10 from the standard python archive, with random flips and crops as in the papers.

    The batch is augmented in one go after it was moved to the device. The WRS paper also changes
    brightness, contrast, hue and saturation at random, which is left out here.

    Args:
        path: ``cifar-10-python.tar.gz`` or its folder.
        batch_size: Images per optimizer step.
        resolution: 32, or 16 or 8 for a small machine: the images are averaged down.
        train_images: Use only the first so many training images (None: all 50,000).
        pad: Zero padding of the random crop at 32 x 32 in pixels (scaled with ``resolution``); 4 is
            usual, the WRS paper has 3.
        augment: Whether training images are flipped and cropped at random.
    """

    channels, classes = 3, CLASSES

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 128,
        resolution: int = 32,
        train_images: int | None = None,
        pad: int = 4,
        augment: bool = True,
    ) -> None:
        super().__init__(batch_size)
        if resolution not in (8, 16, 32):
            raise ValueError(f"`resolution` must be 8, 16 or 32, got {resolution}.")
        self.path, self.resolution, self.train_images = Path(path), resolution, train_images
        self.pad, self.augment = pad * resolution // 32, augment

    def setup(self, stage: str | None = None) -> None:
        data = read_cifar10(self.path)
        self.train = Examples(
            self._images(data.train_images[: self.train_images]),
            torch.from_numpy(data.train_labels[: self.train_images]),
        )
        self.val = Examples(self._images(data.test_images), torch.from_numpy(data.test_labels))

    def _images(self, pixels) -> Tensor:
        images = torch.from_numpy(pixels.copy())  # uint8: a quarter of the memory
        factor = 32 // self.resolution
        if factor == 1:
            return images
        return torch.cat(
            [
                F.avg_pool2d(chunk.float(), factor).round().to(torch.uint8)
                for chunk in images.split(5000)
            ]
        )

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if self.augment and self.trainer is not None and self.trainer.training:
            images = random_crop(random_flip(images), self.pad)
        mean = torch.tensor([0.4914, 0.4822, 0.4465], device=images.device).view(
            1, 3, 1, 1
        )  # of the 50,000 training images
        deviation = torch.tensor([0.2470, 0.2435, 0.2616], device=images.device).view(1, 3, 1, 1)
        return (images.float() / 255 - mean) / deviation, labels


def random_flip(images: Tensor) -> Tensor:
    """Mirror each of the images ``(n, c, h, w)`` left to right with probability 1/2."""
    return torch.where(
        torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, images.flip(-1), images
    )


def random_crop(images: Tensor, pad: int, border: float = 0.0) -> Tensor:
    """Cut each of the images ``(n, c, h, w)`` at a random place out of itself with a border of
    ``pad`` pixels of value ``border``."""
    n, c, h, w = images.shape
    device = images.device
    padded = F.pad(images, (pad, pad, pad, pad), value=border)
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), device=device)
    rows = (top + torch.arange(h, device=device)).view(n, 1, h, 1)
    columns = (left + torch.arange(w, device=device)).view(n, 1, 1, w)
    return padded[
        torch.arange(n, device=device).view(n, 1, 1, 1),
        torch.arange(c, device=device).view(1, c, 1, 1),
        rows,
        columns,
    ]


class Text(TensorDataModule):
    """Characters of a text in windows; the target is the next character. The last tenth of the text
    is held out.

    Args:
        path: A UTF-8 text file; None takes the help texts that come with Python
            (``pydoc_data.topics``, about 465,000
        characters of English). batch_size: Windows per optimizer step. context: Characters per
        window.
    """

    def __init__(
        self, path: str | Path | None = None, batch_size: int = 32, context: int = 64
    ) -> None:
        super().__init__(batch_size)
        self.context = context
        text = python_help_text() if path is None else read_text(Path(path))
        self.characters = sorted(set(text))
        place = {character: i for i, character in enumerate(self.characters)}
        self._codes = torch.tensor([place[character] for character in text])
        if len(self._codes) < 20 * (context + 1):
            raise ValueError(
                f"The text has {len(text)} characters; at least {20 * (context + 1)} are needed "
                f"for windows of {context}."
            )

    def setup(self, stage: str | None = None) -> None:
        split = len(self._codes) * 9 // 10
        self.train, self.val = (
            self._windows(self._codes[:split]),
            self._windows(self._codes[split:]),
        )

    def _windows(self, codes: Tensor) -> Examples:
        count = (len(codes) - 1) // self.context
        length = count * self.context
        return Examples(codes[:length].view(count, -1), codes[1 : length + 1].view(count, -1))

    def decode(self, codes: Sequence[int]) -> str:
        """Turn codes back into text."""
        return "".join(self.characters[code] for code in codes)


def python_help_text() -> str:
    """Give the text of Python's own ``help()`` topics, which every Python installation carries."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        ValueError: It is not there, or not UTF-8 text.
    """
    if not path.is_file():
        raise ValueError(
            f"A text was asked for at {path}, and no file is there. Give a UTF-8 text file, or "
            f"leave it out for Python's help texts."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from error
