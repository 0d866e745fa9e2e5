"""Autoregressive pixel models: each image element is predicted from the earlier ones.

The order of the elements is raster order of the pixels, and R, G, B (channel order) inside a pixel.
"""

from __future__ import annotations

from fastgen.models.autoregressive.base import AutoregressiveModel
from fastgen.models.autoregressive.gated_pixelcnn import GatedPixelCNN
from fastgen.models.autoregressive.image_gpt import ImageGPT
from fastgen.models.autoregressive.pixelcnn import PixelCNN
from fastgen.models.autoregressive.pixelcnnpp import PixelCNNpp
from fastgen.models.autoregressive.pixelrnn import PixelRNN
from fastgen.models.autoregressive.pixelsnail import PixelSNAIL

__all__ = ["AutoregressiveModel", "GatedPixelCNN", "ImageGPT", "PixelCNN", "PixelCNNpp", "PixelRNN", "PixelSNAIL"]
