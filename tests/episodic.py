"""Few-shot episodes small enough for tests, in float64, and what the training loop computes on them."""

from collections import OrderedDict

import torch
from loops import trainer
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bilevel_lightning.models import ConvNetBody, LinearHead

WAYS, SHAPE = 3, (1, 8, 8)


class Given:
    """A loader of given batches."""

    def __init__(self, batches) -> None:
        self.batches = list(batches)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def images(episodes=3, seed=0, shots=2, queries=3, ways=WAYS, shape=SHAPE):
    """A batch of episodes whose classes have means of their own, sorted by label."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(episodes, ways, 1, *shape, generator=generator, dtype=torch.float64)
    batch = {}
    for part, number in (("support", shots), ("query", queries)):
        x = centers + 1.5 * torch.randn(episodes, ways, number, *shape, generator=generator, dtype=torch.float64)
        labels = torch.arange(ways).repeat_interleave(number).expand(episodes, -1).contiguous()
        batch[part] = (x.flatten(1, 2), labels)
    return batch


def curves(episodes=3, seed=0, shots=4, queries=6):
    """A batch of one-dimensional regressions."""
    generator = torch.Generator().manual_seed(seed)
    a, p = torch.rand(2, episodes, 1, 1, generator=generator, dtype=torch.float64)
    batch = {}
    for part, number in (("support", shots), ("query", queries)):
        x = 4 * torch.rand(episodes, number, 1, generator=generator, dtype=torch.float64) - 2
        batch[part] = (x, (0.5 + a) * torch.sin(2 * x - 3 * p))
    return batch


def body(norm="transductive", seed=0, **settings):
    torch.manual_seed(seed)
    return ConvNetBody(SHAPE, width=4, blocks=2, norm=norm, **settings).double()


def head(features, seed=1, ways=WAYS, **settings):
    torch.manual_seed(seed)
    return LinearHead(features, ways, **settings).double()


def network(norm="transductive", **settings):
    """The whole network, with the names that `FewShot` gives."""
    part = body(norm, **settings)
    return nn.Sequential(OrderedDict(body=part, head=head(part.features)))


def parameters(net):
    return {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}


def path(net, w, support, lr, steps, adapted="", track=True, loss=cross_entropy, penalty=None):
    """Plain adaptation: the weights after each step of size lr(t, name); only names that start with ``adapted``."""
    lr = lr if callable(lr) else lambda t, name, lr=lr: lr
    out = [w]
    for t in range(steps):
        names = [name for name in w if name.startswith(adapted)]
        value = loss(functional_call(net, w, (support[0],)), support[1])
        value = value if penalty is None else value + penalty({name: w[name] for name in names})
        found = torch.autograd.grad(value, [w[name] for name in names], create_graph=track)
        w = {**w, **{name: w[name] - lr(t, name) * g for name, g in zip(names, found, strict=True)}}
        out.append(w)
    return out


def mean_query_loss(net, w, batch, lr, steps, weights=None, loss=cross_entropy, **settings):
    """The mean over episodes of the query loss at the end, or of its weighted sum over the steps."""
    total = 0.0
    for e in range(len(batch["support"][0])):
        support, query = ((part[0][e], part[1][e]) for part in (batch["support"], batch["query"]))
        iterates = path(net, w, support, lr, steps, loss=loss, **settings)[1:]
        for factor, at in zip([0.0] * (steps - 1) + [1.0] if weights is None else weights, iterates, strict=True):
            if factor:
                total = total + factor * loss(functional_call(net, at, (query[0],)), query[1])
    return total / len(batch["support"][0])


def by_hand(net, batch, lr, steps, **settings):
    w = parameters(net)
    value = mean_query_loss(net, w, batch, lr, steps, **settings)
    return dict(zip(w, torch.autograd.grad(value, [*w.values()]), strict=True))


class Record:
    """What the loop of a module did: directions, logs and evaluations, in float64."""

    def __init__(self, module) -> None:
        self.gradients, self.logs, self.evaluated = [], [], []
        for name, kept in (("_step_upper", self.gradients), ("_log_step", self.logs)):
            self.wrap(
                module, name, lambda args, out, kept=kept: kept.append({k: v.clone() for k, v in args[0].items()})
            )
        self.wrap(module, "_evaluated", lambda args, out: self.evaluated.append(out))

    def wrap(self, module, name, note):
        inner = getattr(module, name)

        def call(*args):
            if name != "_evaluated":
                note(args, None)
            out = inner(*args)
            if name == "_evaluated":
                note(args, out)
            return out

        object.__setattr__(module, name, call)


def train(module, batches, val=None, **settings):
    """Trains on the batches, in order; returns the record and the trainer."""
    record = Record(module)
    run = trainer(len(batches), **settings)
    run.fit(module, Given(batches), None if val is None else Given(val))
    return record, run


def gradient(module, batch):
    """The mean hypergradient of the first upper iteration on a batch."""
    return train(module, [batch])[0].gradients[0]


def close(found, want, tolerance=1e-10):
    """Whether named tensors are equal up to ``tolerance`` of the largest entry, names too."""
    assert set(found) == set(want)
    scale = max(float(t.abs().max()) for t in want.values())
    errors = {name: float((found[name] - t).abs().max()) for name, t in want.items()}
    assert max(errors.values()) <= tolerance * scale, (scale, errors)
