"""Each method as its equation says, in plain PyTorch: `g(e)` is the gradient at W + e of the mean
loss of one micro-batch, a list of tensors; so are W and what an equation returns."""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nso_hf.step.noise import Noise
from tests.older import IS_VERSION_4
from tests.reference import batched, causal_loss_sum, whole_noise


def norm(v):
    return torch.stack([x.norm() for x in v]).norm()


def scaled(c, v):
    return [c * x for x in v]


def along(rho, v):
    return scaled(rho / (norm(v) + 1e-12), v)


def sam(g, W, step, rho):
    return g(along(rho, g(None)))


def usam(g, W, step, rho):
    return g(scaled(rho, g(None)))


def asam(g, W, step, rho):
    g1 = g(None)
    length = norm([w.abs() * x for w, x in zip(W, g1, strict=True)]) + 1e-12
    return g([rho * w**2 * x / length for w, x in zip(W, g1, strict=True)])


def cr_sam(g, W, step, rho, gamma, beta):
    g0 = g(None)
    e = along(rho, g0)
    up, down = g(e), g(scaled(-1, e))
    return [
        p + gamma * (p + m - 2 * z) + beta * (p - m) for p, m, z in zip(up, down, g0, strict=True)
    ]


def rsam(g, W, step, rho, filter_sigma, clean_weight):
    u = []
    for index, w in zip(g.indices, W, strict=True):
        z = whole_noise(w, index, Noise(42, step, 0, 1.0))
        filters = w.flatten(1).norm(dim=1) if w.ndim > 1 else w.norm().view(1)
        u.append(filter_sigma * z * filters.view(-1, *[1] * (w.ndim - 1)))
    g1 = g(u)
    return g(scaled(rho / (clean_weight * norm(g1) + norm(u) + 1e-12), g1))


class MSAM:
    """With the momentum that the loop's own SGD keeps."""

    def __init__(self, rho):
        self.rho, self.v = rho, None

    def __call__(self, g, W, step):
        return g(along(-self.rho, self.v) if self.v is not None else None)

    def after(self, gradients, G, W):
        self.v = (
            G
            if self.v is None
            else [momentum("msam") * v + x for v, x in zip(self.v, G, strict=True)]
        )


class AsyncSAM:
    def __init__(self, rho):
        self.rho, self.previous = rho, None

    def __call__(self, g, W, step):
        return g(along(self.rho, self.previous) if self.previous is not None else None)

    def after(self, gradients, G, W):
        self.previous = G


class FSAM:
    def __init__(self, rho, forget, decay):
        self.rho, self.sigma, self.lam, self.m = rho, forget, decay, None

    def averaged(self, g1):
        m = self.m or scaled(0, g1)
        return [self.lam * a + (1 - self.lam) * b for a, b in zip(m, g1, strict=True)]

    def __call__(self, g, W, step):
        g1 = g(None)
        return g(
            along(
                self.rho,
                [x - self.sigma * m for x, m in zip(g1, self.averaged(g1), strict=True)],
            )
        )

    def after(self, gradients, G, W):
        self.m = self.averaged(gradients)  # at W, the mean over the micro-batches


class BSAM:
    """With rho, N, gamma, beta1, beta2 and delta of the paper."""

    def __init__(self, rho, num_examples, damping, beta1, beta2, weight_decay):
        self.rho, self.N, self.gamma, self.delta = rho, num_examples, damping, weight_decay
        self.beta1, self.beta2 = beta1, beta2
        self.s = self.m = None

    def __call__(self, g, W, step):
        if self.s is None:
            self.s, self.m = [torch.ones_like(w) for w in W], [torch.zeros_like(w) for w in W]
            self.sizes = []
        noise = Noise(42, step, 0, 1.0)
        z = [
            whole_noise(w, i, noise) / (self.N * s).sqrt()
            for i, w, s in zip(g.indices, W, self.s, strict=True)
        ]
        g1 = g(z)
        self.sizes.append([x.abs() for x in g1])
        return g([self.rho * x / s for x, s in zip(g1, self.s, strict=True)])

    def after(self, gradients, G, W):
        sizes = [torch.stack(x).mean(dim=0) for x in zip(*self.sizes, strict=True)]
        self.sizes = []
        for i, (g2, w) in enumerate(zip(G, W, strict=True)):
            self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * (g2 + self.delta * w)
            new = self.s[i].sqrt() * sizes[i] + self.delta + self.gamma
            self.s[i] = self.beta2 * self.s[i] + (1 - self.beta2) * new
            g2.copy_(self.m[i] / self.s[i])


def hero(g, W, step, h, strength, exact=False):
    g0 = g(None)
    length = norm([w.abs() * x for w, x in zip(W, g0, strict=True)]) + 1e-12
    e = [h * w**2 * x / length for w, x in zip(W, g0, strict=True)]
    with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
        f, parameters = g.loss(e)
    g1 = torch.autograd.grad(f, parameters, create_graph=True)
    R = sum((a - b).square().mean() for a, b in zip(g1, g0, strict=True) if a.ndim > 1)
    gradient = torch.autograd.grad(f + strength * R, parameters)
    g.back()
    return [x.detach() for x in gradient]


