"""Edits at several sites against bare hooks, each edit one whole forward pass of its own."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_dictionary, tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.engine.components import Edit, EditPart, ErrorTerm, Heads, LatentUnits, Stream
from saepatch.engine.corruptions import Zero
from saepatch.engine.metrics import log_probability
from saepatch.engine.passes import kept_run
from saepatch.engine.plan import column_of
from saepatch.errors import UserError
from saepatch.measure.controls import control_sets
from saepatch.measure.patching import patch_by_pair, patch_components, patch_edits, patch_latents
from saepatch.measure.quality import latent_statistics
from saepatch.model.sites import READ_AT_INPUT, Site

pytestmark = pytest.mark.whole  # type checks at run time would double their time

PAIRS = [
    PromptPair("the cat sat on it", "the dog sat in it", "x", "y", "a"),
    PromptPair("a cat", "a dog", "b", "y", "b"),
    PromptPair("the bat sat on it", "the rat hid in it", "x", "z", "c"),
]
UNEQUAL = [PromptPair("a cat sat", "the horse sat", "x", "y"), PromptPair("abcdef", "abc", "x", "y")]


def hooked(model, site, edit):
    """A bare hook that passes what a site holds through a function."""
    module = model.layout.module(site)

    def on_output(_module, _args, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    def on_input(_module, args, kwargs):
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    if site.stream in READ_AT_INPUT:
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


def held(model, sites, ids):
    """What sites hold in a plain pass."""
    values = {}
    with ExitStack() as stack:
        for site in sites:
            stack.callback(hooked(model, site, lambda x, site=site: values.setdefault(site, x)).remove)
        model.hf(input_ids=ids)
    return values


def moved(component, units, x, values, at):
    """What is added to a site that holds `x` so that the units hold what they hold in `values`, at some columns."""
    mask = torch.zeros((*x.shape[:2], 1))
    mask[:, at] = 1
    if isinstance(component, LatentUnits):
        old, scale = component.dictionary.activations(x)
        new = old.clone()
        new[..., list(units)] = component.dictionary.activations(values)[0][..., list(units)]
        return mask * ((new - old) @ component.dictionary.rows) * (1 if scale is None else scale)
    if isinstance(component, ErrorTerm):
        return mask * (component.dictionary.encode(values).error - component.dictionary.encode(x).error)
    if isinstance(component, Heads):
        new = x.unflatten(-1, (component.units, -1)).clone()
        new[:, :, list(units)] = values.unflatten(-1, (component.units, -1))[:, :, list(units)]
        return mask * (new.flatten(2) - x)
    return mask * (values - x)


@torch.no_grad()
def by_hand(model, components, pair, edit, direction="denoise", chosen=None):
    """The answer's log-probability under an edit, by bare hooks in one pass over the prompt alone.

    `chosen` are the columns that parts without a position take values of the source run at; None: all ordinary ones.
    """
    known = {(component.site, component.kind): component for component in components}
    texts = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
    base, source = (torch.tensor([model.encode(text)]) for text in texts)
    sites = {part.site for part in edit.parts}
    n, shift = base.shape[1], source.shape[1] - base.shape[1]
    columns = torch.arange(n) + shift
    there = {site: x[:, columns.clamp(min=0)] for site, x in held(model, sites, source).items()}
    here = held(model, sites, base)
    chosen = chosen or [c for c in range(n) if c and c + shift > 0]  # column 0 is the BOS

    def edited(site):
        def run(x):
            total = x.clone()
            for part in edit.parts:
                if part.site == site:
                    at = (list(range(n)) if part.frozen else chosen) if part.position is None else [part.position]
                    values = here[site] if part.frozen else there[site]
                    total += moved(known[part.site, part.kind], part.units, x, values, at)
            return total

        return run

    with ExitStack() as stack:
        for site in sites:
            stack.callback(hooked(model, site, edited(site)).remove)
        logits = model.hf(input_ids=base).logits[0, -1].double()
    return float(logits.log_softmax(-1)[model.tokenizer.encode(pair.answer, add_special_tokens=False)[0]])


def part(component, units=(0,), position=None, frozen=False):
    return EditPart(component.site, tuple(units), position, component.kind, frozen)


def components_of(model, architecture="topk"):
    """Latents and errors at streams, and all else that a sweep can patch, in every layer."""
    at = {
        site: random_dictionary(site, architecture, seed=seed, d_sae=96)
        for seed, site in enumerate(("resid_post.0", "resid_post.1", "resid_pre.2", "resid_post.2"))
    }
    latents = {site: LatentUnits(dictionary) for site, dictionary in at.items()}
    errors = {site: ErrorTerm(dictionary) for site, dictionary in at.items()}
    heads = [Heads(layer, 4) for layer in range(3)] if "z" in model.layout.streams else []
    streams = [
        Stream(Site(layer, stream))
        for layer in range(3)
        for stream in ("attn_out", "mlp_out")
        if stream in model.layout.streams
    ]
    return latents, errors, heads, streams


def edits_of(latents, errors, heads, streams, half=slice(None)):
    """Groups over two and three sites: of latents, and of everything else with them; `half` thins out the streams'."""
    some, more, few = range(40), range(20, 90), range(3)
    low, middle, last = latents["resid_post.0"], latents["resid_post.1"], latents["resid_post.2"]
    edits = [
        [part(low, some), part(middle, more)],
        [part(last, more), part(low, some), part(middle, more)],  # the order they are named in is nobody's
        [part(low, few, 5), part(low, more, 5), part(middle, some, 4)],
        [part(low, some), part(latents["resid_pre.2"], more), part(errors["resid_pre.2"])],
        [part(low, more), part(errors["resid_post.0"]), part(errors["resid_post.2"], position=4)],
        [part(low, some, 5), part(middle, more, frozen=True), part(errors["resid_post.1"], frozen=True)],
        [part(low, some), part(middle, more, 5, frozen=True), part(last, some)],
    ]
    for layer, head in enumerate(heads):
        edits.append([part(low, some), part(head, (1, 3))])
        edits.append([part(head, (0, 2)), part(last, more), part(heads[layer - 1], (3,), 5)])
    edits += [[part(low, some), part(stream, position=5), part(middle, few)] for stream in streams[half]]
    both = [[part(low, more), part(streams[number - 1]), part(stream)] for number, stream in enumerate(streams)]
    edits += both[half] + [[part(low, more, 5), part(stream, frozen=True)] for stream in streams[half]]
    return [Edit.of(parts) for parts in edits]


