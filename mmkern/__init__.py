"""mmkern: kernels, models and trainers for vision-language training.

``mmkern.ops`` holds the functions (contrastive losses in linear memory), ``mmkern.nn`` the modules
around them, ``mmkern.models`` whole systems (CLIP), ``mmkern.train``, ``mmkern.data`` and
``mmkern.eval`` what trains and measures them. Importing this package loads torch and registers the
operators; triton and transformers are imported only by what needs them.
"""

from mmkern import nn, ops

__version__ = "0.1.0"

__all__ = ["__version__", "nn", "ops"]