def zo(g, W, step, mu, k=2):
    total = [torch.zeros_like(w) for w in W]
    for j in range(k):
        noise = Noise(42, step, j, 1.0)
        z = [whole_noise(w, i, noise) for i, w in zip(g.indices, W, strict=True)]
        with torch.no_grad():
            above, below = g.loss(scaled(mu, z))[0], g.loss(scaled(-mu, z))[0]
        g.back()
        for t, x in zip(total, z, strict=True):
            t.add_((above - below) / (2 * mu) * x / k)
    return total


EQUATIONS = {
    "sam": partial(partial, sam),
    "asam": partial(partial, asam),
    "usam": partial(partial, usam),
    "rsam": partial(partial, rsam),
    "cr_sam": partial(partial, cr_sam),
    "msam": MSAM,
    "async_sam": AsyncSAM,
    "fsam": FSAM,
    "bsam": BSAM,
    "hero": partial(partial, hero),
    "zo": partial(partial, zo),
}
OPTIONS = {
    "sam": {"rho": 0.1},
    "asam": {"rho": 0.5},
    "usam": {"rho": 0.1},
    "rsam": {"rho": 0.1, "filter_sigma": 0.02, "clean_weight": 0.7},
    "cr_sam": {"rho": 0.1, "gamma": 0.2, "beta": 0.1},
    "msam": {"rho": 0.1},
    "async_sam": {"rho": 0.1},
    "fsam": {"rho": 0.1, "forget": 0.8, "decay": 0.7},
    "bsam": {
        "rho": 0.1,
        "num_examples": 1000,
        "damping": 0.1,
        "beta1": 0.8,
        "beta2": 0.9,
        "weight_decay": 0.01,
    },
    "hero": {"h": 0.1, "strength": 200.0},
    "zo": {"mu": 0.01},
}
SHARED = {"zo": {"num_perturbations": 2}}
"""What a method reads of NSO's options."""
# Weights below 2 (ulp 1.2e-7) step three times by gradients that are summed in another order.
# HERO: a difference of gradients stands for a derivative, whose part in the weights is 3e-3: 1 %.
# ZO: losses of 4 in float32 (5e-7) over 2 mu, times z (up to 4) and its rate, three times.
TOLERANCE = dict.fromkeys(EQUATIONS, 1e-6) | {"hero": 5e-5}


def momentum(name):
    """Of the SGD that a method is tried with."""
    return 0.9 if name == "msam" else 0.0


BY_OPTIONS = [name for name in EQUATIONS if not (IS_VERSION_4 and momentum(name))]
"""Methods whose optimizer can be had by options: the momentum of SGD not in older versions."""


def learning_rate(name):
    return 1e-3 if name == "zo" else 0.3


def reference_method(model, name, data, *, steps, batch, micro_batches):
    """Trains `model` in place with SGD and momentum; returns each step's loss, at the last point
    that is evaluated or, where there is one, at W. No name is plain training."""
    numbered = [(i, p) for i, p in enumerate(model.parameters()) if p.requires_grad]
    indices, parameters = zip(*numbered, strict=True)
    equation = EQUATIONS[name](**OPTIONS[name]) if name else lambda g, W, step: g(None)
    losses, velocity = [], None
    for step in range(steps):
        examples = data[step * batch : (step + 1) * batch]
        stacked = batched(examples)
        tokens = (stacked["labels"][:, 1:] != -100).sum()
        W = [p.detach().clone() for p in parameters]
        total, at_W = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        loss, size = 0.0, batch // micro_batches
        for m in range(micro_batches):
            part = {key: value[m * size : (m + 1) * size] for key, value in stacked.items()}
            seen = {}

            def g(e, part=part, W=W, tokens=tokens, at_W=at_W, seen=seen):
                for p, w, u in zip(parameters, W, e or W, strict=True):
                    p.data = w + u if e is not None else w.clone()
                model.zero_grad()
                f = causal_loss_sum(model, part) / tokens
                f.backward()
                seen[e is None] = f.item()
                gradient = [micro_batches * p.grad.clone() for p in parameters]
                for p, w, a, x in zip(parameters, W, at_W, gradient, strict=True):
                    p.data = w.clone()
                    if e is None:
                        a.add_(x / micro_batches)
                return gradient

            def loss_at(e, part=part, W=W, tokens=tokens, seen=seen):
                for p, w, u in zip(parameters, W, e, strict=True):
                    p.data = w + u
                f = micro_batches * causal_loss_sum(model, part) / tokens
                seen.setdefault("points", []).append(f.item() / micro_batches)
                return f, parameters

            def back(W=W):
                for p, w in zip(parameters, W, strict=True):
                    p.data = w.clone()

            g.loss, g.back, g.indices = loss_at, back, indices
            for t, x in zip(total, equation(g, W, step), strict=True):
                t.add_(x / micro_batches)
            points = seen.get("points", [])
            loss += seen.get(True, seen.get(False, sum(points) / max(1, len(points))))
        if hasattr(equation, "after"):
            equation.after(at_W, total, W)
        velocity = [
            t if velocity is None else momentum(name) * v + t
            for t, v in zip(total, velocity or total, strict=True)
        ]
        for p, w, v in zip(parameters, W, velocity, strict=True):
            p.data = w - learning_rate(name) * v
        losses.append(loss)
    model.zero_grad()
    return losses
