"""Agreement with PyHessian, hessian-eigenthings and curvlinops on the same model and data."""

import warnings

import pytest
import torch
from torch import nn

from nso_hf.curvature import hessian_eigenvalues, hessian_spectrum, hessian_trace

with warnings.catch_warnings():  # of their own imports
    warnings.simplefilter("ignore")
    import curvlinops
    import hessian_eigenthings
    import pyhessian


class Labelled(nn.Module):
    """Returns the loss of a classifier that they take apart from its loss."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.classifier(x), labels)}


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(2)
    classifier = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5))
    x, labels = torch.randn(32, 10), torch.randint(5, (32,))
    pairs = [(x[:16], labels[:16]), (x[16:], labels[16:])]
    return classifier, pairs, [{"x": x, "labels": y} for x, y in pairs]


@pytest.fixture(scope="module")
def ours(case):
    classifier, _, batches = case
    model = Labelled(classifier)
    return {
        "trace": hessian_trace(model, batches, num_samples=400),
        "values": hessian_eigenvalues(model, batches, k=3).values,
    }


def test_pyhessian(case, ours):
    classifier, pairs, _ = case
    theirs = pyhessian.hessian(classifier, nn.CrossEntropyLoss(), dataloader=pairs, cuda=False)
    values, _ = theirs.eigenvalues(maxIter=500, tol=1e-7, top_n=1)
    assert values[0] == pytest.approx(ours["values"][0], rel=1e-4)
    traces = torch.tensor(theirs.trace(maxIter=400, tol=0))
    error = (traces.var() / len(traces) + ours["trace"].stderr ** 2).sqrt()
    assert abs(traces.mean().item() - ours["trace"].estimate) <= 3 * error


def test_hessian_eigenthings(case, ours):
    classifier, _, batches = case
    operator = hessian_eigenthings.HessianOperator(
        Labelled(classifier), batches, lambda model, batch: model(**batch)["loss"]
    )
    found = hessian_eigenthings.lanczos(operator, k=3, max_iter=40, which="LA", seed=0)
    assert found.eigenvalues.tolist() == pytest.approx(ours["values"], rel=1e-4)
    theirs = hessian_eigenthings.trace(operator, num_matvecs=300, method="hutch++", seed=0)
    error = (theirs.stderr**2 + ours["trace"].stderr ** 2) ** 0.5
    assert abs(theirs.estimate - ours["trace"].estimate) <= 3 * error


def test_curvlinops(case, ours):
    classifier, pairs, batches = case
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    operator = curvlinops.HessianLinearOperator(
        classifier, nn.CrossEntropyLoss(), parameters, pairs, progressbar=False
    )
    dense = operator @ torch.eye(operator.shape[0])
    exact = torch.linalg.eigvalsh(dense.double())
    assert ours["values"] == pytest.approx(exact.flip(0)[:3].tolist(), rel=1e-4)
    assert abs(dense.trace().item() - ours["trace"].estimate) <= 3 * ours["trace"].stderr
    spectrum = hessian_spectrum(Labelled(classifier), batches, num_samples=10)
    squared, error = spectrum.moment(2)
    assert abs(squared - exact.square().sum().item()) <= 3 * error
