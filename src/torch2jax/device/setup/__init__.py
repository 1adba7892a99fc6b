"""What ``device.enable()`` registers with PyTorch."""
