"""See and steer the effective learning rate of any PyTorch Lightning model."""

__version__ = "0.1.0.dev0"
