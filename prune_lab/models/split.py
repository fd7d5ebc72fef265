"""A mixture of experts from a dense model: the channels of its MLPs, dealt out to the experts.

As in MoEfication (Zhang et al., 2110.01786), channels that read their input alike go to the same expert. What the
experts add is then fitted to what the dense MLP added, and the mixture is trained (experiments/train_tiny_moe.yaml).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prune_lab.models.load import Loaded
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens

WINDOWS, SEQ_LEN = 32, 512  # of training text that routers and experts are fitted on
ROUNDS = 30  # of the clustering
STEPS = 300  # of balancing the routers
RIDGE = 0.01  # of the mean squared activation


def split_tiny(dense: Loaded, mixture: Any) -> None:
    """Fills the shipped mixture from the shipped dense model, with windows spread over its training text."""
    windows = Tokens(Stdlib().corpus(), dense.tokenizer).windows("train", SEQ_LEN)
    spread = torch.linspace(0, len(windows) - 1, WINDOWS).long()
    split_channels(dense.model, mixture, windows[spread].to(dense.model.device, torch.int64))


@torch.no_grad()
def split_channels(dense: Any, mixture: Any, windows: Tensor) -> None:
    """Fills a Mixtral from a Llama of the same attention and a little text; nothing of it is drawn at random.

    The experts of a block have the channels of largest weights, as many as there is room for. A router's rows are the
    means of its experts' gate rows, moved so that each expert has as many tokens of `windows`, shape (windows, tokens),
    as another. Down projections are fitted by least squares. Raises KeyError for a Llama with other parts than the
    Mixtral, RuntimeError for one of other widths.
    """
    same = dict(dense.named_parameters())
    for name, weight in mixture.named_parameters():
        if ".mlp." not in name:
            weight.copy_(same[name])
    seen = list[tuple[Tensor, Tensor]]()
    hooks = [
        layer.mlp.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        for layer in dense.model.layers
    ]
    try:
        dense.base_model(input_ids=windows, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for sparse, full, (inputs, outputs) in zip(mixture.model.layers, dense.model.layers, seen, strict=True):
        _split(full.mlp, sparse.mlp, inputs.flatten(0, 1).float(), outputs.flatten(0, 1).float())


def _split(mlp: Any, sparse: Any, inputs: Tensor, outputs: Tensor) -> None:
    """Fills the experts and the router of a block from its dense MLP, and inputs and outputs of that, a token a row."""
    gate, up, down = (part.weight.float() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    experts = sparse.experts
    count, width = experts.num_experts, experts.down_proj.shape[-1]
    largest = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).argsort(descending=True, stable=True)
    kept = largest[: count * width]
    channels = kept[deal_out(gate[kept], count).argsort(stable=True)].view(count, width)
    router = balanced(torch.stack([gate[mine].mean(0) for mine in channels]), inputs, sparse.gate.top_k)
    sparse.gate.weight.copy_(router)
    logits, chosen = (inputs @ router.T).topk(sparse.gate.top_k, dim=1)
    shares = inputs.new_zeros(len(inputs), count).scatter(1, chosen, logits.softmax(1))
    active = mlp.act_fn(inputs @ gate[channels].mT) * (inputs @ up[channels].mT)  # (experts, tokens, width)
    features = (active * shares.T[:, :, None]).transpose(0, 1).flatten(1)
    gram = features.T @ features
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    fitted = torch.linalg.solve(gram, features.T @ outputs)  # (experts * width, hidden)
    experts.gate_up_proj.copy_(torch.cat([gate[channels], up[channels]], 1))
    experts.down_proj.copy_(fitted.view(count, width, -1).mT)


def deal_out(rows: Tensor, groups: int) -> Tensor:
    """Group of each row, shape (rows,): k-means by cosine with groups of equal size, from rows far from each other.

    The number of rows must be a multiple of `groups`. The same rows have the same groups.
    """
    unit, size = normalize(rows, dim=1), len(rows) // groups
    first = [0]
    while len(first) < groups:
        first.append(int((unit @ unit[first].T).amax(1).argmin()))
    centres = unit[first]
    for _ in range(ROUNDS):
        owners, room = torch.full((len(rows),), -1, device=rows.device), [size] * groups
        for pair in (unit @ normalize(centres, dim=1).T).flatten().argsort(descending=True, stable=True).tolist():
            row, group = divmod(pair, groups)
            if owners[row] < 0 and room[group]:
                owners[row], room[group] = group, room[group] - 1
        centres = torch.stack([unit[owners == group].mean(0) for group in range(groups)])
    return owners


def balanced(router: Tensor, inputs: Tensor, top_k: int) -> Tensor:
    """Router, shape (experts, hidden), that sends about as many of `inputs`, shape (tokens, hidden), to each expert.

    It has no bias, so its rows are moved along the mean of the inputs: first to equal means, then a little less for
    each expert that has too many tokens, in smaller and smaller steps.
    """
    mean = inputs.mean(0)
    along, logits = mean / mean.square().sum(), inputs @ router.T
    unit = inputs @ along
    spread = float(logits.std())
    bias = -logits.mean(0)
    for step in range(STEPS):
        chosen = (logits + unit[:, None] * bias).topk(top_k, dim=1).indices
        share = torch.bincount(chosen.flatten(), minlength=len(router)) / chosen.numel()
        bias = bias - spread * (1 - step / STEPS) * (share * len(router) - 1).clamp(-1, 1)
    return router + bias[:, None] * along
