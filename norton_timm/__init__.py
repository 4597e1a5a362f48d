"""NORTON and CORING: filter-wise compression of convolutional networks, for timm."""

__version__ = '0.1.0'
