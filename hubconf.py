"""Entry points of torch.hub: every network here, by name or tag; arguments as in `timm.create_model`.

torch.hub.load('OWNER/REPOSITORY', 'norton_resnet56_cifar.r071', pretrained=True)
"""

from functools import partial

import timm

import norton_timm  # noqa: F401  (registers the networks)

dependencies = ['timm', 'torch', 'torchvision', 'tensorly', 'safetensors', 'yaml', 'filelock', 'tqdm']
_OURS = ['norton_*', 'coring_*', '*_cifar']
_NAMES = [*timm.list_models(_OURS), *timm.list_models(_OURS, include_tags=True)]
globals().update({name: partial(timm.create_model, name) for name in _NAMES})
