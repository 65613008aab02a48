"""Latents by site: one grammar, there and back."""

import itertools

import pytest
from tiny import random_dictionary

from saepatch.dictionaries.latent_set import LatentSet
from saepatch.errors import UserError
from saepatch.model.sites import Site

HERE, THERE = Site(3), Site(2, "resid_pre")
READ = [
    ("", LatentSet()),
    ("417", LatentSet((), ((417,),))),
    (" 3, 17;5;5 ", LatentSet((), ((3, 17), (5,)))),
    ("all", LatentSet((), None)),
    ("resid_post.3: 281; 3,17", LatentSet(((HERE, ((281,), (3, 17))),))),
    ("blocks.3.hook_resid_post:1,1|resid_pre.2: all", LatentSet(((HERE, ((1,),)), (THERE, None)))),
    ("resid_post.3: 1 | resid_post.3: 2;1", LatentSet(((HERE, ((1,), (2,))),))),
    ("resid_post.3: 1 | resid_post.3: all | resid_post.3: 2", LatentSet(((HERE, None),))),
]


@pytest.mark.parametrize(("text", "latents"), READ, ids=[text for text, _ in READ])
def test_a_text_is_read(text, latents):
    assert LatentSet.parse(text) == latents


GROUPS = [None, ((0,),), ((281,), (3, 17)), ((5, 2, 9), (2,))]


@pytest.mark.parametrize("groups", list(itertools.product([(), *GROUPS], repeat=2)))
def test_what_is_written_is_read_again(groups):
    named = LatentSet(tuple((s, g) for s, g in zip((HERE, THERE), groups, strict=True) if g != ()))
    unnamed = LatentSet((), groups[0])
    for latents in (named, unnamed):
        assert LatentSet.parse(str(latents)) == latents
        assert hash(LatentSet.parse(str(latents))) == hash(latents)
    flat = LatentSet.of(named)
    assert LatentSet.from_facts(flat.facts()) == flat == dict(named)


@pytest.mark.parametrize(
    "text", ["3;", ",3", "3 17", "x", "-1", "1.5", "3 | resid_post.4: 5", "resid_post.3:", "3|", "all,3"]
)
def test_a_text_of_another_form_is_refused(text):
    with pytest.raises(UserError, match="semicolons between groups") as refused:
        LatentSet.parse(text)
    assert repr(text) in str(refused.value)


def test_an_unknown_site_is_refused():
    with pytest.raises(UserError, match=r"resid_past"):
        LatentSet.parse("resid_past.3: 1")


def test_as_a_mapping_it_has_each_sites_latents_once():
    latents = LatentSet.parse("resid_post.3: 7; 3,7 | resid_pre.2: all")
    assert dict(latents) == {HERE: (7, 3), THERE: None}
    assert latents.groups(HERE) == ((7,), (3, 7))
    assert latents.groups(THERE) is None
    assert latents.facts() == {"resid_post.3": [7, 3], "resid_pre.2": None}
    assert latents == {HERE: (7, 3), THERE: None}
    assert latents != {HERE: (7, 3)}
    assert latents != LatentSet.of({HERE: (7, 3), THERE: None})  # other groups
    assert LatentSet.parse("5")
    assert not LatentSet()


def test_unnamed_latents_are_those_of_the_only_site():
    assert LatentSet.parse("5;6").at([HERE]) == LatentSet.parse("resid_post.3: 5;6")
    assert LatentSet.parse("resid_pre.2: 5").at([HERE]) == LatentSet.parse("resid_pre.2: 5")
    same = Site(4, "resid_pre")  # the tensor of resid_post.3
    assert LatentSet.parse("resid_post.3: 5; 1,6").at([same]) == LatentSet(((same, ((5,), (1, 6))),))
    with pytest.raises(UserError, match=r"'5; 6' name no site, and the sites are resid_post\.3, resid_pre\.2"):
        LatentSet.parse("5;6").at([HERE, THERE])


def test_sizes_and_ids_are_those_of_the_dictionaries():
    dictionary = random_dictionary()
    site = dictionary.site
    some, everything = LatentSet.of({site: [0, 2]}), LatentSet.all_of([site])
    assert (some.size({site: dictionary}), everything.size({site: dictionary})) == (2, dictionary.d_sae)
    assert LatentSet.of({site: ()}).size({site: dictionary}) == 0
    some.check({site: dictionary})
    with pytest.raises(UserError, match="out of range"):
        LatentSet.of({site: [dictionary.d_sae]}).check({site: dictionary})
    with pytest.raises(UserError, match="latents of resid_pre"):
        LatentSet.all_of([THERE]).check({site: dictionary})


def test_where_latents_have_to_be_spelt_out_all_is_refused():
    assert LatentSet.parse("resid_post.3: 1;2,1").spelt() == {HERE: (1, 2)}
    for text in ("all", "resid_post.3: 1 | resid_pre.2: all"):
        with pytest.raises(UserError, match="'all' is not possible here"):
            LatentSet.parse(text).spelt()