@pytest.mark.parametrize(("number", "family"), list(enumerate(FAMILIES)))
def test_equals_bare_hooks(number, family):
    """A pair alone and among others of other lengths, by every kind of component.

    Families take turns: one in two is denoised, one in two noised, each with the other half of the streams after two.
    """
    model, direction = tiny_model(family), ("denoise", "noise")[number % 2]
    groups = components_of(model)
    components = [*groups[0].values(), *groups[1].values(), *groups[2], *groups[3]]
    edits = edits_of(*groups, half=slice(number // 2 % 2, None, 2))
    effects = patch_components(model, components, PAIRS, edits, direction=direction, metric=log_probability)
    row = 1 + number // 4 % 2
    expected = [by_hand(model, components, PAIRS[row], edit, direction) for edit in edits]
    np.testing.assert_allclose(effects.patched[row], expected, atol=1e-5, rtol=0)
    moves = np.abs(effects.change).max(0)
    assert (moves > 1e-3).sum() > 0.9 * len(edits)


@pytest.mark.parametrize("way", kept_run.WAYS)
def test_every_way_of_resuming(way, monkeypatch):
    """One edit at a time and many, over prompts that are padded on the left."""
    model = tiny_model("gpt_neox")
    groups = components_of(model, "jumprelu")
    components = [*groups[0].values(), *groups[1].values(), *groups[2], *groups[3]]
    edits = [e for e in edits_of(*groups) if all(p.position is None for p in e.parts)]
    monkeypatch.setattr(kept_run, "WAYS", (way, "whole") if way != "whole" else ("whole",))
    expected = [[by_hand(model, components, pair, edit) for edit in edits] for pair in UNEQUAL]
    for batch_size in (1, None):
        effects = patch_components(
            model, components, UNEQUAL, edits, metric=log_probability, align="right", batch_size=batch_size
        )
        np.testing.assert_allclose(effects.patched, expected, atol=1e-5, rtol=0)


def test_a_dictionary_that_normalises_its_input():
    """Latents are written in the scale of the edited run's own value."""
    model = tiny_model("llama")
    several = [
        LatentUnits(random_dictionary(site, "standard", seed=seed, normalize_activations="layer_norm"))
        for seed, site in enumerate(("resid_post.0", "resid_post.1"))
    ]
    edit = Edit.of([part(each, range(20)) for each in several])
    effects = patch_components(model, several, PAIRS[:1], [edit], metric=log_probability)
    assert effects.patched[0, 0] == pytest.approx(by_hand(model, several, PAIRS[0], edit), abs=1e-5)


def test_units_are_set_and_not_only_shifted():
    """A latent that is the same in both runs undoes what the others change in it."""
    model, low = tiny_model(), random_dictionary("resid_post.0")
    above = LatentUnits(random_dictionary("resid_post.1", "standard", seed=5))
    together = Edit.of([part(LatentUnits(low), range(48)), part(above, range(48))])
    shifted = Edit.of([part(LatentUnits(low), range(48)), part(above, range(48), frozen=True)])
    effects = patch_components(model, [low, above], PAIRS[:1], [together, shifted], metric=log_probability)
    alone = patch_components(model, low, PAIRS[:1], [Edit(low.site, tuple(range(48)))], metric=log_probability)
    for column, edit in enumerate((together, shifted)):
        expected = by_hand(model, [LatentUnits(low), above], PAIRS[0], edit)
        assert effects.patched[0, column] == pytest.approx(expected, abs=1e-5)
        assert abs(effects.patched[0, column] - alone.patched[0, 0]) > 1e-3


def test_chosen_positions_bound_what_acts_and_not_what_is_frozen():
    """Downstream, too: acting units take source values at the chosen position alone, frozen ones hold everywhere."""
    model = tiny_model()
    low, high = (LatentUnits(random_dictionary(f"resid_post.{layer}", seed=layer)) for layer in (0, 1))
    whole = range(48)
    edits = [
        Edit.of([part(low, whole), part(high, whole)]),
        Edit.of([part(low, whole), part(high, whole, frozen=True)]),
        Edit.of([part(low, range(24)), part(high, range(24)), part(high, range(24, 48), frozen=True)]),
    ]
    options = {"positions": 5, "metric": log_probability}
    together = patch_components(model, [low, high], PAIRS[:1], edits, **options).patched[0]
    alone = patch_components(model, [low, high], PAIRS[:1], edits, each_position=True, **options)
    for number, edit in enumerate(edits):
        expected = by_hand(model, [low, high], PAIRS[0], edit, chosen=[5])
        assert together[number] == pytest.approx(expected, abs=1e-5)
        assert alone.patched[0, number] == pytest.approx(expected, abs=1e-5)
    # what differs between these: source values at all columns, and base values at that column only
    everywhere = [by_hand(model, [low, high], PAIRS[0], edit) for edit in edits]
    assert np.abs(together - everywhere).min() > 1e-3


def test_positions_count_a_prompts_own_tokens():
    """From 0, whatever is padded in front of it in its batch."""
    model, stream = tiny_model(), Stream(Site(0, "resid_post"))
    edits = [(row, Edit.of([part(stream, position=position)])) for row, position in ((0, 8), (1, 3), (1, -2))]
    values = patch_edits(model, [stream], UNEQUAL, edits, metric=log_probability, align="right")
    for value, (row, edit) in zip(values, edits, strict=True):
        assert value == pytest.approx(by_hand(model, [stream], UNEQUAL[row], edit), abs=1e-5)
    assert len(set(values.tolist())) == 3


def test_each_position_alone_and_listed_edits():
    model = tiny_model("gpt2")
    several = [LatentUnits(random_dictionary(site, seed=i)) for i, site in enumerate(("resid_post.0", "mlp_out.2"))]
    edit = Edit.of([part(each, range(48)) for each in several])
    effects = patch_components(model, several, PAIRS, [edit], each_position=True, metric=log_probability)
    listed = [(row, each) for row in range(3) for each in effects.edits if effects.ran[row, effects.edits.index(each)]]
    assert len(listed) > 8
    assert {p.position for _, each in listed for p in each.parts} == {each.position for _, each in listed}
    again = patch_edits(model, several, PAIRS, listed, metric=log_probability)
    for value, (row, each) in zip(again, listed, strict=True):
        assert value == pytest.approx(effects.patched[row, effects.edits.index(each)], abs=1e-6)
        assert value == pytest.approx(by_hand(model, several, PAIRS[row], each), abs=1e-5)
    mine = patch_by_pair(model, several, PAIRS, [[each for r, each in listed if r == row] for row in range(3)])
    assert [len(each.edits) for each in mine] == [sum(r == row for r, _ in listed) for row in range(3)]


def test_a_group_of_latents_over_sites_has_controls_at_each():
    model = tiny_model()
    low, high = random_dictionary("resid_post.0", d_sae=96), random_dictionary("resid_post.1", d_sae=96, seed=1)
    effects = patch_latents(
        model, [low, high], PAIRS, [{low.site: [3, 7, 9], "resid_post.1": [5]}, {high.site: [8]}], controls=3
    )
    given, single = (effects.edits[i] for i in effects.where("given"))
    assert given.place == "resid_post.0 | resid_post.1"
    assert single.place == "resid_post.1"
    for role in ("random", "matched"):
        drawn = [effects.edits[i] for i in effects.where(role)]
        assert [[len(p.units) for p in edit.parts] for edit in drawn] == [[3, 1]] * 3 + [[1]] * 3
        assert all(edit.beside_key == (given if len(edit.parts) == 2 else single).key for edit in drawn)
        assert all(not set(p.units) & set(p.beside) for edit in drawn for p in edit.parts)
        assert effects.controls(given, role) is not None
    for number, (dictionary, ids) in enumerate([(low, (3, 7, 9)), (high, (5,))]):  # sites draw with seeds of their own
        prompts = model.tokenize([text for pair in PAIRS for text in (pair.clean, pair.corrupted)])
        sets = control_sets(ids, len(ids), latent_statistics(model, dictionary, prompts), number, 3)
        for role, several in zip(("random", "matched"), sets, strict=True):
            parts = [effects.edits[i].parts[number].units for i in effects.where(role)[:3]]
            assert parts == [tuple(sorted(some)) for some in several]
    rows = [row for row in effects.rows("t") if row.role == "given" and "|" in row.site]
    assert {(row.site, row.component, row.latent, row.position) for row in rows} == {
        ("resid_post.0 | resid_post.1", "latent", "3,7,9 | 5", "all")
    }
    assert "resid_post.0 | resid_post.1 3,7,9 | 5" in effects.summary()
    named = LatentSet.parse("resid_post.0: 3,7; 9 | resid_post.1: 5")
    apart, together = (patch_latents(model, [low, high], PAIRS, some, controls=0).edits for some in (named, [named]))
    assert [(edit.site, edit.units) for edit in apart] == [(low.site, (3, 7)), (low.site, (9,)), (high.site, (5,))]
    assert [edit.key for edit in together] == [given.key]


def test_what_an_edit_may_not_hold():
    model = tiny_model()
    low, high = (LatentUnits(random_dictionary(site)) for site in ("resid_post.0", "resid_pre.1"))
    stream, error = Stream(low.site), ErrorTerm(low.dictionary)

    def run(*parts, **options):
        return patch_components(model, [low, high, stream, error], PAIRS, [Edit.of(parts)], **options)

    with pytest.raises(UserError, match="write the same tensor"):
        run(part(low), part(high))
    with pytest.raises(UserError, match="write the same tensor"):
        run(part(low), part(stream))
    with pytest.raises(UserError, match="in two parts of one edit"):
        run(part(low, (1, 2)), part(low, (2, 3), 1))
    with pytest.raises(UserError, match="takes values of the source run: give one"):
        run(part(low, frozen=True))
    with pytest.raises(UserError, match="have their own positions"):
        run(part(low, (1,), 1), part(error, position=2), each_position=True)
    with pytest.raises(UserError, match="position 99 is out of range"):
        run(part(low, range(48)), part(error, position=99))
    with pytest.raises(UserError, match="one component at a time"):
        run(part(low), part(error), corruption=Zero())


def test_a_stream_changes_at_the_chosen_positions_only():
    base, values = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    values[1, 2] = 0  # nothing differs here
    where = torch.tensor([[True, False, False, True], [False, False, True, True]])
    changes = Stream(Site(0)).write(base, values, where)
    assert list(zip(changes.row.tolist(), changes.pos.tolist(), strict=True)) == [(0, 0), (0, 3), (1, 3)]
    assert torch.equal(changes.vectors(torch.tensor([1])), torch.ones(1, 3))


def test_an_edit_moves_to_a_position_without_its_frozen_parts():
    edit = Edit.of([part(Stream(Site(0))), part(Stream(Site(1))), part(Stream(Site(2)), frozen=True)])
    moved = edit.at(3)
    assert [(each.frozen, each.position) for each in moved.parts] == [(False, 3), (False, 3), (True, None)]


def test_columns_of_positions_in_prompts_padded_on_the_left():
    assert [column_of(position, 3, 5) for position in (0, 2, -1, -3)] == [2, 4, 4, 2]
    for outside in (3, -4):
        with pytest.raises(UserError, match=f"position {outside} is out of range: the prompt has 3 tokens"):
            column_of(outside, 3, 5)


def test_a_stream_differs_where_any_of_its_dimensions_does():
    base = torch.zeros(1, 3, 4)
    values = base.index_put((torch.tensor(0), torch.tensor(1), torch.tensor(2)), torch.tensor(1.0))
    changes = Stream(Site(0)).write(base, values, torch.ones(1, 3, dtype=torch.bool))
    assert (changes.row.tolist(), changes.pos.tolist()) == ([0], [1])
