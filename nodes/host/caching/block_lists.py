"""Where a transformer of the host has its blocks, and what the host calls them.

A network runs the blocks of a list one after another, and each takes what the one before it has returned. Most networks have
one such list. Some have two, such as the double and single blocks of Flux, which pass on different tensors.
"""

from dataclasses import dataclass

import torch

DOUBLE, SINGLE = ("double_block", "block"), ("single_block",)  # the host's names for blocks that other nodes may replace

# {path of the blocks of the picture in a network: the host's names for them}. The first path of each group that a network has
# is taken: blocks under the second group's paths come after those of the first.
PATHS = (
    {
        "double_blocks": DOUBLE, "double_layers": DOUBLE, "double_stream_blocks": DOUBLE, "double_stream_layers": DOUBLE,
        "joint_blocks": DOUBLE, "visual_transformer_blocks": DOUBLE, "transformer_blocks": DOUBLE, "patch_blocks": DOUBLE,
        "blocks": DOUBLE, "layers": DOUBLE, "transformer.layers": DOUBLE, "language_model.layers": DOUBLE,
        "decoder.layers": DOUBLE,
        "diffusion_transformer.transformer.layers": DOUBLE,
    },
    {"single_blocks": SINGLE, "single_layers": SINGLE, "single_stream_blocks": SINGLE, "single_stream_layers": SINGLE},
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What the cache has to know about a class of networks that differs from the others.

    paths: of its lists; empty: as in PATHS. batch_dim: the dimension of the conditioning entries in what its blocks pass on.
    has_prefix_cache: whether the network itself keeps keys and values of its blocks between evaluations unless a block is
    replaced. own_cache: the transformer option in which a sampler gives the network a cache of its own to fill, which every
    block must do; "" without one. refused: why it cannot be cached; "" if it can.
    """

    paths: tuple = ()
    batch_dim: int = 0
    has_prefix_cache: bool = False
    own_cache: str = ""
    refused: str = ""


FAMILIES = {
    "GeneralDIT": Family(batch_dim=3),  # Cosmos 1: its blocks pass on [T, H, W, B, D]
    "HiDreamO1Transformer": Family(has_prefix_cache=True),
    "CausalWanModel": Family(own_cache="ar_state"),  # by SamplerARVideo
    # the deepest level, because skip connections join the others to it
    "StageB": Family(paths=("down_blocks.-1", "up_blocks.0")),
    "StageC": Family(paths=("down_blocks.-1", "up_blocks.0")),
    "Trellis2": Family(refused="it has several networks for sparse grids, which take turns"),
}
LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class BlockList:
    """A list of blocks in a network.

    parent, key: the module that holds it, and its name there. names: under which other nodes may replace its blocks.
    is_guess: whether the network's class is not known, so that skipping its blocks has to be tried.
    """

    path: str
    parent: torch.nn.Module
    key: str
    names: tuple
    is_guess: bool = False

    @property
    def container(self):
        return self.parent._modules[self.key]

    def __len__(self):
        return len(self.container)


def family_of(network):
    """Return the Family of a network."""
    return FAMILIES.get(type(network).__name__, Family())


def find_lists(network):
    """Return the BlockLists of a network in the order in which it runs them; [] if it has none that can be cached."""
    family = family_of(network)
    if family.refused:
        return []
    if family.paths:
        return [found for path in family.paths if (found := _at(network, path, DOUBLE))]
    lists = []
    for group in PATHS:
        lists += [found for path, names in group.items() if (found := _at(network, path, names))][:1]
    return lists or _largest(network)


def _at(network, path, names, is_guess=False):
    """Return the BlockList at a path, None if there is none. A number counts the modules of a list, also from its end."""
    parent, key, module = None, None, network
    for part in path.split("."):
        children = getattr(module, "_modules", {})
        if part.lstrip("-").isdigit():
            part = list(children)[int(part)] if children else ""
        parent, key, module = module, part, children.get(part)
    return BlockList(path, parent, key, names, is_guess) if isinstance(module, LISTS) and len(module) else None


def _largest(network):
    """Return [the list with most weights], of at least three blocks of one class, of a network of an unknown class; else []."""
    found, inside = [], ()
    for path, module in network.named_modules():
        if isinstance(module, LISTS) and not path.startswith(inside):
            blocks = list(module._modules.values())
            if len(blocks) >= 3 and len(set(map(type, blocks))) == 1:
                found.append((sum(weight.numel() for weight in module.parameters()), path))
            inside = (*inside, f"{path}.")
    return [_at(network, max(found)[1], DOUBLE, is_guess=True)] if found else []


@dataclass(frozen=True)
class Span:
    """The blocks of a list, from `first` to `last` inclusive, that a cached evaluation does not run.

    name: what the features of the span are called. It does not depend on blocks that other nodes replace.
    """

    list: BlockList
    name: str
    first: int
    last: int


def spans(lists, branch, replaced=frozenset()):
    """Return the Spans between the branch + 1 outermost blocks at each end.

    replaced: the host's names and numbers of the blocks that other nodes replace. A span does not begin or end with one of
    these, because a replacement need not call the block.
    """
    begin, end, found, before = branch + 1, sum(map(len, lists)) - branch - 1, [], 0
    for own in lists:
        first, last = max(begin - before, 0), min(end - before, len(own)) - 1
        before += len(own)
        inside = [number for number in range(first, last + 1) if not any((name, number) in replaced for name in own.names)]
        if inside:
            found.append(Span(own, f"{own.path}.{first}", inside[0], inside[-1]))
    return found
