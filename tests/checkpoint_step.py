"""What a network does: outputs, one SGD step, outputs again. As a script: of a file, in a process of its own."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def states(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs in evaluation mode before and after one training step, and every tensor after it."""

    def outputs(name: str) -> dict[str, Tensor]:
        model.eval()
        with torch.no_grad():
            y = model(x)
        return {f'{name}.{k}': t for k, t in enumerate(y if isinstance(y, (list, tuple)) else [y])}

    found = outputs('eval')
    torch.manual_seed(3)
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    y = model(x)
    sum(t.float().square().mean() for t in (y if isinstance(y, (list, tuple)) else [y])).backward()
    optimiser.step()
    found.update(outputs('step'))
    found.update({f'state.{k}': t.clone() for k, t in model.state_dict().items()})
    return found


if __name__ == '__main__':
    from norton_timm.checkpoints.file import load

    path, inputs, target, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    save_file({k: t.contiguous() for k, t in states(load(path), load_file(inputs)['x']).items()}, target)
