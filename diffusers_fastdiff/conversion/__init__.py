"""Original checkpoints to our and diffusers' classes. Files are read as data; nothing in them is executed."""

from .amed import convert_amed
from .dit import convert_dit
from .edm import ConvertedEDM, convert_edm
from .fpdm import convert_fpdm

__all__ = ["ConvertedEDM", "convert_amed", "convert_dit", "convert_edm", "convert_fpdm"]
