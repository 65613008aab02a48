"""Counts, histograms and peaks of streams of texts, against all activations held at once."""

import math

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.reading.activity import Activity
from saepatch.reading.cards import read_latents

LATENTS, EXAMPLES = 7, 3


def random_texts(n, seed=0):
    """Token ids, of which 0 is a BOS, and activations: sparse, some negative, larger and larger as texts go by."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(n):
        length = int(torch.randint(2, 60, (1,), generator=generator))
        ids = torch.cat([torch.zeros(1).long(), torch.randint(1, 9, (length,), generator=generator)])
        acts = torch.randn(length + 1, LATENTS, generator=generator) * 1.1**number
        acts[torch.rand(acts.shape, generator=generator) < 0.8] = 0
        acts[:, 0] = acts[:, 0].abs()
        acts[:, 1] = -acts[:, 1].abs()
        acts[:, 2] = 0
        found.append((ids, acts))
    found[5] = found[n // 2]  # one that is there twice
    return found


def streamed(texts, batch, side):
    found = Activity(LATENTS, EXAMPLES)
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        width = max(len(ids) for ids, _ in some)
        ids, real = torch.zeros(len(some), width).long(), torch.zeros(len(some), width).bool()
        acts = torch.full((len(some), width, LATENTS), 1e6)  # of padding, which says nothing
        for row, (own, values) in enumerate(some):
            at = slice(width - len(own), width) if side == "left" else slice(0, len(own))
            ids[row, at], real[row, at], acts[row, at] = own, True, values
        found.add(ids, real, real & (ids != 0), acts)
    return found


@pytest.mark.parametrize(("batch", "side"), [(1, "left"), (4, "left"), (9, "right"), (40, "right")])
def test_a_stream_of_texts_is_all_of_them_at_once(batch, side):
    texts = random_texts(40)
    found = streamed(texts, batch, side)
    whole = torch.cat([acts[1:] for _, acts in texts])  # without the BOS
    assert (found.texts, found.tokens) == (40, len(whole))
    assert found.count.tolist() == (whole != 0).sum(0).tolist()
    torch.testing.assert_close(found.total, whole.double().sum(0), rtol=1e-5, atol=1e-4)
    assert found.maximum.tolist() == whole.amax(0).clamp(min=0).tolist()
    for latent in range(LATENTS):
        check_histogram(*found.histogram(latent), whole[:, latent][whole[:, latent] != 0].numpy())
        check_peaks(found.peaks[latent], texts, latent)
        check_bands(found, texts, latent)


def check_bands(found, texts, latent):
    """Of each power of two, the first two texts whose largest activation has it; of these, those in the two bands."""
    kept, stretches = {}, set()
    for number, (ids, acts) in enumerate(texts):
        values = acts[1:, latent].tolist()
        value = max(values)
        place = 1 + values.index(value)
        stretch = tuple(ids[max(0, place - 24) : place + 9].tolist())
        octave = kept.setdefault(math.frexp(value)[1], [])
        if value > 0 and len(octave) < 2 and stretch not in stretches:
            octave.append((number, value, stretch))
            stretches.add(stretch)
    top = float(found.maximum[latent])
    best = {peak.ids for peak in found.peaks[latent]}
    fitting = sorted(each for octave in kept.values() for each in octave if each[2] not in best)
    middle = [each for each in fitting if 0.25 * top < each[1] <= 0.5 * top][:2]
    low = [each for each in fitting if 0 < each[1] <= 0.25 * top][:2]
    told = [(peak.text, pytest.approx(peak.largest), peak.ids) for peak in found.bands(latent)]
    assert told == middle + low
    assert (len(told) > 2) == (latent not in (1, 2)), "the test would see nothing"
    for peak in found.bands(latent):
        assert max(peak.acts) == peak.largest


def check_histogram(counts, edges, values):
    if not len(values):
        assert (counts, edges) == ((), (0.0,))
        return
    assert len(counts) == len(edges) - 1 == 20
    assert list(counts) == np.histogram(values, np.array(edges))[0].tolist()
    assert sum(counts) == len(values)
    assert np.allclose(np.diff(edges), (edges[-1] - edges[0]) / 20)
    low, high = min(0.0, values.min()), max(0.0, values.max())
    assert edges[0] <= low
    assert edges[-1] >= high
    assert edges[-1] - edges[0] <= 1.05 * (high - low)


def check_peaks(peaks, texts, latent):
    stretches = []
    for number, (ids, acts) in enumerate(texts):
        own = acts[:, latent].clone()
        own[0] = 0
        if float(own.max()) > 0:
            place = int(own.argmax())
            cut = slice(max(0, place - 24), place + 9)
            stretches.append((float(own.max()), number, tuple(ids[cut].tolist()), tuple(own[cut].tolist())))
    expected = []
    for stretch in sorted(stretches, key=lambda one: (-one[0], one[1])):
        if stretch[2] not in {one[2] for one in expected}:
            expected.append(stretch)
    assert [(p.largest, p.text, p.ids, p.acts) for p in peaks] == expected[:EXAMPLES]


def test_what_is_kept_does_not_grow_with_the_texts():
    def kept(found):
        return [found._bins[0].shape, found._bins[1].shape, max(map(len, found.peaks))]

    assert kept(streamed(random_texts(12), 4, "left")) == kept(streamed(random_texts(90), 4, "left"))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_cards_of_every_latent_from_a_generator(architecture):
    model, dictionary = tiny_model(), random_dictionary(architecture=architecture)
    texts = ["the cat sat", "a dog", "birds fly high up", "the cat sat", "xyz"]
    together = read_latents(model, dictionary, range(48), model.tokenize(texts), batch_size=5)
    held = []
    model.hf.get_input_embeddings().register_forward_hook(lambda _m, args, _o: held.append(len(args[0])))
    streaming = read_latents(model, dictionary, range(48), (text for text in texts), batch_size=2)
    assert held[:3] == [2, 2, 1]
    for one, other in zip(together, streaming, strict=True):
        assert (one.latent, one.texts, one.tokens, one.frequency) == (
            other.latent,
            other.texts,
            other.tokens,
            other.frequency,
        )
        assert one.maximum == pytest.approx(other.maximum, abs=1e-5)
        assert [(e.text, e.tokens) for e in one.examples] == [(e.text, e.tokens) for e in other.examples]
        assert sum(one.counts) == sum(other.counts)
        (alone,) = read_latents(model, dictionary, [one.latent], texts)
        assert (alone.raises, [n for n, _ in alone.neighbours]) == (one.raises, [n for n, _ in one.neighbours])
