import copy

import pytest
import torch

from cmfast.evaluation import Classifier
from cmfast.evaluation.classifier import feature_statistics
from cmfast.training import Dataset
from cmfast.training.batches import Batches
from cmfast.training.classifier import train_classifier


def images(count):
    generator = torch.Generator().manual_seed(3)
    return Dataset(torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(count) % 2)


def test_classifier_training_is_adams_on_shifted_images():
    """Cross entropy with smoothed labels (Szegedy et al. 2016, section 7), the learning rate falling to 0 linearly."""
    data, test, count = images(300), images(20), 4
    losses = []
    torch.manual_seed(99)
    found = train_classifier(data, test, iterations=count, progress=lambda i, loss: losses.append((i, loss)))

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    classifier = Classifier(1, 8, 2).train()
    start = copy.deepcopy(classifier)
    batches, optimizer, expected = Batches(data, 128, 0), torch.optim.Adam(classifier.parameters()), []
    for i in range(count):
        pixels, labels = batches.part(i)
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        logits = classifier(torch.roll(torch.roll(pixels, down, 2), right, 3)).log_softmax(1)
        smooth = 0.95 * torch.nn.functional.one_hot(labels, 2) + 0.05 / 2
        loss = -(smooth * logits).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - i / count)
        optimizer.step()
        expected.append((i, pytest.approx(loss.item(), rel=1e-3)))
    assert losses == expected
    a, b, before = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (found, classifier, start))
    assert (b - before).norm() > 1e-3
    assert (a - b).norm() < 0.06 * (b - before).norm()
    assert not found.training
    assert all(torch.equal(p, p.half().float()) for p in found.parameters())  # as they are stored
    for name, pixels in (("train", data.images), ("test", test.images)):
        for stored, value in zip(found.statistics(name), feature_statistics(found.features(pixels)), strict=True):
            torch.testing.assert_close(stored, value.float())
    other = train_classifier(data, test, iterations=1, seed=1)
    assert not torch.equal(other.conv1.weight, train_classifier(data, test, iterations=1).conv1.weight)
