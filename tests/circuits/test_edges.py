"""Edges against the literal definitions: loops of automatic differentiation and plain hooks, written here."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from bare_hooks import forward
from tiny import random_dictionary, tiny_model

import saepatch as sp
from saepatch.circuits.circuit import TARGET
from saepatch.circuits.edges import ledger
from saepatch.circuits.edges.backward import gim, relp
from saepatch.circuits.edges.edge_runs import EdgeRuns
from saepatch.circuits.edges.jacobians import EdgeSpan, Movers, Products, Readers
from saepatch.circuits.edges.paths import path_patches
from saepatch.circuits.nodes import Edge, Node, node_sites
from saepatch.engine.components import Heads, Stream
from saepatch.engine.metrics import log_probability
from saepatch.engine.spans import SpanGraph
from saepatch.errors import UserError
from saepatch.model.sites import Site

pytestmark = pytest.mark.whole

PAIR = sp.PromptPair("cat", "dot", "x", "y", "a")
UP, DOWN = Site(0), Site(1)
ALL = sp.SweepOptions(metric=log_probability)


@cache
def model(family="llama"):
    return tiny_model(family)


@cache
def dictionaries(up="topk", down="jumprelu"):
    return [random_dictionary("resid_post.0", up, seed=1), random_dictionary("resid_post.1", down, seed=2)]


def values(model, text, sites):
    seen = {}
    forward(model, text, {site: lambda x, site=site: seen.setdefault(site, x.detach().clone()) for site in sites})
    return seen


def answer(model):
    return model.encode("x")[-1]


def written(kind, dictionary, x, unit, heads=4):
    """What a node adds to its site where the site's value is x, as a differentiable function."""
    if kind == "latent":
        return dictionary.sae.encode(x)[..., unit, None] * dictionary.rows[unit]
    if kind == "error":
        return x - dictionary.sae.decode(dictionary.sae.encode(x))
    if kind == "head":
        mask = torch.zeros(heads, x.shape[-1] // heads)
        mask[unit] = 1
        return x * mask.flatten()
    return x


def gradient_at(model, text, site):
    """Gradient of the answer's log-probability at a site of the unedited run."""
    leaf = []

    def record(x):
        leaf.append(x.detach().requires_grad_())
        return leaf[0]

    logp = forward(model, text, {site: record}).log_softmax(-1)[answer(model)]
    return torch.autograd.grad(logp, leaf[0])[0]


def by_loop(model, edge, dictionary_of, held=(), text=PAIR.corrupted, other=PAIR.clean):
    """One estimate: a whole pass with a graph from the upstream site on, and one backward pass from one node."""
    up, down = edge.up, edge.down
    here, there = values(model, text, [up.site, *held]), values(model, other, [up.site])
    leaf, reached = here[up.site].clone().requires_grad_(), {}
    edits = {site: lambda x, site=site: here[site] for site in held} | {up.site: lambda _: leaf}
    if down.site is None:
        worth = forward(model, text, edits).log_softmax(-1)[answer(model)]
    else:
        forward(model, text, edits | {down.site: lambda x: reached.setdefault("x", x)})
        g = gradient_at(model, text, down.site)[0, down.position]
        new = written(down.kind, dictionary_of.get(down.site), reached["x"][:, down.position], down.unit)
        worth = (g * new).sum()
    jacobian = torch.autograd.grad(worth, leaf)[0][0, up.position]
    old, new = (
        written(up.kind, dictionary_of.get(up.site), run[up.site][:, up.position], up.unit) for run in (here, there)
    )
    return float((jacobian * (new - old)[0]).sum())


@torch.no_grad()
def by_hooks(model, edge, dictionary_of, held=(), text=PAIR.corrupted, other=PAIR.clean):
    """One exact path patch: three runs under plain hooks."""
    up, down = edge.up, edge.down
    sites = [up.site, *held, *([] if down.site is None else [down.site])]
    here, there = values(model, text, sites), values(model, other, [up.site])

    def at(site, node, run, before):
        x = before.clone()
        new, old = (written(node.kind, dictionary_of.get(site), r[:, node.position], node.unit) for r in (run, before))
        x[:, node.position] += new - old
        return x

    patched = at(up.site, up, there[up.site], here[up.site])
    edits = {site: lambda x, site=site: here[site] for site in held} | {up.site: lambda _: patched}
    base = forward(model, text, {}).log_softmax(-1)[answer(model)]
    if down.site is None:
        return float(forward(model, text, edits).log_softmax(-1)[answer(model)] - base)
    reached = {}
    forward(model, text, edits | {down.site: lambda x: reached.setdefault("x", x)})
    final = at(down.site, down, reached["x"], here[down.site])
    return float(forward(model, text, {down.site: lambda _: final}).log_softmax(-1)[answer(model)] - base)


def compared(model, patchables, how, held_of, expected, n=12, **options):
    """Some edges: our estimates (or exact values) and the literal ones."""
    result = sp.edges(model, patchables, [PAIR], how, ALL, **options)
    known = {d.site: d for d in patchables if hasattr(d, "sae")}
    drawn = np.random.default_rng(0).permutation(len(result))[:n].tolist()
    chosen = [(result.edge(i), float(result.score[i])) for i in drawn]
    return result, [(score, expected(model, edge, known, held_of(edge))) for edge, score in chosen]


def agree(both, tolerance=1e-3):
    ours, expected = np.array(both).T
    np.testing.assert_allclose(ours, expected, atol=tolerance * np.abs(expected).max(), rtol=tolerance)


NONE = sp.EdgeOptions(verify=0, sample=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_estimates_are_those_of_a_loop(family):
    """Residual latents and errors, through attention, MLPs and post-norms; no edge is missing."""
    patchables = dictionaries()
    result, both = compared(model(family), patchables, NONE, lambda e: (), by_loop)
    agree(both)
    kinds = {(result.parts[up][1], result.parts[down][1]) for up, down in np.unique(result.names[[1, 4]], axis=1).T}
    assert kinds == {(up, down) for up in ("latent", "error") for down in ("latent", "error", "logits")}


@pytest.mark.parametrize(("layer", "local"), [(1, True), (2, False)])
def test_keys_and_values_stand_for_earlier_columns_over_one_block_only(layer, local, monkeypatch):
    """Over two blocks, they depend on earlier columns themselves; both ways give what the loop gives."""
    spans, sites = [], []
    made, backward = EdgeSpan.products, EdgeSpan._from_leaves

    def noted(span, readers):
        spans.append(span)
        return made(span, readers)

    def counted(span, p, cotangent):
        sites.append(p)
        return backward(span, p, cotangent)

    monkeypatch.setattr(EdgeSpan, "products", noted)
    monkeypatch.setattr(EdgeSpan, "_from_leaves", counted)
    later = random_dictionary(f"resid_post.{layer}", "topk", seed=3)
    agree(compared(model(), [dictionaries()[0], later], NONE, lambda e: (), by_loop)[1])
    assert spans
    assert all(span.graph.is_local() == local for span in spans)
    assert len(sites) == 1 if local else len(set(sites)) == 3  # once, to check; or at every position


def test_a_wrong_short_cut_is_not_taken(monkeypatch, caplog):
    """Where carried movers do not give what whole passes give, these are used, with a warning."""
    right = SpanGraph.carried
    monkeypatch.setattr(SpanGraph, "carried", lambda *given: 1.01 * right(*given))
    agree(compared(model(), dictionaries(), NONE, lambda e: (), by_loop)[1])
    assert "differ from those by whole passes" in caplog.text


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk"])
def test_every_encoder_is_differentiated(architecture):
    agree(compared(model(), dictionaries("standard", architecture), NONE, lambda e: (), by_loop)[1])


def test_an_unknown_encoder_is_differentiated_automatically(monkeypatch):
    monkeypatch.setattr("saepatch.circuits.edges.jacobians.SLOPES", set())
    agree(compared(model(), dictionaries(), NONE, lambda e: (), by_loop)[1])


def mixed():
    return [Heads(0, 4), Stream(Site(1, "mlp_out")), random_dictionary("resid_post.2", "topk", seed=3)]


def held_between(edge):
    """Of the mixed nodes, those between two others."""
    order = (10**9, 0) if edge.down.site is None else edge.down.site.order
    sites = [Site(0, "z"), Site(1, "mlp_out"), Site(2)]
    return [site for site in sites if edge.up.site.order < site.order < order]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_heads_mlps_and_latents_with_nodes_between_held(family):
    """Nodes between two others are held; no edge passes a residual stream that has nodes."""
    result, both = compared(model(family), mixed(), NONE, held_between, by_loop)
    agree(both)
    sites = {(str(result.parts[u][0]), str(result.parts[d][0])) for u, d in np.unique(result.names[[1, 4]], axis=1).T}
    assert sites == {
        ("z.0", "mlp_out.1"),
        ("z.0", "resid_post.2"),
        ("mlp_out.1", "resid_post.2"),
        ("resid_post.2", "None"),
    }


@pytest.mark.parametrize("paths", [sp.Paths(mlp=False), sp.Paths(attention=False), sp.Paths(False, False)])
def test_closed_paths_are_held(paths):
    closed = [Site(1, s) for s, is_open in (("attn_out", paths.attention), ("mlp_out", paths.mlp)) if not is_open]
    after = [Site(2, s.stream) for s in closed]

    def held(edge):
        return after if edge.down.site is None else closed

    how = sp.EdgeOptions(paths=paths, verify=0, sample=0)
    agree(compared(model(), dictionaries(), how, held, by_loop)[1])
    how = sp.EdgeOptions(paths=paths, verify=8, sample=8)
    exact_agrees(model(), dictionaries(), how, held)


def exact_agrees(model, patchables, how, held_of, **options):
    result = sp.edges(model, patchables, [PAIR], how, ALL, **options)
    known = {d.site: d for d in patchables if hasattr(d, "sae")}
    texts = {} if options.get("direction") != "noise" else {"text": PAIR.clean, "other": PAIR.corrupted}
    sign = 1 if not texts else -1
    expected = [sign * by_hooks(model, edge, known, held_of(edge), **texts) for _, edge in result.checked]
    agree(list(zip(result.verified.exact, expected, strict=True)))
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_exact_path_patches_are_those_of_plain_hooks(family):
    result = exact_agrees(model(family), dictionaries(), sp.EdgeOptions(verify=12, sample=12), lambda e: ())
    assert result.verified.others == result.total - 12
    assert len(set(result.checked)) == 24


def test_exact_path_patches_among_heads_mlps_and_latents_noising():
    exact_agrees(model(), mixed(), sp.EdgeOptions(verify=10, sample=10), held_between, direction="noise")


def test_integrated_edges_sum_to_what_setting_the_site_does():
    """All edges into one node: its mean gradient times its change when the whole upstream site is set."""
    up, down = dictionaries("standard", "standard")
    result = sp.edges(model(), [up, down], [PAIR], sp.EdgeOptions(sp.Linear(steps=8), verify=0, sample=0), ALL)
    screen = sp.attribute(model(), down, [PAIR], sp.IntegratedGradients(8), options=ALL)
    there, reached = values(model(), PAIR.clean, [UP, DOWN]), {}
    forward(model(), PAIR.corrupted, {UP: lambda x: there[UP], DOWN: lambda x: reached.setdefault("x", x.detach())})
    here = values(model(), PAIR.corrupted, [DOWN])
    before, after, source = (down.activations(x)[0][0, -1] for x in (here[DOWN], reached["x"], there[DOWN]))
    last, both = len(model().encode(PAIR.clean)) - 1, []
    for latent in (source - before).abs().argsort(descending=True)[:12].tolist():
        node = (screen.position == last) & (screen.unit == latent)
        into = (result.names[4] == 2) & (result.names[5] == latent) & (result.names[6] == last)
        slope = float(screen.score[node][0]) / float(source[latent] - before[latent])
        expected = slope * float(after[latent] - before[latent])
        both.append((result.score[into].sum(), expected))
    agree(both, 0.05)


def test_relevance_is_conserved():
    """In a Llama without biases, RelP's gradient times a site's value is the logit; edges use the same gradients."""
    m, embedded, answered = model(), Site(0, "resid_pre"), answer(model())
    here, there = (values(m, text, [embedded])[embedded] for text in (PAIR.corrupted, PAIR.clean))
    with relp(m):
        leaf, reached = here.clone().requires_grad_(), {}
        edits = {embedded: lambda _: leaf, Site(2): lambda x: reached.setdefault("x", x)}
        logit = forward(m, PAIR.corrupted, edits)[answered]
        gradient = torch.autograd.grad(logit, leaf, retain_graph=True)[0]
        end = reached["x"].detach().requires_grad_()
        logp = forward(m, PAIR.corrupted, {Site(2): lambda _: end}).log_softmax(-1)[answered]
        g = torch.autograd.grad(logp, end)[0][0, -1]
        jacobian = torch.autograd.grad((reached["x"][0, -1] * g).sum(), leaf)[0][0]
    assert float((gradient * here).sum()) == pytest.approx(float(logit.detach()), rel=1e-3)
    how = sp.EdgeOptions(sp.Linear(backward=relp), verify=0, sample=0)
    result = sp.edges(m, [Stream(embedded), Stream(Site(2))], [PAIR], how, ALL)
    assert min(result.acted.values()) > 0
    into_last = [i for i in range(len(result)) if result.names[6, i] == 3 and result.names[4, i] == 1]
    expected = (jacobian * (there - here)[0]).sum(-1).tolist()
    agree([(float(result.score[i]), expected[result.edge(i).up.position]) for i in into_last])


def test_gim_is_what_it_says():
    """The modified backward pass of a block, against one written out by hand."""
    m = model()
    block, x = m.layout.blocks[0], values(m, PAIR.clean, [Site(0, "resid_pre")])[Site(0, "resid_pre")]
    with gim(m) as counts:
        leaf = x.clone().requires_grad_()
        seen = {}
        forward(
            m,
            PAIR.clean,
            {Site(0, "resid_pre"): lambda _: leaf, Site(0, "attn_out"): lambda y: seen.setdefault("y", y)},
        )
        weights = torch.randn(seen["y"].shape, generator=torch.Generator().manual_seed(3))
        ours = torch.autograd.grad((seen["y"] * weights).sum(), leaf)[0]
    assert counts["attention"] == 3
    assert counts["norm"] >= 7
    norm, attn, n = block.input_layernorm, block.self_attn, x.shape[1]
    gain = norm.weight * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    leaf = x.clone().requires_grad_()
    h = leaf * gain.detach()
    q, k, v = (proj(h).view(1, n, -1, 4).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = apply_rotary_pos_emb(q, k, *m.hf.model.rotary_emb(x, torch.arange(n)[None]))
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    mask = torch.full((n, n), float("-inf")).triu(1)
    p = (q @ k.mT / 2 + mask).softmax(-1).detach()
    # each of the four backward passes by its own rule: v × 1/2, then scores at temperature 2, then q, k × 1/4
    dz = (weights @ attn.o_proj.weight).view(1, n, 4, 4).transpose(1, 2)
    warm = ((q @ k.mT / 2 + mask) / 2).softmax(-1).detach()
    dp = dz @ v.detach().mT
    ds = warm * (dp - (warm * dp).sum(-1, keepdim=True)) / 2
    pairs = [(v, p.mT @ dz * 0.5), (q, ds @ k.detach() * 0.25), (k, ds.mT @ q.detach() * 0.25)]
    expected = torch.autograd.grad(sum((t * d.detach()).sum() for t, d in pairs), leaf)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_a_modification_that_acts_on_nothing_is_refused():
    with pytest.raises(UserError, match="GIM acted on no"), gim(model()):
        pass


def test_what_cannot_be_an_edge_is_refused():
    here, later = Node(UP, 3, 2), Node(DOWN, 3, 2)
    for edge in [(here, Node(UP, 4, 2)), (later, here), (Node(UP, 3, 4), later), (Node(None, kind="logits"), later)]:
        with pytest.raises(UserError, match="no edge"):
            Edge(*edge)
    with pytest.raises(UserError, match="one tensor"):
        node_sites(model(), [dictionaries()[0], Stream(Site(1, "resid_pre"))])
    with pytest.raises(UserError, match="only a part"):
        node_sites(model(), [sp.Directions(UP, torch.eye(16)[:2], "two")])
    nodes = node_sites(model(), dictionaries())
    with pytest.raises(UserError, match="no position"):
        path_patches(model(), nodes, [PAIR], [(0, Edge(Node(UP, 3), later))], sp.Paths(), ALL)
    with pytest.raises(UserError, match="equal length"):
        sp.edges(model(), dictionaries(), [PAIR], options=ALL, align="right")


def test_little_is_kept_and_the_rest_is_bounded():
    whole = sp.edges(model(), dictionaries(), [PAIR], NONE, ALL)
    few = sp.edges(model(), dictionaries(), [PAIR], sp.EdgeOptions(keep=30, verify=0, sample=0), ALL)
    sizes = np.sort(np.abs(whole.score))[::-1]
    assert len(few) == 30
    np.testing.assert_allclose(np.sort(np.abs(few.score))[::-1], sizes[:30], rtol=1e-4)
    assert few.dropped[0] == pytest.approx(sizes[30], rel=1e-4)
    assert few.total == whole.total


@torch.no_grad()
def test_a_circuit_of_some_edges_is_that_of_plain_hooks():
    """Each node reads the corrupted run and what its edges carry of the clean one; written out, one pass a node."""
    listed = sp.edges(model(), dictionaries(), [PAIR], NONE, ALL)
    every = [listed.edge(i) for i in np.random.default_rng(1).permutation(len(listed)).tolist()]
    into = [e for e in every if e.down.site == DOWN][:12]
    into += [next(e for e in every if e.down.site == DOWN and kind == e.down.kind) for kind in ("latent", "error")]
    downs = {edge.down for edge in into}
    onward = [e for e in every if e.down.site is None and e.up in downs]
    assert len(onward) >= 3
    by_site = {d.site: d for d in dictionaries()}
    clean, other = (values(model(), text, [UP, DOWN]) for text in (PAIR.clean, PAIR.corrupted))

    def beyond(node, x):
        """What a node adds where its site is `x`, less what it adds in the corrupted run."""
        new, old = (
            written(node.kind, by_site[node.site], v[:, node.position], node.unit) for v in (x, other[node.site])
        )
        return new - old

    site = other[DOWN].clone()
    for down in {edge.up for edge in onward}:
        before, reached = other[UP].clone(), {}
        for edge in (edge for edge in into if edge.down == down):
            before[:, edge.up.position] += beyond(edge.up, clean[UP])
        forward(model(), PAIR.corrupted, {UP: lambda x, v=before: v, DOWN: lambda x, r=reached: r.setdefault("x", x)})
        site[:, down.position] += beyond(down, reached["x"])
    logits = forward(model(), PAIR.corrupted, {DOWN: lambda x: site})
    x, y = (model().encode(letter)[-1] for letter in "xy")
    runs = EdgeRuns(model(), dictionaries(), [PAIR], [*into, *onward])
    ours = runs.run(torch.ones(1, len(runs.members), dtype=torch.bool))[0, 0]
    assert ours == pytest.approx(float(logits[x] - logits[y]), abs=1e-5)
    assert abs(ours - runs.empty[0]) > 1e-3


def test_of_equal_estimates_the_first_are_kept(monkeypatch):
    """The ledger against a stable sort of all edges, over several compactions; estimates have many ties."""
    monkeypatch.setattr(ledger, "AHEAD", 1)
    rows, columns, most, keep = 2, 3, 4, 9
    score = torch.randint(-4, 5, (6, 5, rows, columns, most), generator=torch.Generator().manual_seed(0)).float()
    units = torch.arange(columns * most).view(1, columns, most).expand(rows, -1, -1)
    movers = Movers(UP, torch.zeros(rows, columns, most, 1), torch.zeros_like(units), units, torch.ones_like(units) > 0)
    everything = torch.arange(5 * rows)
    readers = Readers(Stream(DOWN), everything, everything, everything, score, score)
    held = ledger.Ledger(keep, 0, rows, (0,))
    for chunk in score:
        held.add(Products(movers, readers, everything.view(5, rows), chunk), torch.tensor([0]), 1)
    names, kept = held.kept()
    for row in range(rows):
        own = score[:, :, row].flatten()
        order = own.abs().argsort(descending=True, stable=True)
        mine = names[0] == row
        np.testing.assert_array_equal(kept[mine], own[order[:keep]])
        place = np.stack(np.unravel_index(order[:keep].numpy(), (6, 5, columns * most)))
        np.testing.assert_array_equal(names[2, mine], place[2])
        np.testing.assert_array_equal(names[5, mine], place[1] * rows + row)
        assert float(held.dropped[row]) == float(own[order[keep]].abs())


def test_edges_among_some_nodes_are_those_of_all():
    whole = sp.edges(model(), dictionaries(), [PAIR], NONE, ALL)
    all_edges = {whole.edge(i): whole.score[i] for i in range(len(whole))}
    ups = [edge.up for edge in all_edges if edge.up.site == UP][::40]
    downs = [replace(edge.up, position=None) for edge in all_edges if edge.up.site == DOWN][::9]
    among = {*ups, *downs, TARGET}
    some = sp.edges(model(), dictionaries(), [PAIR], replace(NONE, among=(*ups, *downs)), ALL)
    wanted = {
        edge: score
        for edge, score in all_edges.items()
        if all({node, replace(node, position=None)} & among for node in (edge.up, edge.down))
    }
    assert len(wanted) > 10
    assert {some.edge(i): some.score[i] for i in range(len(some))} == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    with pytest.raises(UserError, match="not among the nodes"):
        sp.edges(model(), dictionaries()[:1], [PAIR], replace(NONE, among=tuple(downs)), ALL)


def test_batches_and_pairs_do_not_mix():
    """Pairs of several lengths in batches: each pair's edges are those it has alone."""
    other = sp.PromptPair("the rat", "the bat", "y", "x", "b")
    third = sp.PromptPair("b cat u", "b dog u", "x", "y", "c")
    together = sp.edges(model(), dictionaries(), [PAIR, other, third], NONE, ALL)
    for number, pair in enumerate([PAIR, other, third]):
        alone = sp.edges(model(), dictionaries(), [pair], NONE, ALL)
        mine = {together.edge(i): together.score[i] for i in np.flatnonzero(together.pair == number)}
        theirs = {alone.edge(i): alone.score[i] for i in range(len(alone))}
        scale = np.abs(alone.score).max()
        assert all(mine.get(e, 0) == pytest.approx(s, abs=1e-4 * scale) for e, s in theirs.items())
        assert all(e in theirs or abs(s) < 1e-4 * scale for e, s in mine.items())
    assert "no other one above" in together.summary()
