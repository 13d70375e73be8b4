"""Where a transformer of the host has its blocks, and what the host calls them.

A network runs the blocks of a list one after another, and each takes what the one before it has returned. Most networks have
one such list. Some have two, such as the double and single blocks of Flux, which pass on different tensors.
"""

from dataclasses import dataclass

import torch

# {the host's names for blocks that other nodes may replace: paths of the image's, video's or sound's blocks}. From each group
# the first path that a network has is taken. The blocks of the second group run after those of the first.
FIRST = ("double_block", "block")
PATHS = {
    FIRST: (
        "double_blocks", "double_layers", "double_stream_blocks", "double_stream_layers", "joint_blocks",
        "visual_transformer_blocks", "transformer_blocks", "patch_blocks", "blocks", "layers", "transformer.layers",
        "language_model.layers", "decoder.layers", "diffusion_transformer.transformer.layers",
    ),
    ("single_block",): ("single_blocks", "single_layers", "single_stream_blocks", "single_stream_layers"),
}  # fmt: skip


@dataclass(frozen=True)
class SpecialClass:
    """How a class of networks differs from the others.

    paths: of its lists; empty: as in PATHS. cheapest_branch: -1, or 0 if a layer after the blocks needs that a block has run.
    batch_dim: the dimension of the conditioning entries in what its blocks pass on.
    has_prefix_cache: the network keeps its blocks' keys and values between evaluations, unless a block is replaced. own_cache:
    the transformer option that holds the sampler's own cache, which every block must fill; "" if none. refused: why it cannot
    be cached; "" if it can.
    """

    paths: tuple = ()
    cheapest_branch: int = -1
    batch_dim: int = 0
    has_prefix_cache: bool = False
    own_cache: str = ""
    refused: str = ""


DEEPEST = ("down_blocks.-1", "up_blocks.0")  # only this level: skip connections join the outer levels
SPECIAL_CLASSES = {
    "GeneralDIT": SpecialClass(batch_dim=3),  # Cosmos 1: its blocks pass on [T, H, W, B, D]
    "HiDreamO1Transformer": SpecialClass(has_prefix_cache=True),
    "CausalWanModel": SpecialClass(own_cache="ar_state"),  # by SamplerARVideo
    "NaDiT": SpecialClass(cheapest_branch=0),  # SeedVR2's last layer takes the embedding that the first block has kept
    "StageB": SpecialClass(paths=DEEPEST),
    "StageC": SpecialClass(paths=DEEPEST),
    "Trellis2": SpecialClass(refused="it has several networks for sparse grids, which take turns"),
}
LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class BlockList:
    """A list of blocks in a network.

    parent, key: the module that holds it, and its name there. host_names: under which other nodes may replace its blocks.
    is_guess: whether the network is of another pack's class, so that skipping its blocks has to be tried.
    """

    path: str
    parent: torch.nn.Module
    key: str
    host_names: tuple
    is_guess: bool = False

    @property
    def container(self):
        return self.parent._modules[self.key]

    @property
    def tokens_share(self):
        """About for what share of the tokens each weight is used: double blocks have separate ones for picture and text."""
        return 0.5 if self.path.startswith("double") else 1.0

    def __len__(self):
        return len(self.container)


def special_class_of(network):
    """Return the SpecialClass of a network."""
    return SPECIAL_CLASSES.get(type(network).__name__, SpecialClass())


def find_lists(network):
    """Return the BlockLists of a network in the order in which it runs them; [] if it has none that can be cached."""
    special = special_class_of(network)
    if special.refused:
        return []
    if special.paths:
        return [found for path in special.paths if (found := _at(network, path, FIRST))]
    lists = []
    for host_names, paths in PATHS.items():
        lists += [found for path in paths if (found := _at(network, path, host_names))][:1]
    return lists or _largest(network)


def outermost_lists(module):
    """Return the lists of modules in a module that are in no other list."""
    found = []
    for child in module.children():
        found += [child] if isinstance(child, LISTS) else outermost_lists(child)
    return found


def _at(network, path, host_names):
    """Return the BlockList at a path, None if there is none. A number counts the modules of a list, also from its end."""
    parent, key, module = None, None, network
    for part in path.split("."):
        children = getattr(module, "_modules", {})
        if part.lstrip("-").isdigit():
            part = list(children)[int(part)] if children else ""
        parent, key, module = module, part, children.get(part)
    if not isinstance(module, LISTS) or not len(module):
        return None
    return BlockList(path, parent, key, host_names, not type(network).__module__.startswith("comfy."))


def _largest(network):
    """Return [the list with most weights] of those with at least three blocks of one class, [] if there is none."""
    found, inside = [], ()
    for path, module in network.named_modules():
        if isinstance(module, LISTS) and not path.startswith(inside):
            blocks = list(module._modules.values())
            if len(blocks) >= 3 and len(set(map(type, blocks))) == 1:
                found.append((sum(weight.numel() for weight in module.parameters()), path))
            inside = (*inside, f"{path}.")
    return [_at(network, max(found)[1], FIRST)] if found else []


@dataclass(frozen=True)
class Span:
    """The blocks of a list, from `first` to `last` inclusive, that a cached evaluation does not run.

    name: what the features of the span are called. It does not depend on blocks that other nodes replace.
    """

    block_list: BlockList
    name: str
    first: int
    last: int

    @property
    def blocks(self):
        """The blocks, a list of modules."""
        return list(self.block_list.container._modules.values())[self.first : self.last + 1]


def spans(lists, branch, replaced=frozenset()):
    """Return the Spans between the branch + 1 outermost blocks at each end; at branch -1 the spans of all blocks.

    replaced: the host's names and numbers of the blocks that other nodes replace. A span does not begin or end with one of
    these, because a replacement need not call the block.
    """
    begin, end, found, before = branch + 1, sum(map(len, lists)) - branch - 1, [], 0
    for own in lists:
        first, last = max(begin - before, 0), min(end - before, len(own)) - 1
        before += len(own)
        inside = [number for number in range(first, last + 1) if not any((name, number) in replaced for name in own.host_names)]
        if inside:
            found.append(Span(own, f"{own.path}.{first}", inside[0], inside[-1]))
    return found
